"""Arguments that a wrapper does not know."""

from __future__ import annotations

import pytest
import torch

from hypermlp.integrations.arguments import refuse_unknown


def test_what_is_not_known_is_named_with_the_version() -> None:
    refuse_unknown({"rope": None, "position_ids": torch.ones(3)}, {"position_ids": "lags say it"}, "A", "torch")
    with pytest.raises(TypeError, match=rf"A got scale=2\.0 from torch {torch.__version__.split('+')[0]}"):
        refuse_unknown({"rope": None, "scale": 2.0}, {"position_ids": ""}, "A", "torch")
    with pytest.raises(TypeError, match=r"got rope=a Tensor from nobodys of an unknown version"):
        refuse_unknown({"rope": torch.ones(3)}, {}, "A", "nobodys")
    with pytest.raises(TypeError, match="got flag=False"):  # False may mean something, None does not
        refuse_unknown({"flag": False}, {}, "A", "torch")


def test_a_misspelt_name_of_a_door_of_ours_names_the_one_that_is_meant() -> None:
    def door(input_ids: object, attention_mask: object = None, **others: object) -> None:
        refuse_unknown(others, {}, "A", "torch", door=door)

    with pytest.raises(TypeError, match=r"what it means: did you mean attention_mask\?$"):
        door(1, mask=2)
    with pytest.raises(TypeError, match="what it means: leave it out or pass None"):
        door(1, bucket=2)
    with pytest.raises(TypeError, match="what it means: leave it out or pass None"):
        door(1, other=2)  # others is no name


def test_it_compiles_whole() -> None:
    def called(x: torch.Tensor, **kwargs: object) -> torch.Tensor:
        refuse_unknown(kwargs, {"position_ids": "lags say it"}, "A", "torch")
        return x + 1

    compiled = torch.compile(called, fullgraph=True, backend="eager")
    x = torch.zeros(2)
    assert torch.equal(compiled(x, position_ids=x, rope=None), x + 1)

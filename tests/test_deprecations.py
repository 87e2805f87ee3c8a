"""A deprecation of what we use is an error in the tests, in each of the ways that libraries announce one."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Renamed(nn.Module):
    """A host whose argument has another name since its last release: the warning is attributed to torch.nn."""

    def __init__(self, category: type[Warning]) -> None:
        super().__init__()
        self.category = category

    def forward(self, x: Tensor, cache: Any = None, **others: Any) -> Tensor:
        if "old_cache" in others:
            warnings.warn("`old_cache` is deprecated: use `cache`", self.category, stacklevel=2)
        return x


@pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning, PendingDeprecationWarning])
def test_a_warning_about_an_argument_of_a_model(category: type[Warning]) -> None:
    model, x = Renamed(category), torch.ones(2)
    model(x, cache=1)
    with pytest.raises(category, match="old_cache"):
        model(x, old_cache=1)


@pytest.mark.parametrize("name", ["transformers", "transformers.models.invented", "huggingface_hub", "peft.invented"])
def test_a_line_in_a_log(name: str) -> None:
    logging.getLogger(name).warning("something else")
    with pytest.raises(DeprecationWarning, match="`old_cache` is deprecated"):
        logging.getLogger(name).warning("`%s` is deprecated", "old_cache")


def test_the_ways_of_transformers() -> None:
    pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra")
    from transformers.utils.deprecation import deprecate_kwarg
    from transformers.utils.logging import get_logger

    class Host(nn.Module):
        @deprecate_kwarg("old_cache", version="99.0", new_name="cache")
        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            return x

    with pytest.raises(FutureWarning, match="old_cache"):
        Host()(torch.ones(2), old_cache=1)
    for _ in range(2):  # said once to a user, and an error every time in tests
        with pytest.raises(DeprecationWarning, match="deprecated"):
            get_logger("transformers.invented").warning_once("`old_cache` is deprecated")

"""The Hugging Face family in every mode: masks and positions, which it may not read there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.models.families import ATTENTION, VOCAB, left_padded, tiny, tokens
from tests.quick import combinations

from hypermlp.models.huggingface.decoder_layer import packed_bounds  # isort: skip

POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([5, 4], [2, 7])])


class Logits(torch.nn.Module):
    """A model as a function of tensors."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model, self.name = model.requires_grad_(False), name

    def forward(self, ids: Tensor, seen: Tensor) -> Tensor:
        return self.model(ids, **{self.name: seen}, use_cache=False).logits


def _fake(call: Logits, *args: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(*map(mode.from_tensor, args)).shape == (*args[0].shape, VOCAB)


def _compile(call: Logits, *args: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(call, backend="aot_eager", fullgraph=True)(*args)


def _vmap(call: Logits, *args: Tensor) -> Tensor:
    return torch.func.vmap(call)(*(torch.stack((x, x)) for x in args))[1]


MODES: dict[str, Callable[..., Any]] = {
    "FakeTensorMode": _fake,
    "compile": _compile,
    "export": lambda call, *args: torch.export.export(call, args).module()(*args),
    "strict export": lambda call, *args: torch.export.export(call, args, strict=True).module()(*args),
    "vmap": _vmap,
    "trace": lambda call, *args: torch.jit.trace(call, args, check_trace=False)(*args),
}
SEEN = {
    "attention_mask": left_padded([5, 9]),
    "position_ids": (tokens(2, 9), POSITIONS),
    "position_ids of whole rows": (tokens(2, 9), torch.arange(9).expand(2, -1)),
}


# of the modes that take seconds: what documents need, the mask in one
DEAR = {
    "compile": ("position_ids",),
    "export": ("position_ids of whole rows",),
    "strict export": ("attention_mask",),
}
CALLS = combinations(MODES, SEEN, quick=lambda mode, seen: seen in DEAR.get(mode, SEEN))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("mode", "seen"), CALLS)
def test_every_mode_gives_the_eager_logits(mode: str, seen: str) -> None:
    call, args = Logits(tiny(), seen.split()[0]), SEEN[seen]
    expected = call(*args)
    found = MODES[mode](call, *args)
    if found is not None:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_an_exported_model_tells_documents_apart_at_any_size() -> None:
    call = Logits(tiny(), "position_ids")
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=3, max=512)
    program = torch.export.export(call, (tokens(2, 9), POSITIONS), dynamic_shapes=({0: batch, 1: length},) * 2)
    ids = tokens(3, 14, seed=1)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([14], [1, 1, 12], [6, 8])])
    torch.testing.assert_close(program.module()(ids, positions), call(ids, positions), rtol=0, atol=1e-10)


def test_bounds_that_cannot_be_read_are_of_one_size() -> None:
    whole = torch.arange(9).expand(2, -1)
    for positions, expected in ((POSITIONS, packed_bounds(POSITIONS)), (whole, torch.tensor([0, 9, 18]))):
        bounds = torch.compile(packed_bounds, backend="eager", fullgraph=True)(positions)
        assert bounds is not None
        assert bounds.shape == (positions.numel() + 1,)
        assert torch.equal(bounds.unique(), expected)
        assert bool((bounds.diff() >= 0).all())


def test_numbers_of_documents_compile_whole() -> None:
    call, ids = Logits(tiny(), "seq_idx"), tokens(2, 9)
    numbers = torch.tensor([[0] * 5 + [1] * 4, [0] * 2 + [1] * 7])
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, numbers), call(ids, numbers), rtol=0, atol=1e-10)


def test_documents_longer_than_tables_by_position_fail_when_they_come() -> None:
    """The batch laid end to end is longer than the tables: no document is, which is seen at run time alone."""
    attention = {**ATTENTION["hyperglu"], "layout": "position", "max_lag": 9}
    call, ids = Logits(tiny(attention=attention, num_hidden_layers=1), "position_ids"), tokens(2, 9)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, POSITIONS), call(ids, POSITIONS), rtol=0, atol=1e-10)
    short = Logits(tiny(attention=attention | {"max_lag": 6}, num_hidden_layers=1), "position_ids")
    with pytest.raises(ValueError, match="a sequence of 7 tokens does not fit"):
        short(ids, POSITIONS)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="a sequence does not fit position-indexed tables of 6 rows"):
        torch.compile(short, backend="aot_eager", fullgraph=True)(ids, POSITIONS)

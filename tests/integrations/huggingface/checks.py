"""What a swapped model must honour, each as a function that raises AssertionError where it does not."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hypermlp.integrations.huggingface.attention import HuggingFaceAttention
from hypermlp.integrations.huggingface.names import CACHE_NAME
from tests.integrations.huggingface.hosts import cache_of, logits, tokens

# of float64 models, whose outputs are about 1; hosts take norms and angles in float32
TOLERANCE = 1e-9


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, expected {tuple(expected.shape)}"
    return float((actual - expected).detach().abs().max().nan_to_num(float("inf")))


def check_same_weights(model: nn.Module, other: nn.Module) -> None:
    """Bit for bit. Outputs of equal weights may differ by rounding: memory from a file is aligned otherwise."""
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def attentions(model: nn.Module) -> list[HuggingFaceAttention]:
    return [module for module in model.modules() if isinstance(module, HuggingFaceAttention)]


def check_called(model: nn.Module) -> None:
    """Every layer once a forward, and rows of a batch are what they are alone."""
    calls: list[nn.Module] = []
    handles = [a.mixer.register_forward_hook(lambda module, *_: calls.append(module)) for a in attentions(model)]
    ids = tokens(3, 7)
    for batch in (1, 2, 3):
        calls.clear()
        out = logits(model, ids[:batch], use_cache=False)
        assert calls == [a.mixer for a in attentions(model)], "a layer was not called once, in order"
        alone = torch.cat([logits(model, ids[row : row + 1], use_cache=False) for row in range(batch)])
        assert error(out, alone) < TOLERANCE
    for handle in handles:
        handle.remove()


def check_causal(model: nn.Module) -> None:
    ids = tokens(2, 12)
    for kept in (1, 5, 11):
        other = ids.clone()
        other[:, kept:] = tokens(2, 12 - kept, seed=1)
        a, b = (logits(model, x, use_cache=False) for x in (ids, other))
        assert error(a[:, :kept], b[:, :kept]) < TOLERANCE
        assert error(a[:, kept:], b[:, kept:]) > 1e-2


def check_stepwise(model: nn.Module, *, sizes: tuple[int, ...] = (5, 1, 1, 1, 4), cache: Any = None) -> None:
    ids = tokens(2, sum(sizes))
    whole = logits(model, ids, use_cache=False)
    cache = cache_of(model) if cache is None else cache
    parts = [logits(model, part, **{CACHE_NAME: cache}, use_cache=True) for part in ids.split(sizes, dim=1)]
    assert error(torch.cat(parts, dim=1), whole) < TOLERANCE
    assert int(cache.get_seq_length()) == sum(sizes)


def padded(side: str, lengths: tuple[int, ...] = (9, 6, 1)) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows of several lengths with random tokens, not zeros, under the mask."""
    longest = max(lengths)
    ids, mask = tokens(len(lengths), longest, seed=3), torch.zeros(len(lengths), longest, dtype=torch.long)
    rows = []
    for row, length in enumerate(lengths):
        own = slice(longest - length, None) if side == "left" else slice(0, length)
        mask[row, own] = 1
        rows.append(ids[row : row + 1, own])
    return ids, mask, rows


def check_padding(model: nn.Module, side: str = "left") -> None:
    ids, mask, rows = padded(side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    assert out.isfinite().all()
    for row, alone in enumerate(rows):
        assert error(out[row : row + 1][:, mask[row] == 1], logits(model, alone, use_cache=False)) < TOLERANCE


def check_packed(model: nn.Module, batch: int = 1) -> None:
    lengths = (5, 4, 3)
    ids = tokens(batch, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(batch, -1)
    out = logits(model, ids, position_ids=positions, use_cache=False)
    alone = torch.cat([logits(model, part, use_cache=False) for part in ids.split(lengths, dim=1)], dim=1)
    assert error(out, alone) < TOLERANCE


# what generate is asked, and what the same is without a cache
GENERATE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "sampling": ({"do_sample": True}, {"do_sample": True}),
    "beam": ({"num_beams": 4}, {"num_beams": 4}),
    "several": ({"do_sample": True, "num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 3}),
    "static": ({"cache_implementation": "static"}, {}),
    "static beam": ({"cache_implementation": "static", "num_beams": 3}, {"num_beams": 3}),
    "lookup": ({"prompt_lookup_num_tokens": 3}, {}),
    "chunked prefill": ({"prefill_chunk_size": 4}, {}),
    "static chunked prefill": ({"prefill_chunk_size": 4, "cache_implementation": "static"}, {}),
}


def generate(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    torch.manual_seed(7)
    new_tokens = kwargs.pop("new_tokens", 10)
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    out: Tensor = model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0, **kwargs)
    # where tokens are proposed, transformers 5.5 may go one too far
    return out[:, : ids.shape[1] + new_tokens]


def prompt(kind: str, seed: int) -> Tensor:
    if kind == "lookup":  # something to look up
        return tokens(1, 4, seed=seed).repeat(1, 3)
    return tokens(2, 7, seed=seed)


def check_generate(model: nn.Module, kind: str, seeds: int = 1) -> None:
    cached, plain = GENERATE[kind]
    for seed in range(seeds):
        ids = prompt(kind, seed)
        expected = generate(model, ids, use_cache=False, **plain)
        assert torch.equal(generate(model, ids, use_cache=True, **cached), expected), f"{kind}, prompt {seed}"


def check_generate_padded(model: nn.Module, **kwargs: Any) -> None:
    """A batch of prompts padded with garbage on the left goes on as each prompt alone."""
    ids, mask, rows = padded("left")
    together = generate(model, ids, attention_mask=mask, **kwargs)
    plain = {name: value for name, value in kwargs.items() if name != "cache_implementation"}
    for row, alone in enumerate(rows):
        expected = generate(model, alone, use_cache=False, **plain)
        assert torch.equal(together[row, ids.shape[1] :], expected[0, alone.shape[1] :])


def check_gradients(model: nn.Module) -> dict[str, Tensor]:
    """One training step's gradients, all there and finite."""
    model.train()
    model.zero_grad()
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    grads = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        grads[name] = parameter.grad.clone()
    return grads


def quiet() -> None:
    # bars alone: a deprecation is logged as a warning, and is to fail the test
    transformers.utils.logging.disable_progress_bar()

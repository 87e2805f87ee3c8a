"""What is read from transformers' masks, what is refused, and the maps that come back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hypermlp import restore_attention
from hypermlp.integrations.huggingface.masks import read_mask
from hypermlp.integrations.huggingface.names import CACHE_NAME
from tests.integrations.huggingface import checks
from tests.integrations.huggingface.hosts import BUILD, DECODERS, cache_of, logits, stock, swapped, tokens


@pytest.fixture(autouse=True)
def _quiet() -> None:
    checks.quiet()


def causal_mask(valid: Tensor, document: Tensor | None = None, window: int | None = None) -> Tensor:
    length = valid.shape[1]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    mask = (lag >= 0) & valid[:, None]
    if document is not None:
        mask = mask & (document[:, :, None] == document[:, None])
    if window is not None:
        mask = mask & (lag < window)
    return mask[:, None]


def read(mask: Tensor | None, length: int, past: int = 0, *, causal: bool = True, window: int | None = None) -> Any:
    batch = 1 if mask is None else mask.shape[0]
    return read_mask(mask, torch.zeros(batch, length, 4), past, causal=causal, window=window)


def test_no_mask_says_nothing() -> None:
    assert read(None, 5) == (None, None)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("rows", ["1111111", "0001111", "1111000", "1100111", "0000000", "0101010"])
def test_padding_is_read(rows: str, additive: bool) -> None:
    valid = torch.tensor([[c == "1" for c in rows], [True] * 7])
    mask = causal_mask(valid)
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    found = read(mask, 7)
    assert found.cu_seqlens is None
    assert found.valid is None if valid.all() else torch.equal(found.valid, valid)
    both = valid[:, None, None].expand(-1, 1, 7, -1)
    assert found.valid is None if valid.all() else torch.equal(read(both, 7, causal=False).valid, valid)


@pytest.mark.parametrize(
    ("documents", "bounds"),
    [(["aaabbcc"], [0, 3, 5, 7]), (["aaabbcc", "aaaaaab"], [0, 3, 5, 7, 13, 14]), (["a.bb..c"], [0, 2, 6, 7])],
)
def test_packed_documents_are_read(documents: list[str], bounds: list[int]) -> None:
    document = torch.tensor([[ord(c) for c in row] for row in documents])
    valid = document != ord(".")
    found = read(causal_mask(valid, document), 7)
    assert found.cu_seqlens.tolist() == bounds
    assert found.valid is None if valid.all() else torch.equal(found.valid, valid)


def test_one_document_in_every_row_is_no_packing() -> None:
    assert read(causal_mask(torch.ones(3, 7, dtype=torch.bool)), 7) == (None, None)


def test_a_static_cache_has_columns_to_come() -> None:
    valid = torch.tensor([[False, True, True, True]])
    wide = torch.cat((causal_mask(valid), torch.zeros(1, 1, 4, 3, dtype=torch.bool)), dim=-1)
    assert torch.equal(read(wide, 4).valid, valid)
    step = torch.tensor([[[[False, True, True, True, True, False, False]]]])
    assert read(step, 1, past=4).valid.tolist() == [[True]]
    assert read(step, 1, past=torch.tensor(4)).valid.tolist() == [[True]]


def test_a_sliding_window_must_cover_the_layers() -> None:
    mask = causal_mask(torch.ones(1, 9, dtype=torch.bool), window=4)
    assert read(mask, 9, window=4) == (None, None)
    assert read(mask, 9, window=3) == (None, None)
    with pytest.raises(ValueError, match="sliding window of at least max_lag"):
        read(mask, 9, window=5)
    with pytest.raises(ValueError, match="sliding window"):
        read(mask, 9)


def test_masks_that_say_something_else_are_refused() -> None:
    prefix = causal_mask(torch.ones(1, 6, dtype=torch.bool))
    prefix[..., :3, :3] = True  # a bidirectional prefix
    hole = causal_mask(torch.ones(1, 6, dtype=torch.bool))
    hole[..., 5, 2] = False  # one pair hidden
    causal = causal_mask(torch.ones(1, 6, dtype=torch.bool))
    for mask, layer_is_causal in ((prefix, True), (hole, True), (causal, False), (torch.ones_like(causal), True)):
        with pytest.raises(ValueError, match="hides or shows"):
            read(mask, 6, causal=layer_is_causal)
    with pytest.raises(ValueError, match="continue a cache"):
        read(
            torch.cat(
                (torch.ones(1, 1, 4, 3).bool(), causal_mask(torch.ones(1, 4).bool(), torch.tensor([[0, 0, 1, 1]]))), -1
            ),
            4,
            past=3,
        )
    with pytest.raises(ValueError, match="must be"):
        read(torch.ones(1, 6, dtype=torch.bool), 6)
    with pytest.raises(TypeError, match="bool or additive"):
        read(torch.ones(1, 1, 6, 6, dtype=torch.long), 6)


def test_a_model_refuses_a_mask_of_the_users_own() -> None:
    model = swapped("llama")
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)  # full attention
    with pytest.raises(ValueError, match="hides or shows"):
        logits(model, tokens(1, 6), attention_mask=mask, use_cache=False)


def test_attention_that_hands_over_no_mask_is_refused() -> None:
    model: Any = swapped("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="set_attn_implementation"):
        checks.attentions(model)[0](torch.randn(1, 4, 32))


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_sliding_windows_of_the_host(name: str, layers: list[int] | None) -> None:
    """Tokens beyond the host's window count for nothing, with and without a cache, also beside host layers."""
    model = swapped(name, layers=layers)
    windows = [layer.mixer.config.max_lag for layer in checks.attentions(model)]
    assert 6 in windows
    checks.check_stepwise(model, sizes=(4, 1, 1, 5, 1, 1, 3))
    checks.check_padding(model)
    checks.check_generate(model, "beam")


def test_no_window_beyond_the_hosts() -> None:
    with pytest.raises(ValueError, match="max_lag=7 is longer than the host's sliding window of 6"):
        swapped("mistral", max_lag=7)
    checks.check_stepwise(swapped("mistral", max_lag=5))


@pytest.mark.parametrize("kind", ["quantized", "offloaded", "offloaded_static"])
def test_caches_that_hold_too_little_are_refused_before_a_package_is_asked_for(kind: str) -> None:
    model: Any = swapped("llama")
    with pytest.raises(ValueError, match=f"hyper layers cannot use cache_implementation='{kind}'"):
        checks.generate(model, tokens(1, 5), cache_implementation=kind)
    copied = copy.deepcopy(model)
    assert vars(copied)["_prepare_cache_for_generation"].args == (copied,)
    restore_attention(copied)
    assert "_prepare_cache_for_generation" not in vars(copied)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"])
def test_bounds_as_a_list_are_told_what_to_be(name: str) -> None:
    attention = checks.attentions(swapped("llama"))[0]
    given = {"cu_seq_lens_q": torch.tensor([0, 2, 5])} | {name: [0, 2, 5]}
    with pytest.raises(TypeError, match=rf"{name} must be a tensor, got list: give torch\.tensor\(.*int32"):
        attention(torch.randn(1, 5, 32, dtype=torch.float64), **given)


def test_no_cache_but_its_own_kinds() -> None:
    model: Any = swapped("llama")
    ids = tokens(1, 5)
    quantised, offloaded = cache_of(model), cache_of(model)
    quantised.layers[0] = type("QuantizedLayer", (transformers.cache_utils.DynamicLayer,), {})()
    offloaded.offloading = True
    for cache, name in ((quantised, "QuantizedLayer"), (offloaded, "offloaded")):
        with pytest.raises(ValueError, match=rf"cannot use this cache \({name}\)"):
            logits(model, ids, **{CACHE_NAME: cache}, use_cache=True)
    with pytest.raises(TypeError, match="transformers Cache"):
        checks.attentions(model)[0](torch.randn(1, 4, 32), **{CACHE_NAME: ((torch.zeros(1), torch.zeros(1)),)})
    filled = cache_of(model)
    logits(stock("llama"), ids, **{CACHE_NAME: filled}, use_cache=True)
    with pytest.raises(ValueError, match="before a swap"):
        logits(model, ids, **{CACHE_NAME: filled}, use_cache=True)
    ours = cache_of(model)
    logits(model, ids, **{CACHE_NAME: ours}, use_cache=True)
    with pytest.raises(RuntimeError, match="filled by a hyper layer"):
        logits(stock("llama"), ids, **{CACHE_NAME: ours}, use_cache=True)
    other = swapped("llama", max_lag=8)
    with pytest.raises(ValueError, match="filled by another layer"):
        logits(other, ids, **{CACHE_NAME: ours}, use_cache=True)


def test_packed_documents_and_a_cache_that_cannot_hold_them() -> None:
    """transformers sees packing by positions without a cache alone; a mask of the user's own can say it always."""
    model: Any = swapped("llama")
    ids = tokens(1, 9)
    mask = causal_mask(torch.ones(1, 9, dtype=torch.bool), torch.tensor([[0] * 5 + [1] * 4]))
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True)
    assert checks.error(out.logits[:, 5:], logits(model, ids[:, 5:])) < checks.TOLERANCE
    with pytest.raises(RuntimeError, match="packed documents"):
        logits(model, ids[:, :1], **{CACHE_NAME: getattr(out, CACHE_NAME)})


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_packed_documents_of_a_host_that_is_not_causal(attn: str) -> None:
    """A block-diagonal mask: each document is what it is alone."""
    model: Any = swapped("bert", attn=attn)
    lengths = (5, 4, 3)
    ids = tokens(2, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    mask = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()[None, None].expand(2, -1, -1, -1)
    out = logits(model, ids, position_ids=positions, attention_mask=mask)
    alone = torch.cat([logits(model, part) for part in ids.split(lengths, dim=1)], dim=1)
    assert checks.error(out, alone) < checks.TOLERANCE
    hidden = mask.clone()
    hidden[..., 0, 1] = False
    with pytest.raises(ValueError, match="not causal: every token of a document must see every other one"):
        logits(model, ids, position_ids=positions, attention_mask=hidden)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    from tests.models.families import tiny

    def nested(*shape: int) -> Tensor:
        parts = [torch.randn(length, *shape, dtype=torch.float64) for length in (3, 5)]
        return torch.nested.nested_tensor(parts, layout=layout)

    layer, x = checks.attentions(swapped("bert"))[0], torch.randn(2, 5, 32, dtype=torch.float64)
    for call in (
        lambda: layer(nested(32)),
        lambda: layer(x, nested(5)),
        lambda: tiny()(inputs_embeds=nested(16)),
        lambda: tiny()(nested().long() if layout is torch.jagged else nested()),
        lambda: tiny()(tokens(2, 5) % 30, nested()),
    ):
        with pytest.raises(TypeError, match=r"is a nested tensor.*to_padded_tensor"):
            call()


@pytest.mark.parametrize("name", BUILD)
def test_output_attentions(name: str) -> None:
    """One map for each layer, causal where the host is."""
    model: Any = swapped(name, attn="eager")
    ids = tokens(2, 7)
    assert logits(model, ids).shape[:2] == (2, 7)
    with torch.no_grad():
        maps = model(ids, output_attentions=True, use_cache=False).attentions
    assert len(maps) == 2
    assert all(m.shape == (2, 2, 7, 7) for m in maps)
    assert all(bool(m.triu(1).any()) == (name == "bert") for m in maps)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_output_attentions_while_generating(name: str) -> None:
    model: Any = swapped(name, attn="eager")
    ids = tokens(2, 5)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, pad_token_id=0,
        output_attentions=True, return_dict_in_generate=True,
    )  # fmt: skip
    with torch.no_grad():
        whole = model(out.sequences[:, :-1], output_attentions=True, use_cache=False).attentions
    assert [m[0].shape[2:] for m in out.attentions] == [(5, 5), (1, 6), (1, 7)]
    for step, maps in enumerate(out.attentions):
        for layer, weights in enumerate(maps):
            rows, columns = weights.shape[2:]
            expected = whole[layer][:, :, columns - rows : columns, :columns]
            assert checks.error(weights, expected) < checks.TOLERANCE, f"step {step}"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_maps_with_a_static_cache(name: str) -> None:
    """The prompt has maps, later tokens have none, and the tokens are the same."""
    model: Any = swapped(name, attn="eager")
    ids = tokens(2, 7)
    with torch.no_grad():
        assert len(model(ids, output_attentions=True).attentions) == 2
    checks.check_generate(model, "static")
    asked = {"cache_implementation": "static", "output_attentions": True, "return_dict_in_generate": True}
    out: Any = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, pad_token_id=0, **asked
    )
    assert torch.equal(out.sequences, checks.generate(model, ids, use_cache=False, new_tokens=4))
    with torch.no_grad():
        whole = model(ids, output_attentions=True, use_cache=False).attentions
    for found, expected in zip(out.attentions[0], whole, strict=True):
        assert checks.error(found, expected) < checks.TOLERANCE
    assert [len(maps) for maps in out.attentions] == [2, 0, 0, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gpt_neox"])
def test_gradients_pass_through_maps(name: str) -> None:
    """As transformers' own tests ask of every model; and every other gradient is what it is without maps."""
    model: Any = swapped(name, attn="eager")
    ids, mask, _ = checks.padded("left")

    def grads(**options: Any) -> tuple[Any, dict[str, Tensor]]:
        model.zero_grad()
        out = model(ids, attention_mask=mask, **options)
        for state in (*(out.attentions or ()), *(out.hidden_states or ())):
            state.retain_grad()
        (out.logits * mask[..., None]).square().mean().backward()
        return out, {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    _, expected = grads(output_attentions=False)
    out, found = grads(output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 2
    for state in (*out.attentions, *out.hidden_states):
        assert state.grad is not None
        assert state.grad.abs().max() > 1e-4
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-9, atol=1e-9, msg=key)


def test_maps_of_packed_and_padded_batches() -> None:
    model: Any = swapped("llama", attn="eager")
    ids, mask, rows = checks.padded("left")
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions[0]
        alone = model(rows[1], output_attentions=True, use_cache=False).attentions[0]
        positions = torch.cat((torch.arange(5), torch.arange(4)))[None].expand(2, -1)
        packed = model(tokens(2, 9), position_ids=positions, output_attentions=True, use_cache=False).attentions[0]
        part = model(tokens(2, 9)[:, 5:], output_attentions=True, use_cache=False).attentions[0]
    assert checks.error(padded[1:2, :, 3:, 3:], alone) < checks.TOLERANCE
    assert checks.error(packed[:, :, 5:, 5:], part) < checks.TOLERANCE
    assert not packed[:, :, 5:, :5].any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recorders_installed_before_the_swap_go_on(name: str) -> None:
    """And are there again after the way back."""
    from hypermlp import restore_attention, swap_attention

    model: Any = stock(name, attn_implementation="eager")
    ids = tokens(2, 7)
    with torch.no_grad():
        before = model(ids, output_attentions=True).attentions
        swap_attention(model)
        assert len(model(ids, output_attentions=True).attentions) == 2
        restore_attention(model)
        after = model(ids, output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_hidden_states_are_recorded() -> None:
    for name in DECODERS:
        with torch.no_grad():
            states = swapped(name)(tokens(2, 5), output_hidden_states=True).hidden_states
        assert [state.shape for state in states] == [(2, 5, 32)] * 3


def test_the_version_is_one_that_is_supported() -> None:
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    assert (major, minor) >= (5, 5)

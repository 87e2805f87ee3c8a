"""The Hugging Face family's forward: what it takes (padding, packing) and what it gives."""

from __future__ import annotations

import pytest
import torch

from tests.models.families import ATTENTION, PAD, VOCAB, assert_same_weights, left_padded, tiny, tiny_config, tokens

from transformers import AutoModelForSequenceClassification, DynamicCache  # isort: skip

from hypermlp.integrations.huggingface.names import CACHE_NAME
from hypermlp.models.huggingface import HyperMLPForSequenceClassification
from hypermlp.models.huggingface.decoder_layer import packed_bounds

MIXERS = list(ATTENTION)
CLOSE = {"rtol": 0, "atol": 1e-10}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_outputs(mixer, batch):
    model, ids = tiny(mixer), tokens(batch, 7)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, output_attentions=True, labels=ids)
    assert out.logits.shape == (batch, 7, VOCAB)
    assert [h.shape for h in out.hidden_states] == [(batch, 7, 16)] * 3
    assert [a.shape for a in out.attentions] == [(batch, 2, 7, 7)] * 2
    assert isinstance(getattr(out, CACHE_NAME), DynamicCache)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss.double(), expected.double(), rtol=1e-6, atol=1e-6)
    assert isinstance(model(ids, return_dict=False), tuple)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:], **CLOSE)
    for kept in (slice(-2, None), [0, 2], torch.tensor([0, 2])):
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, out.logits[:, kept], **CLOSE)
    torch.testing.assert_close(model(ids, use_cache=False).logits, out.logits, **CLOSE)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, out.logits, **CLOSE)


@pytest.mark.parametrize("mixer", MIXERS)
def test_attentions_say_what_is_read(mixer):
    """The map times the values is what the heads read, with and without a cache."""
    model = tiny(mixer, attention={**ATTENTION[mixer], "output_gate": False})
    (ids, mask), layer, seen = left_padded([5, 9]), model.model.layers[0].attention, {}
    layer.o_proj.register_forward_pre_hook(lambda module, args: seen.update(read=args[0]))
    layer.v_proj.register_forward_hook(lambda module, args, out: seen.update(v=out))
    with torch.no_grad():
        weights = model(ids, mask, output_attentions=True, use_cache=False).attentions[0]
        v = seen["v"].view(2, 9, 2, 8) * mask[:, :, None, None]
        read = torch.einsum("bhts,bshv->bthv", weights, v).flatten(2)
        torch.testing.assert_close(seen["read"] * mask[..., None], read * mask[..., None], **CLOSE)
        cache = DynamicCache(config=model.config)
        parts = [
            model(ids[:, a:b], mask[:, :b], **{CACHE_NAME: cache}, output_attentions=True).attentions[0]
            for a, b in ((0, 4), (4, 8), (8, 9))
        ]
    valid = mask[:, None, :, None].double()
    for part, (a, b) in zip(parts, ((0, 4), (4, 8), (8, 9)), strict=True):
        torch.testing.assert_close(part * valid[:, :, a:b], weights[:, :, a:b, :b] * valid[:, :, a:b], **CLOSE)


def test_generate_returns_attentions_and_hidden_states():
    out = tiny().generate(
        tokens(2, 5),
        max_new_tokens=3,
        do_sample=False,
        output_attentions=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    assert [step[0].shape[-2:] for step in out.attentions] == [(5, 5), (1, 6), (1, 7)]
    assert [step[-1].shape for step in out.hidden_states] == [(2, 5, 16), (2, 1, 16), (2, 1, 16)]


def test_a_static_cache_has_maps_of_the_prompt():
    model, ids = tiny(), tokens(2, 5)
    out = model.generate(
        ids, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True,
        cache_implementation="static",
    )  # fmt: skip
    assert torch.equal(out.sequences, model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False))
    with torch.no_grad():
        whole = model(ids, output_attentions=True, use_cache=False).attentions
    for found, expected in zip(out.attentions[0], whole, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
    assert [len(maps) for maps in out.attentions] == [2, 0, 0]


@pytest.mark.parametrize("how", ["call", "config"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_pass_through_maps(mixer, packed, how):
    """As Transformers' own tests ask of every model; and every other gradient is what it is without maps."""
    model, (ids, mask) = tiny(mixer), left_padded([5, 9])
    inputs = {"attention_mask": mask}
    if packed:
        inputs = {"cu_seq_lens_q": torch.tensor([0, 4, 9, 18])}

    def grads(**options):
        model.zero_grad()
        out = model(ids, **inputs, **options)
        for state in (*(out.attentions or ()), *(out.hidden_states or ())):
            state.retain_grad()
        out.logits.square().mean().backward()
        return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, expected = grads()
    if how == "config":
        model.config.output_attentions = model.config.output_hidden_states = True
        out, found = grads()
    else:
        out, found = grads(output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits, plain.logits, **CLOSE)
    assert (len(out.attentions), len(out.hidden_states)) == (2, 3)
    assert all(state.grad is not None and state.grad.any() for state in (*out.attentions, *out.hidden_states))
    assert set(found) == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("mixer", MIXERS)
def test_later_tokens_do_not_change_earlier_logits(mixer):
    model, ids = tiny(mixer), tokens(2, 10)
    changed = ids.clone()
    changed[:, 6:] = tokens(2, 4, seed=1)
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :6], after[:, :6], **CLOSE)
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_padding_holds_does_not_matter(mixer, side):
    model, (ids, mask) = tiny(mixer), left_padded([3, 9, 1])
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    # positions as generate makes them; the layers count for themselves
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(ids, mask, position_ids=positions).logits
        assert logits.isfinite().all()
        for row, valid in enumerate(mask.bool()):
            alone = model(ids[row, valid][None]).logits
            torch.testing.assert_close(logits[row, valid], alone[0], **CLOSE)
        if side == "left":  # a mask that is ignored is noticed
            assert not torch.allclose(model(ids).logits[0, mask[0].bool()], logits[0, mask[0].bool()])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q"])
def test_packed_equals_separate(mixer, how):
    model, ids = tiny(mixer), tokens(2, 9)
    lengths = [[5, 4], [2, 7]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packing = {"position_ids": positions} if how == "position_ids" else {"cu_seq_lens_q": packed_bounds(positions)}
    with torch.no_grad():
        out = model(ids, **packing, output_attentions=True, output_hidden_states=True)
        assert getattr(out, CACHE_NAME) is None
        for row in range(2):
            for part, logits in zip(ids[row].split(lengths[row]), out.logits[row].split(lengths[row]), strict=True):
                torch.testing.assert_close(logits, model(part[None]).logits[0], **CLOSE)
        first = out.attentions[0][:, :, 2:, :2]
        assert (first[1] == 0).all()
        assert (first[0] != 0).any()
        assert out.hidden_states[0].shape == (2, 9, 16)
        mask = torch.ones_like(ids)
        mask[1, 0] = 0  # hidden in its document, which goes on without it
        masked = model(ids, mask, cu_seq_lens_q=packed_bounds(positions)).logits
        torch.testing.assert_close(masked[0], out.logits[0], **CLOSE)
        torch.testing.assert_close(masked[1, 1], model(ids[1:, 1:2]).logits[0, 0], **CLOSE)
    one = torch.arange(3, 12).expand(2, -1)
    torch.testing.assert_close(model(ids, position_ids=one).logits, model(ids).logits, **CLOSE)


def test_a_block_takes_no_packed_sequences_with_a_cache():
    block, x = tiny().model.layers[0], torch.randn(1, 5, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="cu_seqlens: packed sequences cannot be continued"):
        block(x, cu_seqlens=torch.tensor([0, 2, 5]), cache=DynamicCache())


def test_packed_bounds():
    positions = torch.tensor([[0, 1, 2, 0, 1], [4, 5, 6, 7, 0]])
    assert packed_bounds(positions).tolist() == [0, 3, 5, 9, 10]
    assert packed_bounds(torch.arange(5)[None]) is None


def test_bad_inputs():
    model, ids = tiny(), tokens(2, 5)
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=torch.zeros(2, 5, 16))
    with pytest.raises(ValueError, match=r"attention_mask must be 0/1 \[batch, length\]"):
        model(ids, torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match="got 4"):
        model(ids, torch.ones(2, 4))
    with pytest.raises(ValueError, match="additive"):
        model(ids, torch.zeros(2, 5))


def test_classification(tmp_path):
    torch.manual_seed(0)
    model = HyperMLPForSequenceClassification(tiny_config(num_labels=3)).double().eval()
    (ids, mask), labels = left_padded([4, 9]), torch.tensor([2, 0])
    ids = ids.masked_fill(mask == 0, PAD)  # where the last token is, the pad token says
    out = model(ids, mask, labels=labels)
    assert out.logits.shape == (2, 3)
    assert out.loss.isfinite()
    torch.testing.assert_close(out.logits[0], model(ids[:1, 5:]).logits[0], **CLOSE)
    torch.testing.assert_close(
        model(ids.flip(1), mask.flip(1)).logits[0], model(ids[:1].flip(1)[:, :4]).logits[0], **CLOSE
    )
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    torch.testing.assert_close(again(ids, mask).logits, out.logits, **CLOSE)

"""The Hugging Face family: configuration, saving and loading, what its forward takes and gives."""

from __future__ import annotations

import copy
import json
from unittest import mock

import pytest
import torch

from tests.models.families import ATTENTION, PAD, VOCAB, left_padded, tiny, tiny_config, tokens

from safetensors.torch import load_file, save_file  # isort: skip
from transformers import (  # isort: skip
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)

from hypermlp.config import HyperConfig
from hypermlp.layers.short_conv import ShortConv
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp.models.huggingface import (
    HyperMLPConfig,
    HyperMLPForCausalLM,
    HyperMLPForSequenceClassification,
    HyperMLPModel,
    HyperMLPPreTrainedModel,
)
from hypermlp.models.huggingface.decoder_layer import packed_bounds

MIXERS = list(ATTENTION)
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 0, "atol": 1e-10}


# Configuration


def test_attention_may_be_a_mapping_a_config_or_one_per_layer():
    described = HyperConfig(32, 4, mixer="hypermlp", max_lag=8)
    for given in (described, described.to_dict(), {"num_heads": 4, "mixer": "hypermlp", "max_lag": 8}):
        assert HyperMLPConfig(hidden_size=32, attention=given).attention_config(3) == described
    heads = HyperMLPConfig(hidden_size=32, num_attention_heads=4, attention={"mixer": "hypermlp", "max_lag": 8})
    assert heads.attention_config(0) == described
    mixed = HyperMLPConfig(hidden_size=32, num_hidden_layers=2, attention=[described, {"mixer": "softmax"}])
    assert mixed.attention_config(0) == described
    assert mixed.attention_config(1) == HyperConfig(32, mixer="softmax")


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_saved_config_says_everything(mixer, tmp_path):
    config = tiny_config(mixer, eos_token_id=3)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is HyperMLPConfig
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert HyperConfig(**stored["attention"]) == config.attention_config(0)
    assert None not in (stored["attention"]["qk_dim"], stored["intermediate_size"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"hidden_size": 32}, r"attention\.hidden_size=16"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be"),
        ({"attention": {"causal": False}}, "causal"),
        ({"attention": {"qk_dim": 7}}, "qk_dim=7"),
        ({"attention": [{}, {}, {}]}, "num_hidden_layers=2"),
        ({"attention": [{"qk_dim": 8}, {"v_dim": 7}]}, "v_dim"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_attention_of_another_kind_is_an_error():
    for wrong in ("softmax", ["softmax", "softmax"], 3):
        with pytest.raises(TypeError, match="HyperConfig"):
            tiny_config(attention=wrong)
    with pytest.raises(TypeError, match="heads"):
        HyperMLPConfig(attention={"heads": 3})


# Saving and loading


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(mixer, tied, tmp_path):
    model, ids = tiny(mixer, tie_word_embeddings=tied), tokens(2, 9)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is HyperMLPForCausalLM
    assert not any(info.values()), info
    assert again.dtype == torch.float64
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    torch.testing.assert_close(again(ids).logits, model(ids).logits, **EXACT)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is HyperMLPModel
    torch.testing.assert_close(base(ids).last_hidden_state, model.model(ids).last_hidden_state, **EXACT)


def test_loading_starts_what_is_missing_and_keeps_the_rest(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    missing = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.attention.routing_mix.down"}
    save_file({name: x for name, x in state.items() if name not in missing}, file, metadata={"format": "pt"})
    again, info = HyperMLPForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == missing
    for name, x in again.state_dict().items():
        assert torch.equal(x, state[name]) == (name not in missing), name
    assert again.model.layers[1].attention.routing_mix.down.std() < 0.1  # its own start, near 0.02


def test_reinitialised_convolutions_would_be_noticed(tmp_path):
    """``ShortConv`` starts a slice of its weight, which no mark on the weight protects."""
    tiny().save_pretrained(tmp_path)
    careless = mock.patch.object(
        HyperMLPPreTrainedModel,
        "_init_weights",
        lambda self, m: m.reset_parameters() if isinstance(m, ShortConv) else None,
    )
    with careless:
        again = HyperMLPForCausalLM.from_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert not all(torch.equal(x, state[name]) for name, x in again.state_dict().items())


def test_a_new_model_starts_as_the_plain_one():
    torch.manual_seed(0)
    config = LanguageModelConfig(500, 64, 3, HyperConfig(64, max_lag=16))
    plain = LanguageModel(config)
    torch.manual_seed(1)
    new = HyperMLPForCausalLM(HyperMLPConfig.from_language_model(config))
    with torch.device("meta"):
        empty = HyperMLPForCausalLM(new.config)
    from_meta = empty.to_empty(device="cpu")
    from_meta.tie_weights()
    for module in from_meta.modules():  # marks of the first start, on meta
        module._is_hf_initialized = False
    from_meta.initialize_weights()
    names = {"embedding": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm"}
    for model in (new, from_meta):
        state = model.state_dict()
        for name, x in plain.state_dict().items():
            part, _, rest = name.partition(".")
            other = state[f"{names[part]}.{rest}"]
            assert other.std().item() == pytest.approx(x.std().item(), rel=0.35, abs=1e-3), name
            assert other.mean().item() == pytest.approx(x.mean().item(), abs=0.1), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_form_of_a_plain_language_model(tied):
    torch.manual_seed(0)
    plain = LanguageModel(LanguageModelConfig(VOCAB, 16, 2, HyperConfig(16, max_lag=9), tie_embeddings=tied))
    model = HyperMLPForCausalLM.from_language_model(plain, eos_token_id=3)
    ids = tokens(2, 12)
    torch.testing.assert_close(model(ids).logits, plain(ids), **EXACT)
    assert model.num_parameters() == plain.num_parameters()
    assert model.config.eos_token_id == 3
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype, tmp_path):
    model, ids = tiny(dtype=torch.float32), tokens(2, 9)
    model.save_pretrained(tmp_path)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in low.parameters()} == {dtype}
    assert low(ids).logits.dtype == dtype
    assert low.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=PAD).shape == (2, 13)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(tied):
    model, ids = tiny(tie_word_embeddings=tied), tokens(2, 6)
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB + 5)
    assert model.config.vocab_size == VOCAB + 5
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    after = model(ids).logits
    assert after.shape[-1] == VOCAB + 5
    torch.testing.assert_close(after[..., :VOCAB], before, **CLOSE)
    assert model(torch.full((1, 3), VOCAB + 4), labels=torch.full((1, 3), VOCAB + 4)).loss.isfinite()


def test_device_map(tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model, ids = tiny(), tokens(2, 6)
    model.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=str(tmp_path / "o")
    )
    with torch.no_grad():
        torch.testing.assert_close(placed(ids).logits, model(ids).logits, **EXACT)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(placed.generate(ids, **options), model.generate(ids, **options))


def test_a_copy_is_independent():
    model, ids = tiny(), tokens(1, 5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    assert not torch.equal(model(ids).logits, other(ids).logits)


# Forward


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_outputs(mixer, batch):
    model, ids = tiny(mixer), tokens(batch, 7)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, output_attentions=True, labels=ids)
    assert out.logits.shape == (batch, 7, VOCAB)
    assert [h.shape for h in out.hidden_states] == [(batch, 7, 16)] * 3
    assert [a.shape for a in out.attentions] == [(batch, 2, 7, 7)] * 2
    assert isinstance(out.past_key_values, DynamicCache)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss.double(), expected.double(), rtol=1e-6, atol=1e-6)
    assert isinstance(model(ids, return_dict=False), tuple)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:], **CLOSE)
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
            model(ids[:, a:b], mask[:, :b], past_key_values=cache, output_attentions=True).attentions[0]
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
        assert out.past_key_values is None
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
    with pytest.raises(TypeError, match="additive"):
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
    torch.testing.assert_close(again(ids, mask).logits, out.logits, **EXACT)

"""The Hugging Face family's weights: how they start, are saved and loaded, cast, resized and placed."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch

from tests.models.families import ATTENTION, PAD, VOCAB, assert_same_weights, tiny, tokens

from safetensors.torch import load_file, save_file  # isort: skip
from transformers import AutoModel, AutoModelForCausalLM  # isort: skip

from hypermlp.config import HyperConfig
from hypermlp.layers.short_conv import ShortConv
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp.models.huggingface import HyperMLPConfig, HyperMLPForCausalLM, HyperMLPModel, HyperMLPPreTrainedModel

MIXERS = list(ATTENTION)
CLOSE = {"rtol": 0, "atol": 1e-10}


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
    assert_same_weights(again, model)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, **CLOSE)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is HyperMLPModel
    torch.testing.assert_close(base(ids).last_hidden_state, model.model(ids).last_hidden_state, **CLOSE)


def test_loading_starts_what_is_missing_and_keeps_the_rest(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    # copies: what is loaded may be a view of the file, which is written over
    state = {name: x.clone() for name, x in load_file(file).items()}
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
    plain = LanguageModel(LanguageModelConfig(VOCAB, 16, 2, HyperConfig(16, max_lag=9), tie_embeddings=tied)).double()
    model = HyperMLPForCausalLM.from_language_model(plain, eos_token_id=3)
    ids = tokens(2, 12)
    torch.testing.assert_close(model(ids).logits, plain(ids), **CLOSE)
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
        torch.testing.assert_close(placed(ids).logits, model(ids).logits, **CLOSE)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(placed.generate(ids, **options), model.generate(ids, **options))


def test_a_copy_is_independent():
    model, ids = tiny(), tokens(1, 5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    assert not torch.equal(model(ids).logits, other(ids).logits)

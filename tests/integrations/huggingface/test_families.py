"""Every host of transformers: what is proven of each; one of each family in full, the others' longer checks as slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from hypermlp import restore_attention, swap_attention
from hypermlp.integrations.hosts import CLASSES
from hypermlp.integrations.huggingface.names import CACHE_NAME
from hypermlp.integrations.sites import CROSS
from tests.integrations.huggingface import checks, proofs
from tests.integrations.huggingface.families import HOSTS, inputs, skip_if_older, stock, tokens
from tests.integrations.huggingface.proofs import outputs, swapped

# one for each file of adapters and each way of calling attention, quick; and what a config changes
FIRST = {
    "llama", "gemma2", "phi3", "gpt2", "gpt_neo", "gpt_neox", "gptj", "falcon", "falcon_alibi", "codegen",
    "gpt_bigcode", "bloom", "opt", "bert", "esm", "albert", "mpnet", "distilbert", "modernbert", "vit", "dinov3",
    "clip_text", "siglip_vision", "wav2vec2", "bart", "whisper", "t5",
}  # fmt: skip


def _some(*kinds: str, without: tuple[str, ...] = ()) -> list[Any]:
    names = [name for name, case in HOSTS.items() if case.kind in kinds and name not in without]
    return [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in names]


ALL = ("decoder", "encoder", "picture", "sound", "pair")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    checks.quiet()


def test_every_class_that_is_known_is_proven() -> None:
    """Of transformers; the adapters of other libraries have tests of their own."""
    for name in HOSTS:
        skip_if_older(name)
    proven = {site.was for name in HOSTS for site in _sites(name)}
    known = {
        path.rpartition(".")[2] for paths in CLASSES.values() for path in paths if path.startswith("transformers.")
    }
    assert proven == known


def _sites(name: str) -> list[Any]:
    with torch.device("meta"):
        case = HOSTS[name]
        model = getattr(transformers, case.model)(getattr(transformers, case.config)(**case.fields))
    return proofs.find_sites(model)[0]


@pytest.mark.parametrize("name", HOSTS)
def test_values_are_those_of_a_layer_in_place(name: str) -> None:
    proofs.check_values(name)


@pytest.mark.parametrize("name", HOSTS)
def test_softmax_from_attention_is_the_host(name: str) -> None:
    proofs.check_from_attention(name)


@pytest.mark.parametrize("name", _some("decoder", "pair"))
def test_a_cache_changes_nothing(name: str) -> None:
    proofs.check_cache(name)


@pytest.mark.parametrize("name", _some("decoder", "encoder", "pair", "sound", without=("whisper",)))
def test_padding_is_as_if_it_were_not_there(name: str) -> None:
    proofs.check_padding(name)


@pytest.mark.parametrize("name", _some("decoder"))
def test_packed_documents_are_separate(name: str) -> None:
    found = proofs.check_packed(name)
    if Version(transformers.__version__) >= Version("5.24"):
        assert (found == "yes") == (name not in ("bloom", "opt", "biogpt", "bert_decoder"))


@pytest.mark.parametrize("name", _some(*ALL))
def test_saved_and_opened(name: str, tmp_path: Path) -> None:
    proofs.check_saved(name, tmp_path)


@pytest.mark.parametrize("name", _some(*ALL))
def test_every_new_parameter_learns(name: str) -> None:
    proofs.check_trains(name)


@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_cross_attention_stays(name: str) -> None:
    model = stock(name)
    options = {"max_lag": proofs.UNBOUNDED[name]} if name in proofs.UNBOUNDED else {}
    report = swap_attention(model, **options)
    assert len(report.swapped) == 4
    assert [entry.reason for entry in report.left] == [CROSS] * 2
    assert "stays the host's" in str(report)


# a config makes these read both ways, each as transformers lets one
_BY_FIELD = (
    "llama", "phi3", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "codegen", "bloom", "falcon", "opt", "bert_decoder",
    "bart", "t5", "whisper",
)  # fmt: skip
BIDIRECTIONAL: dict[str, dict[str, Any]] = {
    **{name: {"is_causal": False} for name in _BY_FIELD},
    "gemma3": {"use_bidirectional_attention": True, "layer_types": ["full_attention"] * 2},
}


@pytest.mark.parametrize("swap", [False, True], ids=["stock", "swapped"])
@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_a_decoder_made_bidirectional_is_bidirectional(name: str, swap: bool) -> None:
    """As the stock model is: the first token's output follows the last token."""
    model: Any = stock(name, **BIDIRECTIONAL[name])
    if swap:
        options = {"max_lag": proofs.UNBOUNDED[name]} if name in proofs.UNBOUNDED else {}
        assert not any(entry.layer.config.causal for entry in swap_attention(model, **options).swapped)
    given = inputs(name) | ({} if name == "gemma3" else {"use_cache": False})
    key = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    other = given[key].clone()
    other[:, -1] = 4 + (other[:, -1] - 3) % 60
    assert checks.error(outputs(model, given)[:, 0], outputs(model, given | {key: other})[:, 0]) > 1e-3


def test_a_bidirectional_decoder_knows_padding() -> None:
    model: Any = stock("llama", is_causal=False)
    swap_attention(model)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[:, 7:] = 0
    padded, alone = (
        outputs(model, {"input_ids": ids, "attention_mask": mask}),
        outputs(model, {"input_ids": ids[:, :7]}),
    )
    assert checks.error(padded[:, :7], alone) < checks.TOLERANCE


def test_gpt_neo_stays_causal() -> None:
    """It has a triangle of its own, whatever its config says; and so does what stands in its place."""
    assert all(entry.layer.config.causal for entry in swap_attention(stock("gpt_neo", is_causal=False)).swapped)


def test_a_cache_cannot_continue_a_bidirectional_layer() -> None:
    model: Any = stock("llama", is_causal=False)
    swap_attention(model)
    cache = transformers.DynamicCache(config=model.config)
    outputs(model, {"input_ids": tokens(1, 4), CACHE_NAME: cache})
    with pytest.raises(RuntimeError, match="bidirectional layer"):
        outputs(model, {"input_ids": tokens(1, 1), CACHE_NAME: cache})


def test_a_window_on_both_sides_stays_with_the_host() -> None:
    model: Any = stock("gemma3", use_bidirectional_attention=True)
    report = swap_attention(model)
    assert [entry.name for entry in report.swapped] == ["model.layers.1.self_attn"]
    assert "both sides" in report.left[0].reason
    model = stock("modernbert", layer_types=["full_attention", "sliding_attention"], local_attention=4)
    assert [entry.name for entry in swap_attention(model).swapped] == ["model.layers.0.attn"]
    assert outputs(model, inputs("modernbert")).isfinite().all()


def test_a_stack_of_t5_keeps_the_biases_that_its_layers_need() -> None:
    with pytest.raises(ValueError, match="position biases of all its layers"):
        swapped("t5", layers=[0])
    model = swapped("t5", layers=[1, 2, 3])
    assert outputs(model, inputs("t5")).isfinite().all()


@pytest.mark.parametrize("name", ["gpt2", "bart", "t5", "albert", "mpnet", "bloom", "gpt_bigcode"])
def test_maps_are_recorded(name: str) -> None:
    model = swapped(name, host={"attn_implementation": "eager"})
    with torch.no_grad():
        made = model(**inputs(name), output_attentions=True)
    pair = HOSTS[name].kind == "pair"
    maps: tuple[Tensor, ...] = made.decoder_attentions if pair else made.attentions
    length = 7 if pair else 9
    # one attention of ALBERT's is called for three layers
    assert [x.shape for x in maps] == [(2, 2, length, length)] * (3 if name == "albert" else 2)


def test_nothing_is_said_of_a_host_that_does_no_more() -> None:
    assert all(not entry.notes for name in ("llama", "gpt2") for entry in swap_attention(stock(name)).swapped)
    assert not swap_attention(stock("albert", num_hidden_groups=3)).swapped[0].notes


def test_albert_keeps_its_norm_and_is_put_back() -> None:
    model = stock("albert")
    before, norm = outputs(model, inputs("albert")), model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    names = set(model.state_dict())
    report = swap_attention(model)
    assert {"LayerNorm.weight", "LayerNorm.bias"}.isdisjoint(report.swapped[0].gone)
    kept = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.LayerNorm.weight"
    assert kept in names
    assert kept in model.state_dict()
    calls: list[int] = []
    report.swapped[0].layer.register_forward_hook(lambda *_: calls.append(1))
    outputs(model, inputs("albert"))
    assert len(calls) == 3
    restore_attention(model)
    assert type(norm.attention).__name__ == "AlbertAttention"
    assert torch.equal(outputs(model, inputs("albert")), before)


@pytest.mark.parametrize("name", ["bloom", "albert"])
def test_dropout_within_is_kept(name: str) -> None:
    model = swapped(name, host={"hidden_dropout" if name == "bloom" else "hidden_dropout_prob": 0.5})
    for module in model.modules():
        if type(module).__name__.startswith("Hyper") and hasattr(module, "output_dropout"):
            assert module.output_dropout == 0.5
            module.train()
    given = inputs(name)
    assert checks.error(outputs(model, given), outputs(model, given)) > 1e-3


def test_bloom_adds_the_residual_that_its_block_chose() -> None:
    model: Any = swapped("bloom", host={"apply_residual_connection_post_layernorm": True})
    block = model.transformer.h[0]
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    normed = block.input_layernorm(x)
    expected = normed + block.self_attention.mixer(normed)
    assert checks.error(block.self_attention(normed, normed, None, None)[0], expected) < checks.TOLERANCE


def test_attention_that_needs_its_model_says_so() -> None:
    alone = nn.ModuleDict({"attention": stock("bloom").transformer.h[0].self_attention})
    with pytest.raises(ValueError, match="does not know its config"):
        swap_attention(alone, max_lag=9)


def test_lengths_are_those_that_a_model_sees() -> None:
    assert {entry.layer.config.max_lag for entry in swap_attention(stock("siglip_vision")).swapped} == {9}
    assert {entry.layer.config.max_lag for entry in swap_attention(stock("roberta")).swapped} == {63}
    assert {entry.layer.config.max_lag for entry in swap_attention(stock("mpnet")).swapped} == {62}
    assert {entry.layer.config.max_lag for entry in swap_attention(stock("bloom")).swapped} == {64}
    with pytest.raises(ValueError, match="max_lag is missing, and this model does not say"):
        swap_attention(stock("bloom", seq_length=None))
    rows = [entry.layer.config.max_lag for entry in swap_attention(stock("whisper")).swapped]
    assert rows == [20, 20, 64, 64]
    with pytest.raises(ValueError, match="max_lag is missing, and this model does not say"):
        swap_attention(stock("hubert"))
    with pytest.raises(ValueError, match=r"max_lag is missing: this layer is bidirectional.* 32,768"):
        swap_attention(stock("llama", is_causal=False, max_position_embeddings=32768))


def test_a_call_that_its_adapter_does_not_know_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later release may hand over what changes the meaning."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor, sinks: Tensor | None = None) -> None: ...

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(ValueError, match="it is called with sinks, which its adapter does not know"):
        swap_attention(stock("llama"))


# what a config changes of how the projections are read
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, a key for each head": ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "llama, narrow heads": ("llama", {"head_dim": 4}),
    "phi3, a key for each head": ("phi3", {"num_key_value_heads": 4}),
    "granite, scaled": ("granite", {"attention_multiplier": 0.3}),
    "gpt2, scaled by depth": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode, a key for each head": ("gpt_bigcode", {"multi_query": False}),
    "gpt_bigcode, unscaled": ("gpt_bigcode", {"scale_attn_weights": False}),
    "albert, two groups": ("albert", {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2}),
    "esm, learned positions": ("esm", {"position_embedding_type": "absolute"}),
    "bart, other heads in the decoder": ("bart", {"decoder_attention_heads": 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_from_attention(variant: str) -> None:
    name, options = VARIANTS[variant]
    expected = outputs(stock(name, **options), inputs(name))
    model = swapped(name, "softmax", host=options, init="from_attention")
    assert checks.error(outputs(model, inputs(name)), expected) < 1e-5 * max(1.0, float(expected.abs().max()))


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "cohere": ({"use_qk_norm": True}, "q_norm, k_norm"),
    "olmo": ({"clip_qkv": 1.0}, "clip_qkv"),
    "phi": ({"qk_layernorm": True}, "q_layernorm, k_layernorm"),
    "stablelm": ({"qk_layernorm": True}, "q_layernorm, k_layernorm"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_options_that_change_scores_are_refused_from_attention(name: str) -> None:
    options, why = CHANGED[name]
    with pytest.raises(ValueError, match=f"not offered for this host .*{why}"):
        swapped(name, host=options, init="from_attention")
    assert outputs(swapped(name, host=options), inputs(name)).isfinite().all()


@pytest.mark.parametrize("name", ["gpt_neox", "falcon"])
def test_fields_that_a_host_does_not_read_change_nothing(name: str) -> None:
    """Of Llama's kin, whose description these share."""
    model: Any = swapped(name, host={"sliding_window": 5, "clip_qkv": 1.0}, init="from_attention")
    assert torch.equal(outputs(model, inputs(name)), outputs(swapped(name, init="from_attention"), inputs(name)))

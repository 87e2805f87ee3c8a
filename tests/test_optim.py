"""Groups of parameters: what decays, what Muon may take, and that three ways of training use them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from hypermlp import HyperConfig, HyperGLU, parameter_groups, swap_attention
from hypermlp.models import LanguageModel, LanguageModelConfig


def names_of(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{names[id(parameter)] for parameter in group["params"]} for group in groups]


def language_model(tie):
    return LanguageModel(LanguageModelConfig(11, 16, 1, HyperConfig(16, max_lag=8, bias=True), tie_embeddings=tie))


@pytest.mark.parametrize("tie", [True, False])
def test_each_parameter_is_in_one_group(tie):
    model = language_model(tie)
    groups = parameter_groups(model, weight_decay=0.3)
    matrices, heads, tables, others = names_of(model, groups)
    assert len(matrices) + len(heads) + len(tables) + len(others) == len(list(model.parameters()))
    assert matrices | heads | tables | others == {name for name, _ in model.named_parameters()}
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3, 0.0, 0.0]
    assert {name.rpartition(".")[2] for name in matrices} == {"weight"}
    assert heads == (set() if tie else {"head.weight"})
    attention = "blocks.0.attention."
    # two dimensions, and no matrices: taps and diagonals
    assert {attention + name for name in ("k_conv.weight", "v_conv.weight")} <= others
    assert tables == {
        attention + f"{mix}.{name}" for mix in ("routing_mix", "readout_mix") for name in ("diag", "down", "up")
    }
    assert {"embedding.weight", attention + "q_proj.bias"} <= others
    assert {attention + "gate.proj.weight", attention + "o_proj.weight"} <= matrices


def test_what_is_not_trained_is_in_none():
    layer = HyperGLU(16, max_lag=4)
    layer.q_proj.requires_grad_(False)
    named = set().union(*names_of(layer, parameter_groups(layer)))
    assert "q_proj.weight" not in named
    assert "k_proj.weight" in named


def test_a_weight_that_a_head_and_an_embedding_share_does_not_decay():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "inner": nn.Linear(4, 4), "head": nn.Linear(4, 9, bias=False)})
    assert names_of(model, parameter_groups(model)) == [
        {"inner.weight"},
        {"head.weight"},
        set(),
        {"inner.bias", "embed.weight"},
    ]
    model["head"].weight = model["embed"].weight
    assert names_of(model, parameter_groups(model))[1] == set()
    assert "embed.weight" in names_of(model, parameter_groups(model))[3]


def test_inner_matrices_as_wide_as_a_vocabulary_are_no_heads():
    model = LanguageModel(LanguageModelConfig(16, 16, 2, HyperConfig(16, max_lag=8)))
    assert not parameter_groups(model).heads["params"]
    transformers = pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    config = transformers.BertConfig(vocab_size=99, max_position_embeddings=64, tie_word_embeddings=False, **sizes)
    matrices, heads, *_ = names_of(*(lambda m: (m, parameter_groups(m)))(transformers.BertForMaskedLM(config)))
    assert heads == {"cls.predictions.decoder.weight"}
    assert "bert.encoder.layer.0.attention.self.query.weight" in matrices


def test_pruned_and_parametrised_matrices_decay():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    prune.random_unstructured(model[0], "weight", 0.5)
    parametrizations.weight_norm(model[1])
    matrices = names_of(model, parameter_groups(model))[0]
    assert matrices == {"0.weight_orig", "1.parametrizations.weight.original1"}


def test_further_heads():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    assert names_of(model, parameter_groups(model, heads=[model[1]]))[1] == {"1.weight"}
    with pytest.raises(ValueError, match="no modules of Sequential"):
        parameter_groups(model, heads=[nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="must be linear layers, got ReLU"):
        parameter_groups(model, heads=[nn.ReLU()])


@pytest.mark.parametrize("decay", [-0.1, float("nan"), float("inf")])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match="must be >= 0 and finite"):
        parameter_groups(nn.Linear(2, 2), weight_decay=decay)


def test_parameters_in_place_of_a_model():
    with pytest.raises(TypeError, match="not its parameters"):
        parameter_groups(nn.Linear(2, 2).parameters())


def test_a_swapped_gpt2():
    transformers = pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    swap_attention(model, "hyperglu")
    matrices, heads, tables, others = names_of(model, parameter_groups(model))
    assert "transformer.h.0.mlp.c_fc.weight" in matrices  # a Conv1D of theirs
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= others
    assert not heads
    assert any(name.endswith("routing_mix.up") for name in tables)


def test_muon_and_adamw_train_together():
    torch.manual_seed(0)
    model = language_model(tie=False)
    groups = parameter_groups(model)
    optimizers = [
        torch.optim.Muon([groups.matrices], lr=0.02),
        torch.optim.AdamW([groups.heads, groups.tables, groups.others], lr=0.01),
    ]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tokens = torch.randint(11, (2, 8))
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_they_are_printed_by_name():
    config = LanguageModelConfig(11, 16, 2, HyperConfig(16, max_lag=8))
    model = LanguageModel(config)
    groups = parameter_groups(model, weight_decay=0.3)
    for group, names in zip(groups, groups.names, strict=True):
        assert [id(model.get_parameter(name)) for name in names] == [id(p) for p in group["params"]]
    lines = str(groups).splitlines()
    count = sum(p.numel() for p in groups.matrices["params"])
    assert lines[:3] == [
        "ParameterGroups(",
        f"  matrices: {count:,} numbers, weight_decay=0.3",
        "    blocks.*.attention.q_proj.weight (2)",
    ]
    assert "    embedding.weight" in lines
    assert "tensor" not in str(groups)
    assert groups._replace(heads=groups.heads) == groups
    slower = groups._replace(tables={**groups.tables, "lr": 1e-4}, others={"params": []})
    assert slower.names == (*groups.names[:3], ())
    assert "matrices" in str(groups._replace(heads=groups.heads))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT itself
def test_a_head_that_peft_holds_is_a_head():
    transformers = pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra")
    peft = pytest.importorskip("peft", reason="adapters need peft")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32)
    config.tie_word_embeddings = False
    model = transformers.GPT2LMHeadModel(config)
    swap_attention(model, "hyperglu")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["lm_head"]))
    groups = parameter_groups(adapted)
    assert [name.partition("lm_head.")[2] for name in groups.names[1]] == ["modules_to_save.default.weight"]
    assert groups.matrices["params"]


def test_adapters_of_a_head_are_with_it():
    peft = pytest.importorskip("peft", reason="adapters need peft")
    adapted = peft.get_peft_model(language_model(tie=False), peft.LoraConfig(r=2, target_modules=["head", "k_proj"]))
    groups = parameter_groups(adapted)
    assert [name.partition("head.")[2] for name in groups.names[1]] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]
    assert all(".k_proj." in name for name in groups.names[0])


def test_an_optimizer_writes_into_its_own_groups_alone():
    model = language_model(tie=False)
    torch.optim.AdamW(parameter_groups(model), lr=1e-3)
    muon = torch.optim.Muon([parameter_groups(model).matrices], lr=0.02)
    assert muon.param_groups[0]["lr"] == 0.02

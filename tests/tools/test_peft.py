"""Low-rank adapters of parameters that belong to no linear layer (PEFT's ``target_parameters``)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hypermlp import parameter_groups, swap_attention
from hypermlp.models import next_token_loss
from tests.helpers import assert_close
from tests.tools.models import language_model, runs, shake, tokens

peft = pytest.importorskip("peft", reason="the extra test has peft")

TARGETS = {
    "tables": ["routing_mix.down", "routing_mix.up", "readout_mix.down", "readout_mix.up"],
    "diagonals": ["routing_mix.diag", "readout_mix.diag"],
    "convolutions": ["k_conv.weight", "v_conv.weight"],
    "embedding": ["embedding.weight"],
    "all": ["routing_mix.diag", "routing_mix.down", "readout_mix.up", "k_conv.weight", "v_conv.weight"],
}


def adapted(targets: list[str], **options: object) -> nn.Module:
    """The model with adapters that change what it computes."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=targets)
    model = peft.inject_adapter_in_model(config, language_model(**options))
    torch.manual_seed(2)
    for name, module in model.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            shake(module)
    return model


def merged(model: nn.Module) -> nn.Module:
    """A copy whose parameters hold what their adapters add, without any wrapper."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "ParamWrapper" and not name.endswith("base_layer"):
            parent, _, last = name.rpartition(".")
            made = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            setattr(model.get_submodule(parent), last, made)
    return model


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("options", [{}, {"mix_rank": 0}, {"num_heads": 1, "gate_activation": "identity"}], ids=str)
def test_merged_equals_the_adapter(targets: str, options: dict[str, object]) -> None:
    names = [name for name in TARGETS[targets] if options.get("mix_rank", 3) or not name.endswith(("down", "up"))]
    if not names:
        return
    model, ids = adapted(names, **options), tokens(2, 10)
    found, plain = runs(model, ids), language_model(**options)
    whole = merged(model)
    assert whole.state_dict().keys() == plain.state_dict().keys()
    assert not torch.allclose(found["whole"], runs(plain, ids)["whole"])
    assert_close(found, runs(whole, ids))
    for step in (found["growing"], found["static"]):
        torch.testing.assert_close(step, found["whole"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_learn_as_their_parameters_would(targets: str) -> None:
    """Their gradients, by the chain rule from those of the merged parameters."""
    model = adapted(TARGETS[targets])
    whole, ids = merged(model).requires_grad_(True), tokens(2, 10)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        next_token_loss(model(ids[:, :-1]), ids[:, 1:]).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found, of_merged = gradients(model), gradients(whole)
    seen = 0
    for name, module in model.named_modules():
        if type(module).__name__ != "ParamWrapper":
            continue
        parameter = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        delta = module.get_delta_weight("default")
        inner = [module.lora_A["default"].weight, module.lora_B["default"].weight]
        expected = torch.autograd.grad(delta, inner, of_merged[parameter])
        names = (f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight")
        for key, gradient in zip(names, expected, strict=True):
            assert gradient.any(), key
            torch.testing.assert_close(found[key], gradient, rtol=1e-6, atol=1e-9)
            seen += 1
    assert seen == 2 * len(TARGETS[targets]) * (1 if targets == "embedding" else 2)
    assert all("lora" in key for key in found), "the base stays as it is"


# of which group the adapters of a parameter, and of the layer called so, are
KINDS = {
    "tables": (["routing_mix.diag", "routing_mix.down", "routing_mix.up"], []),
    "others": (["k_conv.weight", "embedding.weight"], []),
    "matrices": (["o_proj.weight"], ["q_proj"]),
}


@pytest.mark.parametrize("adapters", [("default",), ("default", "second")])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_of_the_kind_that_they_adapt(kind: str, adapters: tuple[str, ...]) -> None:
    """The rows of a table's adapter are no matrix that Muon could take, nor do they decay."""
    parameters, modules = KINDS[kind]
    model = language_model()
    for name in adapters:
        config = peft.LoraConfig(r=2, target_modules=modules, target_parameters=parameters)
        model = peft.inject_adapter_in_model(config, model, adapter_name=name)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    groups = parameter_groups(model)
    found = {field: len(group["params"]) for field, group in zip(groups._fields, groups, strict=True)}
    each = sum(("lora_A.default" in name) for name, _ in model.named_parameters())
    assert each >= len(parameters) + len(modules)
    assert found == {**dict.fromkeys(groups._fields, 0), kind: 2 * each * len(adapters)}
    decays = getattr(groups, kind)["weight_decay"]
    assert (decays > 0) == (kind == "matrices")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT itself
def test_all_linear_and_parameters_together_fail_on_gpt2() -> None:
    """Whose MLPs are ``Conv1D``; with the modules named both are there."""
    transformers = pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra")
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}

    def model(parameter: str, modules: str | list[str], swap: bool) -> nn.Module:
        made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        if swap:
            swap_attention(made, mix_rank=4)
        config = peft.LoraConfig(r=2, target_modules=modules, target_parameters=[parameter])
        return peft.get_peft_model(made, config)

    for parameter, swap in (("wpe.weight", False), ("routing_mix.down", True)):
        with pytest.raises(ValueError, match="fan_in_fan_out"):
            model(parameter, "all-linear", swap)
    adapted = model("routing_mix.down", ["q_proj", "o_proj"], True)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(names) == 6
    assert all("lora" in name for name in names)

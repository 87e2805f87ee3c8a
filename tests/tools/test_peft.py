"""Low-rank adapters of parameters that belong to no linear layer (PEFT's ``target_parameters``)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

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

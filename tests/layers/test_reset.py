"""Starting afresh module by module, as FSDP and Lightning do, is the model's own start, in any order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hypermlp import HyperConfig, build_layer
from hypermlp.layers.block import TransformerBlock
from hypermlp.models import LanguageModel, LanguageModelConfig

MIXERS = ["hyperglu", "hypermlp", "relu", "softmax"]


def config(mixer: str) -> HyperConfig:
    return HyperConfig(96, 2, mixer, max_lag=64, conv_size=4, q_gate=True, output_gate=True, bias=True)


BUILD: dict[str, Callable[..., nn.Module]] = {
    "layer": lambda mixer, **place: build_layer(config(mixer), **place),
    "block": lambda mixer, **place: TransformerBlock(config(mixer), 128, num_layers=8, **place),
    "tied": lambda mixer, **place: LanguageModel(LanguageModelConfig(200, 96, 2, config(mixer)), **place),
    "untied": lambda mixer, **place: LanguageModel(
        LanguageModelConfig(200, 96, 2, config(mixer), tie_embeddings=False), **place
    ),
}


def parents_first(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def children_first(model: nn.Module) -> None:
    for module in reversed(list(model.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def owners_alone(model: nn.Module) -> None:
    """As FSDP does: those that hold parameters themselves."""
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()


ORDERS = [parents_first, children_first, owners_alone, lambda model: model.reset_parameters()]


def statistics(x: Tensor) -> list[float]:
    return [x.mean().item(), x.std().item(), *((x[..., -1].mean().item(),) if x.ndim > 1 else ())]


@pytest.mark.parametrize("order", ORDERS, ids=["parents first", "children first", "owners alone", "the model's own"])
@pytest.mark.parametrize("what", BUILD)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_order_gives_the_same_start(what: str, mixer: str, order: Callable[[nn.Module], None]) -> None:
    fresh = BUILD[what](mixer)
    model = BUILD[what](mixer, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    order(model)
    for (name, parameter), expected in zip(model.named_parameters(), fresh.parameters(), strict=True):
        spread = expected.std().item() + 1e-9
        found, wanted = (torch.tensor(statistics(x.detach())) for x in (parameter, expected))
        assert found[1].item() == pytest.approx(wanted[1].item(), rel=0.25, abs=1e-9), name
        few = 6 * spread / parameter.shape[0] ** 0.5  # means of as few entries as there are rows
        torch.testing.assert_close(found, wanted, rtol=0.25, atol=few, msg=lambda text, name=name: f"{name}: {text}")


def test_the_start_is_as_documented() -> None:
    block = TransformerBlock(config("hyperglu"), 128, num_layers=8)
    width = block.attention.config.qk_width
    stds = {
        "attention.q_proj": (96 * width) ** -0.5, "attention.k_proj": 96**-0.5, "attention.o_proj": (96 * 16) ** -0.5,
        "mlp.up_proj": 96**-0.5, "mlp.down_proj": (128 * 16) ** -0.5,
    }  # fmt: skip
    for name, std in stds.items():
        assert block.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.06), name


class Wrapper(nn.Module):
    """Hands on calls and nothing else, as DDP does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.module(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*script_method")
@pytest.mark.parametrize("wrap", [Wrapper, checkpoint_wrapper, torch.compile], ids=["plain", "checkpoint", "compile"])
def test_wrapped_blocks_start_afresh(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = BUILD["tied"]("hyperglu")
    for index, block in enumerate(model.blocks):
        model.blocks[index] = wrap(block)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    q_proj = next(module for name, module in model.named_modules() if name.endswith("attention.q_proj"))
    assert q_proj.weight.std().item() == pytest.approx((96 * config("hyperglu").qk_width) ** -0.5, rel=0.1)

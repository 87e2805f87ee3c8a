"""``torch.nn.utils.prune``, parametrisations and weight norm: what computes a parameter at every call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from hypermlp.models import LanguageModel
from tests.helpers import assert_close
from tests.tools.models import language_model, runs, tokens

# every kind of parameter that is no plain linear layer's
PARTS = [
    *((f"blocks.0.attention.{mix}_mix", table) for mix in ("routing", "readout") for table in ("diag", "down", "up")),
    *((f"blocks.1.attention.{conv}", "weight") for conv in ("k_conv", "v_conv", "q_proj")),
    ("blocks.1.attention.gate.proj", "weight"),
    ("embedding", "weight"),
]


def each(model: nn.Module, change: Callable[[nn.Module, str], object]) -> None:
    for path, name in PARTS:
        change(model.get_submodule(path), name)


def masked(parameter: Tensor) -> Tensor:
    """A fixed half of a parameter's entries."""
    kept = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) < 0.5
    return kept.to(parameter)


def pruned(model: nn.Module) -> None:
    each(model, lambda module, name: prune.custom_from_mask(module, name, masked(getattr(module, name))))


def train(model: LanguageModel, project: Callable[[], None] = lambda: None) -> list[float]:
    """Losses of three steps; ``project`` is called after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, losses = tokens(2, 9), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        project()
        losses.append(loss.item())
    return losses


def test_a_pruned_model_trains_as_one_whose_entries_are_held_at_zero() -> None:
    model, plain = language_model(), language_model()
    pruned(model)
    masks = {(path, name): masked(plain.get_submodule(path).get_parameter(name)) for path, name in PARTS}

    @torch.no_grad()
    def project() -> None:
        for (path, name), mask in masks.items():
            plain.get_submodule(path).get_parameter(name).mul_(mask)

    project()
    # entries of the pruned model's originals that are masked have no gradient, so plain descent leaves them alone
    assert train(model) == pytest.approx(train(plain, project), rel=1e-12)
    ids = tokens(2, 10, seed=2)
    assert_close(runs(model, ids), runs(plain, ids))
    each(model, prune.remove)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert_close(runs(model, ids), runs(plain, ids))


def test_a_pruned_model_uses_the_state_dict_that_it_loads() -> None:
    model, other = language_model(), language_model(mix_rank=3)
    pruned(model)
    runs(model, tokens(2, 10))  # what the hooks have made now is of the old weights
    pruned(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model.load_state_dict(other.state_dict())
    expected = language_model()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.mul_(1.5)
            if tuple(name.rpartition(".")[::2]) in PARTS:
                parameter.mul_(masked(parameter))
    ids = tokens(2, 10, seed=2)
    assert_close(runs(model, ids), runs(expected, ids))


@torch.no_grad()
def assert_equal_to_what_it_computes(model: LanguageModel, ids: Tensor) -> None:
    """To a plain model that holds what the last call has computed."""
    found, plain = runs(model, ids), language_model()
    for name, parameter in plain.named_parameters():
        path, _, last = name.rpartition(".")
        parameter.copy_(getattr(model.get_submodule(path), last))
    assert_close(found, runs(plain, ids))


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_parametrised_parameters_are_those_that_are_used() -> None:
    model, plain = language_model(), language_model()
    each(model, lambda module, name: parametrize.register_parametrization(module, name, Halved()))
    with torch.no_grad():
        each(plain, lambda module, name: getattr(module, name).div_(2))
    ids = tokens(2, 10)
    assert_close(runs(model, ids), runs(plain, ids))
    losses = train(model)
    assert losses[-1] < losses[0]
    assert_equal_to_what_it_computes(model, ids)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*")
@pytest.mark.parametrize("weight_norm", [nn.utils.weight_norm, parametrizations.weight_norm], ids=["hook", "new"])
def test_weight_norm_computes_the_same_and_trains(weight_norm: Callable[..., nn.Module]) -> None:
    model, plain = language_model(), language_model()
    each(model, lambda module, name: weight_norm(module, name) if not name.startswith("diag") else None)
    ids = tokens(2, 10)
    assert_close(runs(model, ids), runs(plain, ids))
    losses = train(model)
    assert losses[-1] < losses[0]
    assert_equal_to_what_it_computes(model, ids)

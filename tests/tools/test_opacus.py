"""Opacus' per-sample gradients are those of the samples one at a time, for every parameter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermlp import HyperCache
from hypermlp.integrations.opacus import give_per_sample_gradients
from tests.helpers import assert_close
from tests.tools.models import language_model, tokens

opacus = pytest.importorskip("opacus", reason="the extra test has opacus")
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "untied head, biases": {"tied": False, "bias": True},
    "hypermlp, rotary": {"mixer": "hypermlp", "rope": True, "qk_dim": 8},
    "no low-rank term": {"mix_rank": 0},
    "no gates, no convolutions": {"q_gate": False, "output_gate": False, "conv_size": 0},
    "one mixing": {"routing_mix": False},
    "baseline": {"mixer": "relu", "conv_size": 4, "q_gate": True},
}


def loss_of(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    targets = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    # each sample's own mean, so that a sample's loss is the same alone and in a batch
    logits = model(ids[:, :-1], None if mask is None else mask[:, :-1])
    return torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, targets, strict=True)]).mean()


def one_at_a_time(model: nn.Module, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    rows = []
    for row in range(len(ids)):
        at = slice(row, row + 1)
        loss = loss_of(model, ids[at], None if mask is None else mask[at])
        names, parameters = zip(*model.named_parameters(), strict=True)
        rows.append(torch.autograd.grad(loss, parameters))
    return {name: torch.stack(grads) for name, *grads in zip(names, *rows, strict=True)}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_per_sample_gradients(options: str, padded: bool) -> None:
    model = language_model(**OPTIONS[options])
    ids, mask = tokens(3, 9), None
    if padded:
        mask = torch.ones(3, 9, dtype=torch.long)
        mask[1, :4] = 0
    expected = one_at_a_time(model, ids, mask)
    made = opacus.GradSampleModule(give_per_sample_gradients(copy.deepcopy(model)))
    loss_of(made, ids, mask).backward()
    found = {name.removeprefix("_module."): p.grad_sample for name, p in made.named_parameters()}
    assert_close(found, expected)
    sums = {name.removeprefix("_module."): p.grad for name, p in made.named_parameters()}
    assert_close(sums, {name: grad.mean(0) for name, grad in expected.items()})


def test_private_training_and_then_generation() -> None:
    model = give_per_sample_gradients(language_model())
    assert give_per_sample_gradients(model) is model, "a second call changes nothing"
    data = torch.utils.data.TensorDataset(tokens(8, 9))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    private, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
        noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=False,
    )  # fmt: skip
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for (ids,) in loader:
        optimizer.zero_grad()
        loss_of(private, ids, None).backward()
        optimizer.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    plain, ids = language_model(), tokens(2, 10)
    plain.load_state_dict(private._module.state_dict())
    cache = HyperCache()
    with torch.no_grad():
        parts = [private(part, cache=cache) for part in ids.split([6, 2, 1, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), plain(ids))


def test_packed_samples_are_refused() -> None:
    model = give_per_sample_gradients(language_model())
    with pytest.raises(ValueError, match="cu_seqlens packs several samples"):
        model(tokens(1, 8), cu_seqlens=torch.tensor([0, 3, 8]))

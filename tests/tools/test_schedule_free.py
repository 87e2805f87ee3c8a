"""Schedule-free AdamW: its steps on hyper layers, by the groups that decay, and what evaluation must see."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypermlp import parameter_groups
from hypermlp.generation import generate
from hypermlp.models import LanguageModel
from tests.helpers import assert_close
from tests.tools.models import language_model, tokens

schedulefree = pytest.importorskip("schedulefree", reason="make test-tools has schedulefree")

# no smaller eps: gradients that are rounding alone would be divided by their own size
LR, BETA, BETA2, EPS, DECAY = 0.03, 0.9, 0.999, 1e-4, 0.2


def gradients(model: LanguageModel, step: int) -> list[Tensor]:
    ids = tokens(2, 10, seed=step)
    model.zero_grad()
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def optimizer_of(model: nn.Module) -> Any:
    return schedulefree.AdamWScheduleFree(parameter_groups(model, weight_decay=DECAY), lr=LR, eps=EPS)


def by_equations(model: LanguageModel, steps: int) -> dict[str, Tensor]:
    """Averages ``x`` after ``steps``: gradients at ``y = (1 - beta) z + beta x``, which an Adam step moves ``z`` by."""
    decays = {id(p): g["weight_decay"] for g in parameter_groups(model, weight_decay=DECAY) for p in g["params"]}
    parameters = list(model.parameters())
    z, x = ([p.detach().clone() for p in parameters] for _ in range(2))
    second = [torch.zeros_like(p) for p in parameters]
    for k in range(steps):
        with torch.no_grad():
            for p, zi, xi in zip(parameters, z, x, strict=True):
                p.copy_((1 - BETA) * zi + BETA * xi)
        for i, gradient in enumerate(gradients(model, k)):
            second[i] = BETA2 * second[i] + (1 - BETA2) * gradient**2
            denominator = (second[i] / (1 - BETA2 ** (k + 1))).sqrt() + EPS
            y = parameters[i].detach()
            z[i] = z[i] - LR * (gradient / denominator + decays[id(parameters[i])] * y)
            x[i] = x[i] + (z[i] - x[i]) / (k + 1)
    return dict(zip((name for name, _ in model.named_parameters()), x, strict=True))


@pytest.mark.parametrize("mixer", ["hyperglu", "hypermlp"])
def test_steps_are_those_of_its_equations(mixer: str) -> None:
    model, like = (language_model(mixer=mixer) for _ in range(2))
    optimizer = optimizer_of(model)
    optimizer.train()
    for step in range(4):
        gradients(model, step)
        optimizer.step()
    optimizer.eval()
    assert_close(dict(model.named_parameters()), by_equations(like, 4), 1e-9)


def test_it_goes_on_after_saving_and_evaluates_the_average() -> None:
    model, like = language_model(), language_model()
    for each, interrupted in ((model, True), (like, False)):
        optimizer = optimizer_of(each)
        for step in range(4):
            optimizer.train()
            if interrupted and step == 2:
                optimizer.eval()
                file = io.BytesIO()
                torch.save({"model": each.state_dict(), "optimizer": optimizer.state_dict()}, file)
                file.seek(0)
                saved = torch.load(file)
                nn.init.zeros_(each.embedding.weight)
                optimizer = optimizer_of(each)
                each.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                optimizer.train()
            gradients(each, step)
            optimizer.step()
        while_training = generate(each, tokens(1, 3), 6, temperature=0.0)
        trained = each.embedding.weight.detach().clone()
        optimizer.eval()
        assert not torch.equal(trained, each.embedding.weight), "what is trained is not what is evaluated"
        assert while_training.shape == generate(each, tokens(1, 3), 6, temperature=0.0).shape
    assert_close(dict(model.named_parameters()), dict(like.named_parameters()), 1e-9)

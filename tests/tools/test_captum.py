"""Captum on language models, on layers and on a swapped GPT-2: attributions that are those made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers import assert_close
from tests.tools.models import language_model, tokens

attr = pytest.importorskip("captum.attr", reason="make test-tools has captum", exc_type=ImportError)

# Captum's own advice about leaves and hooks
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
RTOL = 1e-9
# Captum rounds the weights of the steps to float32
STEPS_RTOL = 1e-6
TARGET = torch.tensor([3, 5])


def integrated(f: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, steps: int) -> Tensor:
    """Gradients along the straight line from ``baseline``, weighed as Gauss and Legendre have it."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(x)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        point = (baseline + node * (x - baseline)).requires_grad_()
        total += weight * torch.autograd.grad(f(point).sum(), point)[0]
    return (x - baseline) * total


@pytest.mark.parametrize("mixer", ["hyperglu", "hypermlp"])
def test_integrated_gradients_of_a_language_model(mixer: str) -> None:
    model = language_model(mixer=mixer, tied=False).eval()
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False

    def score(ids: Tensor, mask: Tensor) -> Tensor:
        return model(ids, mask)[:, -1].log_softmax(-1)

    method = attr.LayerIntegratedGradients(score, model.embedding)
    found = method.attribute(ids, torch.zeros_like(ids), TARGET, (mask,), n_steps=100)

    def from_embedding(hidden: Tensor) -> Tensor:
        with model.embedding.register_forward_hook(lambda *_: hidden):
            return score(ids, mask).gather(1, TARGET[:, None])[:, 0]

    with torch.no_grad():
        hidden, baseline = model.embedding(ids), model.embedding(torch.zeros_like(ids))
    expected = integrated(from_embedding, hidden, baseline, 100)
    assert_close({"attribution": found}, {"attribution": expected}, STEPS_RTOL)
    assert not found[0, :3].any(), "padding has a part"
    assert found[0, 3:].abs().sum() > 1e-3


@pytest.mark.parametrize("norm", [False, True])
def test_gradients_along_a_line_add_up_but_for_the_jumps_of_the_norm(norm: bool) -> None:
    """A row of one active score is of length 1 however small the score is, and of none it is zero."""
    model, ids = language_model(tied=False, norm=norm).eval(), tokens(2, 9)
    method = attr.LayerIntegratedGradients(lambda ids: model(ids)[:, -1].log_softmax(-1), model.embedding)
    _, missing = method.attribute(ids, torch.zeros_like(ids), TARGET, n_steps=300, return_convergence_delta=True)
    assert (float(missing.abs().max()) > 0.1) == norm
    assert norm or float(missing.abs().max()) < 0.01


def test_removing_tokens() -> None:
    """Ablation by tokens, and Shapley values whose sum is the whole difference."""
    layer = language_model().blocks[0].attention.eval()
    x = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_token = torch.arange(6)[None, :, None].repeat(1, 1, 8)

    def f(x: Tensor) -> Tensor:
        return layer(x)[:, -1, 2]

    with torch.no_grad():
        found = attr.FeatureAblation(f).attribute(x, feature_mask=by_token)
        for token in range(6):
            without = x.clone()
            without[:, token] = 0
            assert_close({"token": found[:, token, 0]}, {"token": f(x) - f(without)}, RTOL)
        shares = attr.ShapleyValueSampling(f).attribute(x, feature_mask=by_token, n_samples=3)
        # in float32, which Captum sums in
        torch.testing.assert_close(shares[:, :, 0].sum(1).double(), f(x) - f(torch.zeros_like(x)), rtol=1e-5, atol=1e-5)


def test_a_swapped_gpt2() -> None:
    hosts = pytest.importorskip("tests.integrations.huggingface.hosts", reason="needs the hf extra")
    model: Any = hosts.swapped("gpt2")
    ids = hosts.tokens(2, 7)
    wte = model.transformer.wte

    def score(ids: Tensor) -> Tensor:
        scores: Tensor = model(ids, use_cache=False).logits[:, -1].log_softmax(-1)
        return scores

    def from_embedding(hidden: Tensor) -> Tensor:
        with wte.register_forward_hook(lambda *_: hidden):
            return score(ids).gather(1, TARGET[:, None])[:, 0]

    found = attr.LayerIntegratedGradients(score, wte).attribute(ids, torch.zeros_like(ids), TARGET, n_steps=20)
    with torch.no_grad():
        hidden, baseline = wte(ids), wte(torch.zeros_like(ids))
    expected = integrated(from_embedding, hidden, baseline, 20)
    assert_close({"attribution": found}, {"attribution": expected}, STEPS_RTOL)


class Last(nn.Module):
    """DeepLift and its kin want a module."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)[:, -1]
        return out


def test_deep_lift_is_input_times_gradient() -> None:
    """It has rules for modules of nonlinearities, and hyper layers have none that it would know."""
    model = Last(language_model().blocks[0].attention.eval())
    x = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, missing = attr.DeepLift(model).attribute(x, torch.zeros_like(x), 2, return_convergence_delta=True)
    assert_close({"attribution": found}, {"attribution": attr.InputXGradient(model).attribute(x, 2)}, RTOL)
    assert float(missing.abs().max()) > 1e-2


def test_a_tied_embedding_is_two_calls() -> None:
    """Captum takes the last call of a layer, which is the head's."""
    ids = tokens(2, 9)
    found = {}
    for tied in (True, False):
        model = language_model(tied=tied).eval()
        method = attr.LayerGradientXActivation(lambda ids, model=model: model(ids)[:, -1], model.embedding)
        found[tied] = tuple(method.attribute(ids, TARGET).shape)
    assert found == {True: (2, 9, 13), False: (2, 9, 8)}

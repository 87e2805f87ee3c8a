"""Numbers of maps against loops over all that is visible."""

from __future__ import annotations

import math

import pytest
import torch

from hypermlp import inspect
from tests.helpers import error
from tests.inspect.cases import LAYERS, LENGTH, SOFTMAX, TOKENS, call, case_of, columns, make

CASES = [("glu, window", "padded"), ("glu, both ways", "padded"), ("mlp, by position", "packed"), ("relu", "all")]
CASES += [("mlp, no norm, parts", "padded"), ("softmax, window", "padded")]


def made_of(kind: str, tokens: str):
    made = call(make(**(LAYERS | SOFTMAX)[kind]), tokens)
    return inspect.head_maps(made), columns(made, case_of(made))


@pytest.mark.parametrize(("kind", "tokens"), CASES)
def test_shares_and_reach(kind: str, tokens: str) -> None:
    maps, cells = made_of(kind, tokens)
    share, by_distance = inspect.active_share(maps), inspect.active_share_by_distance(maps)
    assert (share is None) == (by_distance is None) == (maps.active is None)
    negative, reach = inspect.negative_share(maps), inspect.reach(maps)
    for head in range(maps.weights.shape[1]):
        weights = [float(maps.weights[b, head, i, column]) for b, i, _, column in cells]
        total = sum(map(abs, weights))
        assert math.isclose(negative.by_number[head], sum(w < 0 for w in weights) / len(weights), rel_tol=1e-6)
        expected = sum(-w for w in weights if w < 0) / total
        assert math.isclose(negative.by_weight[head], expected, rel_tol=1e-9, abs_tol=1e-12)
        if share is not None and by_distance is not None:
            on = [bool(maps.active[b, head, i, column] > 0) for b, i, _, column in cells]
            assert math.isclose(share[head], sum(on) / len(on), rel_tol=1e-6)
            for distance in range(LENGTH):
                at = [x for x, (_, i, key, _) in zip(on, cells, strict=True) if abs(i - key) == distance]
                found = float(by_distance[head, distance])
                assert math.isclose(found, sum(at) / len(at)) if at else math.isnan(found)
        _check_reach(maps, cells, reach, head)


def _check_reach(maps, cells, reach, head):
    """Mean over tokens of each one's shares of absolute weight."""
    rows: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for b, i, key, column in cells:
        rows.setdefault((b, i), []).append((abs(i - key), abs(float(maps.weights[b, head, i, column]))))
    shares, count = [0.0] * LENGTH, 0
    for row in rows.values():
        if total := sum(size for _, size in row):
            count += 1
            for distance, size in row:
                shares[distance] += size / total
    shares = [x / count for x in shares]
    assert error(reach.by_distance[head], torch.tensor(shares)) < 1e-6
    assert math.isclose(reach.mean[head], sum(d * x for d, x in enumerate(shares)), rel_tol=1e-6)
    for found, part in ((reach.half[head], 0.5), (reach.most[head], 0.9)):
        assert sum(shares[: int(found) + 1]) >= part > sum(shares[: int(found)])


def test_softmax_has_no_negative_weights_and_hyper_layers_do() -> None:
    maps, _ = made_of("softmax", "padded")
    assert not any(y.any() for y in inspect.negative_share(maps))
    assert inspect.rank_use(maps) == inspect.mix_responses(maps) == (None, None)
    assert all(y.any() for y in inspect.negative_share(made_of("glu, window", "padded")[0]))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", ["glu, window", "mlp, by position", "mlp, no norm, parts", "mlp, one mixing"])
def test_ranks_and_responses(kind: str, tokens: str) -> None:
    maps, cells = made_of(kind, tokens)
    seen = sorted({(b, i) for b, i, _, _ in cells})
    pairs = zip((maps.z1, maps.z2), (maps.routing_mix, maps.readout_mix), strict=True)
    for (z, mix), use, response in zip(pairs, inspect.rank_use(maps), inspect.mix_responses(maps), strict=True):
        assert (mix is None) == (response is None)
        assert (z is None) == (use is None)
        if mix is None or response is None:
            continue
        n = maps.visible.shape[-1]
        heads = (mix.diag if mix.down is None else mix.down).shape[0]
        expected = torch.full((heads, n), float(mix.identity), dtype=torch.float64)
        expected += 0 if mix.diag is None else mix.diag[:, :n].detach()
        assert error(response.diag, expected) < 1e-12
        if z is None or use is None:
            assert response[1] is response.read is response.written is None
            continue
        assert mix.core is not None
        core = torch.stack([mix.core[b, i] for b, i in seen]).mean(0)
        down, up = mix.down[:, :n].detach(), mix.up[:, :n].detach()
        assert error(response.low_rank, torch.einsum("hlr,hr,hmr->hlm", down, core, up)) < 1e-12
        assert error(response.read, response.low_rank.square().sum(2).sqrt()) < 1e-12
        assert error(response.written, response.low_rank.square().sum(1).sqrt()) < 1e-12
        read = sum(z[b, i].square() for b, i in seen) / len(seen)
        added = sum((mix.core[b, i] * z[b, i] * up[:, c]).square() for b, i, _, c in cells) / len(cells)
        assert error(use.read, read) < 1e-10
        assert error(use.added, added) < 1e-10


def test_padding_changes_no_number() -> None:
    """A row padded on the left counts like the row alone."""
    layer = make(**LAYERS["glu, biases"])
    whole = call(layer)
    alone = whole._replace(hidden_states=whole.hidden_states[:1, 3:])
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    mask[:, :3] = False
    padded = inspect.head_maps(whole._replace(hidden_states=whole.hidden_states[:1], attention_mask=mask))
    other = inspect.head_maps(alone)
    for function in (inspect.active_share, inspect.negative_share, inspect.rank_use):
        assert _close(function(padded), function(other))
    for x, y in zip(inspect.reach(padded), inspect.reach(other), strict=True):
        assert error(x[..., : LENGTH - 3], y) < 1e-9
    for x, y in zip(inspect.mix_responses(padded), inspect.mix_responses(other), strict=True):
        assert error(x.diag[:, : LENGTH - 3], y.diag) < 1e-12
        assert error(x.low_rank[:, : LENGTH - 3, : LENGTH - 3], y.low_rank) < 1e-12


def _close(x, y) -> bool:
    if isinstance(x, tuple):
        return all(map(_close, x, y))
    return torch.allclose(x, y, rtol=1e-6)


def test_a_head_that_reads_nothing_has_no_reach() -> None:
    maps, _ = made_of("glu, window", "all")
    silent = inspect.reach(maps._replace(weights=torch.zeros_like(maps.weights)))
    assert all(y.isnan().all() for y in silent)

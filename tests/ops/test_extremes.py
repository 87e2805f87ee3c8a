"""Scores of any size: as large as float32 holds, as small, and beyond float16's range; step, block and whole run."""

from __future__ import annotations

import pytest
import torch

from hypermlp.ops import SequenceMix, hyper_attention
from hypermlp.ops.arguments import Options
from hypermlp.ops.decode import Past, StepArgs, decode_block
from hypermlp.ops.library import PATHS
from tests.helpers import BACKENDS, evaluate, make_case, tiles

# of q: the other factor of a score is about 1
SIZES = [1e-30, 1e-25, 1e-12, 1e7, 1e15, 1e19, 1e25, 1e30]


def scaled(case, size, maps=slice(None)):
    q = case.tensors["q"].clone()
    q[:, :, maps] *= size
    return case.with_tensors({"q": q})


def beyond_float16(case):
    """Scores of a million from inputs within float16; of glu the gates alone: the scale map is not normalised."""
    keys = case.tensors["k"].clone()
    keys[:, :, :2] *= 300
    return scaled(case, 3e3, slice(0, 2)).with_tensors({"k": keys})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("selection", ["relu", "glu"])
def test_scores_of_any_size_are_normalised(backend, size, selection):
    """The reference in float64 is far from its limits: errors are relative to the result's size."""
    case = make_case(length=40, qk=8, selection=selection, dtype=torch.float32, eps=1e-37)
    case = scaled(case, size)
    with tiles(16):
        found = evaluate(case, lambda c: c.run(backend))
    exact = evaluate(case.map(lambda x: x.double()), lambda c: c.run("reference"))
    plain = scaled(make_case(length=40, qk=8, selection=selection), size)
    for name, x in exact.named().items():
        error = (found.named()[name].double() - x).abs().max() / x.abs().max()
        assert error < 2e-4, f"{name}: {error:.1e}"
    if selection == "relu":  # another way: a positive factor of q changes nothing
        torch.testing.assert_close(exact.output, scaled(plain, 1 / size).run("reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-290, 1e-200, 1e-150, 1e150, 1e200, 1e290])
def test_a_factor_of_the_scores_changes_nothing_in_float64(backend, size):
    case = make_case(length=20, selection="relu", eps=1e-300)
    torch.testing.assert_close(scaled(case, size).run(backend), case.run("reference"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_maps_large_at_once(backend):
    """softplus(u) relu(g) of 1e19 and 1e20 is beyond float32; divided by the norm it is u."""
    q = torch.tensor([1e20, 1e19]).reshape(1, 1, 2, 1)
    o = hyper_attention(q, torch.ones_like(q), torch.ones(1, 1, 1, 1), backend=backend)
    torch.testing.assert_close(o.flatten(), torch.tensor([1e19]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("selection", ["relu", "glu"])
def test_halves_with_scores_beyond_float16(backend, dtype, selection):
    case = make_case(length=40, qk=8, selection=selection, dtype=torch.float64)
    case = beyond_float16(case).map(lambda x: x.to(dtype))
    exact = evaluate(case.map(lambda x: x.double()), lambda c: c.run("reference"))
    found = evaluate(case, lambda c: c.run(backend))
    for name in ("output", "gradient of v"):
        size = exact.named()[name].abs().max()
        error = (found.named()[name].double() - exact.named()[name]).abs().max()
        assert error <= torch.finfo(dtype).eps * size, name


def past_of(case, newest):
    """The cache that holds ``case``'s tokens, heads beside rows, and the newest tokens' queries and mixings."""
    q, k, v = (case.tensors[name] for name in "qkv")
    keys = k.permute(0, 2, 3, 1).flatten(0, 1)
    values = v.transpose(1, 2).flatten(0, 1)
    mixes = [m if m.core is None else m._replace(core=m.core[:, -newest:]) for m in case.mixes()]
    o = case.options
    options = Options(o["selection"], o["norm"], o["eps"], True, "lag", q.shape[1])
    return q[:, -newest:], keys, values, mixes, options


def step(case, backend, segments=1):
    q, keys, values, mixes, options = past_of(case, 1)
    mixes = [m if m.core is None else m._replace(core=m.core[:, 0]) for m in mixes]
    cuts = [keys.shape[2]] if segments == 1 else [11, keys.shape[2] - 11]
    past = Past(list(keys.split(cuts, 2)), list(values.split(cuts, 1)), None)
    o = PATHS["native" if backend == "native" else "chunked"].step(StepArgs(q.flatten(1), past, *mixes, options))
    return o.view(q.shape[0], *case.tensors["v"].shape[2:])


def block(case, backend):
    q, keys, values, mixes, options = past_of(case, 5)
    return decode_block(StepArgs(q, Past([keys], [values], None), *mixes, options), PATHS[backend])[:, -1]


STEPS = {"step": step, "step over two segments": lambda c, backend: step(c, backend, 2), "block": block}


def every_step(test):
    """``run`` a step or a block; on the path of blocks ``backend="chunked"`` steps are PyTorch's own operators."""
    test = pytest.mark.parametrize("backend", ["chunked", "native"])(test)
    return pytest.mark.parametrize("run", STEPS.values(), ids=STEPS)(test)


@every_step
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("selection", ["relu", "glu"])
@pytest.mark.parametrize("large", [False, True])
@torch.no_grad()
def test_steps_keep_the_precision_of_the_whole_run(run, backend, dtype, selection, large):
    """Twice its error, and two roundings: of the result, and of the product with the values in bfloat16."""
    case = make_case(length=40, batch=2, qk=8, v=16, selection=selection)
    case = (beyond_float16(case) if large else case).map(lambda x: x.to(dtype))
    exact = case.map(lambda x: x.double()).run("reference")[:, -1]
    whole, found = case.run(backend)[:, -1], run(case, backend)
    assert found.dtype == dtype

    def error(x):
        return float((x.double() - exact).abs().max())

    assert error(found) <= 2 * error(whole) + 2 * torch.finfo(dtype).eps * float(exact.abs().max())


@every_step
@pytest.mark.parametrize("selection", ["relu", "glu"])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_steps_normalise_scores_of_any_size(run, backend, selection, size):
    case = scaled(make_case(length=40, batch=2, qk=8, selection=selection, dtype=torch.float32, eps=1e-37), size)
    exact = case.map(lambda x: x.double()).run("reference")[:, -1]
    assert (run(case, backend).double() - exact).abs().max() <= 1e-4 * exact.abs().max()


@every_step
@pytest.mark.parametrize("chosen", [{}, {"selection": "relu"}, {"norm": False}, {"norm": False, "selection": "relu"}])
@pytest.mark.parametrize("stream", ["q", "k", "v", "routing.core", "readout.core"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channel", [0, 2])
@torch.no_grad()
def test_a_step_that_sees_a_number_that_is_not_finite_says_so(run, backend, chosen, stream, value, channel):
    case = make_case(length=20, batch=2, qk=4, dtype=torch.float32, heads=1, **chosen)
    clean = run(case, backend)
    x = case.tensors[stream].clone()
    x[0, 7 if stream in ("k", "v") else -1, :, min(channel, x.shape[3] - 1)] = value
    found = run(case.with_tensors({stream: x}), backend)
    bad = ~found[0, 0].isfinite()
    assert bad[channel] if stream == "v" and run is not block else bad.all()
    assert torch.equal(found[1], clean[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("selection", ["relu", "glu"])
@pytest.mark.parametrize("map_index", [0, 1])
def test_a_score_of_minus_infinity_is_not_taken_for_one_that_selects_nothing(backend, selection, map_index):
    maps = 2 if selection == "glu" else 1
    if map_index >= maps:
        pytest.skip("one map")
    q = torch.ones(1, 2, maps, 1)
    q[0, 1, map_index] = -float("inf")
    o = hyper_attention(q, torch.ones_like(q), torch.ones(1, 2, 1, 3), selection=selection, backend=backend)
    assert o[0, 0].isfinite().all()
    assert o[0, 1].isnan().all()
    case = make_case(length=2, heads=1, qk=1, v=3, selection=selection, routing=("identity",), readout=("identity",))
    streams = {"q": q, "k": torch.ones_like(q), "v": torch.ones(1, 2, 1, 3)}
    assert step(case.with_tensors(streams), backend).isnan().all()
    assert SequenceMix() == case.mixes()[0]

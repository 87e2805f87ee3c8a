"""``backend="auto"`` where the kernels are sound and where each is broken on purpose, in Triton's interpreter.

The interpreter's device, the CPU, stands in for a GPU by ``checked.DEVICE_TYPE``. Not collected by name:
``tests/kernels/test_interpreted.py`` runs this file in a process of its own.
"""

import warnings
from collections.abc import Sequence
from types import ModuleType

import pytest
import repairs
import torch
from faults import (
    broken,
    late_stretches,
    never_hidden,
    next_decode_rows,
    next_scale_rows,
    next_table_rows,
    replaced,
    visible_without_mask,
)

from hypermlp import HyperCache, HyperMLP
from hypermlp.ops import SequenceMix, checked, hyper_attention, native, self_check, self_check_cases, self_check_steps
from hypermlp.ops import triton as triton_path
from hypermlp.ops.arguments import Needs, OperatorArgs, Options
from hypermlp.ops.decode import Past, StepArgs
from hypermlp.ops.self_check import Errors
from hypermlp.ops.short_conv import by_operators, short_conv
from hypermlp.ops.varlen import Tokens
from hypermlp_kernels import (
    backward_maps,
    backward_pass,
    backward_rows,
    call,
    decode,
    launch,
    launch_backward,
    launch_decode,
    launch_norms,
    launch_short_conv,
    mixing,
    rows,
    stored,
    visibility,
)
from hypermlp_kernels.backward_tiles import BackwardTile
from hypermlp_kernels.tiles import Tile

repairs.repair()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported")
T, H, K, V, R, L = 9, 1, 4, 4, 2, 12
ALL = Needs.of([True] * 11)


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has checked nothing, whose CPU counts as a GPU; small cases, since the interpreter is slow."""
    monkeypatch.setattr(checked, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(self_check, "_VERDICTS", {})
    monkeypatch.setattr(self_check, "_WARNED", set())
    for module in (self_check_cases, self_check_steps):
        monkeypatch.setattr(module, "LENGTH", 19)
    monkeypatch.setattr(self_check_cases, "WINDOW", 11)
    monkeypatch.setattr(self_check_steps, "_RING_LENGTHS", (15, 25))
    monkeypatch.setattr(call, "_INTERPRETER_TILE", Tile(16, 16, 16, 1, 1))
    monkeypatch.setattr(launch_backward, "_INTERPRETER_TILE", BackwardTile(16, 16, 16, 16, 16, 1, 1))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


def arguments(dtype: torch.dtype = torch.float32, selection: str = "relu", masked: bool = False) -> OperatorArgs:
    rng = torch.Generator().manual_seed(0)
    maps = H * (2 if selection == "glu" else 1)
    shapes = [(1, T, maps, K)] * 2 + [(1, T, H, V)]
    for heads in (maps, H):
        shapes += [(heads, L), (heads, L, R), (heads, L, R), (1, T, heads, R)]
    q, k, v, *mixes = ((0.5 * torch.randn(s, generator=rng)).to(dtype).requires_grad_() for s in shapes)
    valid = torch.arange(T)[None] > 1 if masked else None
    options = Options(selection, True, 1e-12, True, "lag", L)
    return OperatorArgs(q, k, v, SequenceMix(*mixes[:4]), SequenceMix(*mixes[4:]), Tokens(valid, None), options)


def attended(x: OperatorArgs, backend: str) -> torch.Tensor:
    return hyper_attention(
        x.q, x.k, x.v, x.routing_mix, x.readout_mix, selection=x.options.selection, attention_mask=x.tokens.valid,
        backend=backend,
    )  # fmt: skip


def attend(x: OperatorArgs, backend: str) -> list[torch.Tensor]:
    """The output and every gradient."""
    o = attended(x, backend)
    return [o.detach(), *torch.autograd.grad(o.float().sum(), [y for y in x.tensors if y is not None])]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def said(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """What the library warned of, and not NumPy, which warns where squares overflow."""
    return [text for warning in caught if "backend='auto'" in (text := str(warning.message))]


# ---- every kernel, at the checks themselves

FORWARD = [(launch, name) for name in ("routing_statistic", "selection_statistics", "readout", "stored_readout")]
FORWARD.append((launch_norms, "extreme_norms"))
BACKWARD = [
    "weight_gradient", "readout_statistic_gradient", "map_gradient", "table_gradient", "turn", "key_product",
    "add_parts",
]  # fmt: skip
DECODE = ["decode_scores", "decode_selection", "decode_readout", "decode_sum"]


def all_right(errors: Errors) -> bool:
    return not self_check.describe_wrong(errors)


@pytest.mark.parametrize(("module", "name"), FORWARD, ids=lambda x: x if isinstance(x, str) else "")
def test_each_forward_kernel_is_judged(module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(module, name, "does nothing")(monkeypatch)
    assert not all_right(self_check_cases.forward_errors(arguments()))


@pytest.mark.parametrize("name", BACKWARD)
def test_each_backward_kernel_is_judged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check_cases, "_may_be_split", lambda x: name == "add_parts")
    broken(backward_pass, name, "does nothing")(monkeypatch)
    assert not all_right(self_check_cases.backward_errors(arguments(), ALL))


def step_arguments() -> StepArgs:
    x = arguments()
    mixes = (
        self_check_cases.map_mix(mix._replace(core=mix.core[:, -1]), torch.Tensor.detach)
        for mix in (x.routing_mix, x.readout_mix)
    )
    past = Past([x.k.detach()[0].permute(1, 2, 0).contiguous()], [x.v.detach()[0].transpose(0, 1)], None)
    return StepArgs(x.q.detach()[:, -1].flatten(1), past, *mixes, x.options)


@pytest.mark.parametrize("name", DECODE)
def test_each_decoding_kernel_is_judged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(launch_decode, name, "does nothing")(monkeypatch)
    assert not all_right(self_check_steps.step_errors(step_arguments()))


@pytest.mark.parametrize("name", ["short_conv", "short_conv_backward"])
def test_each_kernel_of_the_convolution_is_judged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, taps = torch.randn(1, 6, 4), torch.randn(4, 3)
    broken(launch_short_conv, name, "does nothing")(monkeypatch)
    assert not all_right(self_check_steps.conv_errors(x, taps, False, 0, (True, True), by_operators))


# ---- sound kernels pass, and are taken


def test_sound_kernels_are_taken() -> None:
    x = arguments(torch.bfloat16, "glu", masked=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="backend='auto'")
        found = attend(x, "auto")
    assert list(self_check._VERDICTS.values()) == [True, True]
    assert same(found, attend(x, "triton"))
    assert not same(found, attend(x, "chunked"))


SOUND_STEPS = {
    "ring": (torch.tensor(7), None, None),
    "padded": (None, torch.arange(T)[None] > 1, None),
    "by position": (None, None, torch.tensor([0])),
}


@pytest.mark.parametrize("kind", SOUND_STEPS)
def test_sound_steps_pass(kind: str) -> None:
    q, past, *rest = step_arguments()
    length, valid, start = SOUND_STEPS[kind]
    past = past._replace(length=length, valid=valid, start=start)
    if kind == "padded":  # as a ring that has gone round holds them
        past = past._replace(
            keys=[x[..., part] for x in past.keys for part in (slice(3), slice(3, None))],
            values=[x[:, part] for x in past.values for part in (slice(3), slice(3, None))],
        )
    assert all_right(self_check_steps.step_errors(StepArgs(q, past, *rest)))


@pytest.mark.parametrize("options", [{"packed": True, "past": 0}, {"packed": False, "past": 2}], ids=str)
def test_sound_convolutions_pass(options: dict) -> None:
    x, taps = torch.randn(1, 6, 4).bfloat16(), torch.randn(4, 3)
    assert all_right(self_check_steps.conv_errors(x, taps, needs=(True, True), plain=by_operators, **options))


# ---- broken kernels are not taken

FORWARD_FAULTS = {
    "wrong row of a table": (replaced(rows, "table_rows", next_table_rows), {}, "o (recompute) is off"),
    "wrong row of a diagonal": (
        replaced(mixing, "scale_rows", next_scale_rows),
        {"dtype": torch.bfloat16},
        "o (recompute) is off",
    ),
    "lost window": (replaced(visibility, "has_hidden", never_hidden), {}, "o (recompute) is off"),
    "lost mask": (replaced(visibility, "visible", visible_without_mask), {"masked": True}, "o (recompute) is off"),
    "lost tile when stored": (replaced(stored, "stretches", late_stretches), {}, "o (store) is off"),
    "NaN": (broken(launch, "readout", "leaves a NaN", 13), {}, "o (recompute) is off by nan"),
    "error at launch": (broken(launch, "stored_readout", "raises"), {}, "illegal instruction"),
}


@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_a_broken_forward_is_not_taken(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, options, reason = FORWARD_FAULTS[fault]
    x = arguments(**options)
    break_it(monkeypatch)
    with pytest.warns(RuntimeWarning, match="takes the chunked path") as caught:
        first = attend(x, "auto")
    (message,) = said(caught)
    assert reason in message
    assert "forward in " in message
    assert "python -m hypermlp.doctor" in message
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="backend='auto'")
        second = attend(x, "auto")
    assert list(self_check._VERDICTS.values()) == [False]  # nor is the backward asked about
    expected = attend(x, "chunked")
    assert same(first, expected)
    assert same(second, expected)


BACKWARD_FAULTS = {
    "wrong row of a table": replaced(backward_rows, "table_rows", next_table_rows),
    "wrong row of a table, in bfloat16": replaced(backward_maps, "table_rows", next_table_rows),
    "NaN": broken(backward_pass, "table_gradient", "leaves a NaN", 7),
    "error at launch": broken(backward_pass, "map_gradient", "raises"),
}


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_a_broken_backward_is_not_taken(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = arguments(torch.bfloat16 if "bfloat16" in fault else torch.float32)
    self_check._VERDICTS[self_check_cases.forward_family(x)] = True
    BACKWARD_FAULTS[fault](monkeypatch)
    with pytest.warns(RuntimeWarning, match="the GPU kernels for backward in ") as caught:
        o, *grads = attend(x, "auto")
    assert len(said(caught)) == 1
    assert list(self_check._VERDICTS.values()) == [True, False]
    assert not torch.equal(o, attend(x, "chunked")[0])
    # nothing of the kernels is in the gradients, their statistics neither
    assert same(grads, attend(x, "chunked")[1:])


STEP_FAULTS = {
    "wrong row of a table": replaced(decode, "table_rows", next_decode_rows),
    "NaN": broken(launch_decode, "decode_sum", "leaves a NaN", 1),
}


@pytest.mark.parametrize("fault", STEP_FAULTS)
def test_a_broken_step_is_not_taken(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = HyperMLP(8, 1, mix_rank=2, max_lag=6, conv_size=0, layer_idx=0).requires_grad_(False)
    x, outs = torch.randn(2, 6, 8), []
    # the prompt's kernels are not what this is about
    monkeypatch.setattr(checked, "_forward_trusted", lambda x: False)
    STEP_FAULTS[fault](monkeypatch)
    for backend in ("auto", "chunked"):
        layer.backend, cache = backend, HyperCache()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outs.append([layer(part, cache=cache) for part in x.split([2, 1, 2, 1], 1)])
        assert len(said(caught)) == (backend == "auto")
    assert same(*outs)
    assert "decode in float32" in str(self_check._VERDICTS and next(iter(self_check._VERDICTS)))


@pytest.mark.parametrize("name", ["short_conv", "short_conv_backward"])
def test_a_broken_convolution_is_not_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(launch_short_conv, name, "raises")(monkeypatch)
    x, taps = torch.randn(1, 6, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)

    def convolved(backend: str) -> list[torch.Tensor]:
        y = short_conv(x, taps, backend=backend)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, taps])]

    with pytest.warns(RuntimeWarning, match="the GPU kernels for short convolution in float32") as caught:
        found = convolved("auto")
    assert len(said(caught)) == 1
    assert same(found, convolved("reference"))
    assert same(convolved("auto"), found)


# ---- graphs, and what is no fault of a kernel


def test_a_compiled_graph_makes_the_check_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = arguments()
    compiled = torch.compile(attended, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, "auto"), attended(x, "triton"))
    assert list(self_check._VERDICTS.values()) == [True]
    # the same graph, in a process whose kernels are broken
    self_check._VERDICTS.clear()
    broken(launch, "readout", "raises")(monkeypatch)
    with pytest.warns(RuntimeWarning, match="forward in float32"):
        found = compiled(x, "auto")
    assert torch.equal(found, attended(x, "chunked"))
    (grad,) = torch.autograd.grad(found.sum(), x.q)
    assert torch.equal(grad, torch.autograd.grad(attended(x, "chunked").sum(), x.q)[0])


def test_nothing_is_checked_while_a_cuda_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    x = arguments()
    with monkeypatch.context() as recording:
        recording.setattr(self_check, "captured", lambda device: True)
        with pytest.warns(RuntimeWarning, match=r"were not checked before it was recorded") as caught:
            assert same(attend(x, "auto"), attend(x, "chunked"))
        assert len(said(caught)) == 1
        assert self_check._VERDICTS == {}
    expected = attended(x, "auto")  # the warm-up
    monkeypatch.setattr(self_check, "captured", lambda device: True)
    assert torch.equal(attended(x, "auto"), expected)
    assert not torch.equal(expected, attended(x, "chunked"))


def test_want_of_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    x, right = arguments(), self_check_cases.forward_errors

    def full(x: OperatorArgs) -> Errors:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(checked, "forward_errors", full)
    with pytest.warns(RuntimeWarning, match="no memory to check forward"):
        hyper_attention(x.q, x.k, x.v, selection="relu")
    assert self_check._VERDICTS == {}
    monkeypatch.setattr(checked, "forward_errors", right)
    hyper_attention(x.q, x.k, x.v, selection="relu")
    assert list(self_check._VERDICTS.values()) == [True]


def test_the_caller_modes_do_not_reach_the_check() -> None:
    x = arguments()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        hyper_attention(x.q, x.k, x.v, x.routing_mix, x.readout_mix, selection="relu")
    (family,) = self_check._VERDICTS
    assert family.dtype == torch.bfloat16
    assert self_check._VERDICTS[family]


def test_an_explicit_backend_is_the_users_word() -> None:
    attended(arguments(), "triton")
    assert self_check._VERDICTS == {}


def test_lengths_share_a_verdict() -> None:
    x = arguments()
    for length in (9, 5):
        streams = (y.detach()[:, :length] for y in (x.q, x.k, x.v))
        hyper_attention(*streams, selection="relu", max_lag=length)
    assert len(self_check._VERDICTS) == 1


def test_bfloat16_is_refused_where_the_interpreter_is_not_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    from hypermlp_kernels import interpreter

    x = arguments(torch.bfloat16)
    assert triton_path.unavailable(x.q) is None
    monkeypatch.setattr(interpreter, "multiplies_bfloat16", lambda: False)
    with pytest.raises(ValueError, match="multiplies the bits of bfloat16 numbers as integers: use float32"):
        attend(x, "triton")
    path = "native" if native.unavailable(x.q) is None else "chunked"
    assert torch.equal(attended(x, "auto"), attended(x, path))
    attended(arguments(), "triton")

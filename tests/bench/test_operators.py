"""The operator benchmark: its gate, limits, figures, and the CUDA clock over a CUDA that is pretended."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from hypermlp_lab.bench import clock, command, gate, operators
from hypermlp_lab.bench.operators import OPERATOR_PROVIDERS, OperatorBenchmark, OperatorCase, OperatorProvider
from hypermlp_lab.bench.results import markdown
from hypermlp_lab.bench.run import Report, passed, run
from hypermlp_lab.bench.settings import Settings

CASE = OperatorCase(hidden_size=32, num_heads=2, batch=2, mix_rank=4, head_width=16)
SETTINGS = Settings(CASE.at(8, 20), gate_lengths=(30,), repeats=2, seconds=60.0)
SHORT = replace(SETTINGS, cases=CASE.at(8))
BY_NAME = {provider.name: provider for provider in OPERATOR_PROVIDERS}
ON_CPU = ["chunked", "reference", "sdpa"]


def silent(
    providers: Sequence[OperatorProvider], settings: Settings[OperatorCase], **options: Callable[..., None]
) -> Report:
    return run(OperatorBenchmark(providers, settings), **{"log": lambda line: None, **options})


def check(provider: OperatorProvider, settings: Settings[OperatorCase]) -> gate.Verdict:
    return gate.check(provider.name, OperatorBenchmark([provider], settings).trials(provider))


def altered(change: Callable[[OperatorCase, Tensor], Tensor], name: str = "chunked") -> OperatorProvider:
    """A provider whose output is changed."""
    good = BY_NAME[name]
    return replace(good, name="altered", build=lambda case: lambda x: change(case, good.build(case)(x)))


def test_report() -> None:
    saved = []
    report = silent(OPERATOR_PROVIDERS, SETTINGS, save=lambda r: saved.append(len(r["rows"])))
    assert json.loads(json.dumps(report)) == report
    assert passed(report)
    assert list(report["providers"]) == ON_CPU
    assert saved == [6, 12]
    for row in report["rows"]:
        assert row["skipped"] is None
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        assert row["tflops"] == pytest.approx(1e-9 * row["flops"] / row["median_ms"])
        assert row["matmul_share"] == pytest.approx(row["tflops"] / report["ceilings"]["matmul_tflops"])
        assert set(row["time_ratio"]) == {"sdpa"}
    text = markdown(report)
    assert "matrix product ran at" in text
    assert text.count("| chunked |") == 4


def test_every_operator_is_left_out_or_passes_the_gate() -> None:
    lines: list[str] = []
    report = silent(OPERATOR_PROVIDERS, SHORT, log=lines.append)
    assert {verdict["provider"] for verdict in report["gate"]} == set(ON_CPU)
    for name in set(BY_NAME) - set(ON_CPU):
        assert f"{name}: left out, it needs cuda" in lines


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gate_holds_in_every_precision(dtype: torch.dtype) -> None:
    for name in ON_CPU:
        verdict = check(BY_NAME[name], replace(SETTINGS, cases=(replace(CASE, dtype=dtype),)))
        assert verdict.passed, verdict.reason


def test_wrong_values_get_no_figure() -> None:
    wrong = altered(lambda case, o: o + 0.01 * o.mean(1, keepdim=True))
    report = silent([wrong, BY_NAME["sdpa"]], SHORT)
    assert not passed(report)
    assert {row["provider"] for row in report["rows"]} == {"sdpa"}
    assert "altered failed its check" in markdown(report)


def test_wrong_gradients_matter_where_they_are_measured() -> None:
    wrong = altered(lambda case, o: o + 0.01 * (o - o.detach()))
    assert not check(wrong, SETTINGS).passed
    assert check(wrong, replace(SETTINGS, modes=("forward",))).passed


def test_every_gate_length_counts() -> None:
    wrong = altered(lambda case, o: o * (2 if case.length == 40 else 1))
    assert check(wrong, SETTINGS).passed
    verdict = check(wrong, replace(SETTINGS, gate_lengths=(30, 40, 50)))
    assert not verdict.passed


def test_a_crash_is_a_failed_gate() -> None:
    def crash(case: OperatorCase, o: Tensor) -> Tensor:
        raise AssertionError("inside a compiler")

    verdict = check(altered(crash), SETTINGS)
    assert not verdict.passed
    assert "AssertionError: inside a compiler" in str(verdict.reason)


def test_one_that_fails_at_a_length_leaves_the_others() -> None:
    def fail(case: OperatorCase, o: Tensor) -> Tensor:
        if case.length == 20:
            raise torch.OutOfMemoryError("no room")
        return o

    report = silent([altered(fail), BY_NAME["sdpa"]], SETTINGS)
    skipped = {(row["provider"], row["length"]): row["skipped"] for row in report["rows"]}
    assert skipped == {("altered", 8): None, ("sdpa", 8): None, ("altered", 20): "out of memory", ("sdpa", 20): None}


def test_limits_are_said() -> None:
    report = silent([BY_NAME["reference"]], replace(SETTINGS, memory_limit=9 * 2 * 4 * 8 * 8 * 4))
    assert [row["skipped"] is None for row in report["rows"]] == [True, True, False, False]
    assert "the limit is" in report["rows"][-1]["skipped"]
    report = silent([BY_NAME["sdpa"]], replace(SETTINGS, longest_call=0.0))
    assert [row["skipped"] is None for row in report["rows"]] == [True, True, False, False]
    assert "expected to take" in report["rows"][-1]["skipped"]
    report = silent([BY_NAME["sdpa"]], replace(SETTINGS, total_seconds=0.0))
    assert {row["skipped"] for row in report["rows"]} == {"the run's time was over"}


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_flops_are_those_that_pytorch_counts(mode: str) -> None:
    case = replace(CASE, length=24)
    provider = BY_NAME["chunked"]
    tensors = [x.requires_grad_() for x in provider.inputs(case)]
    with FlopCounterMode(display=False) as counter:
        o = provider.build(case)(tensors)
        if mode != "forward":
            o.sum().backward()
    assert provider.flops(case, mode) == counter.get_total_flops()


def test_softmax_flops_are_the_causal_half() -> None:
    case = replace(CASE, length=24)
    provider = BY_NAME["sdpa"]
    with FlopCounterMode(display=False) as counter:
        operators._dense_softmax(provider.inputs(case))
    everything = case.batch * case.length**2
    assert provider.flops(case, "forward") * everything == counter.get_total_flops() * case.pairs


def test_equal_width() -> None:
    case = OperatorCase(length=16)
    q, k, v, *_ = BY_NAME["triton"].inputs(case)
    assert q.shape == k.shape == (4, 16, 4, 64)
    assert v.shape == (4, 16, 2, 512)
    assert all(x.shape == (4, 16, 16, 64) for x in BY_NAME["sdpa-flash"].inputs(case))


def test_the_calls_that_need_a_gpu_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention uncompiled, and the kernel choice with the ones that a CPU has."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    math = replace(BY_NAME["sdpa"], build=operators._sdpa(SDPBackend.MATH))
    for provider in (replace(BY_NAME["flex"], name="flex"), math):
        verdict = check(provider, replace(SETTINGS, modes=("forward",)))
        assert verdict.passed, verdict.reason


class PretendedCuda:
    """Records what the clock asks of CUDA, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def note(self, what: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.asked.append(what)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            record, synchronize = (staticmethod(outer.note(what)) for what in ("record", "wait"))

            def elapsed_time(self, end: Event) -> float:
                return 2.5

        class Stream:
            def __init__(self, device: object = None) -> None: ...

            def wait_stream(self, other: object) -> None: ...

        class CUDAGraph:
            replay = staticmethod(outer.note("replay"))

        @contextmanager
        def noted(what: str):
            outer.asked.append(f"enter {what}")
            yield
            outer.asked.append(f"leave {what}")

        properties = type("Properties", (), {"L2_cache_size": 1 << 10})()
        replacements = {
            "Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "synchronize": lambda device=None: None,
            "stream": lambda stream: noted("side stream"), "graph": lambda graph: noted("graph"),
            "current_stream": Stream, "get_device_properties": lambda device: properties,
            "empty_cache": self.note("give back"), "mem_get_info": lambda device: (7, 9),
        }  # fmt: skip
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)


def test_cuda_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = PretendedCuda()
    cuda.install(monkeypatch)
    timer = clock.CudaClock(torch.device("cpu"))
    assert timer._other_data.nbytes == 4 << 10
    call = cuda.note("call")
    same, launched = timer.prepare(call, False)
    assert (same, launched, cuda.asked) == (call, "eager", ["call"])
    cuda.asked.clear()
    replay, launched = timer.prepare(call, True)
    assert launched == "graph"
    assert cuda.asked == [
        "enter side stream", *["call"] * 3, "leave side stream", "enter graph", "call", "leave graph",
    ]  # fmt: skip
    cuda.asked.clear()
    timer._other_data.fill_(1)
    assert timer.seconds(replay) == pytest.approx(2.5e-3)
    assert cuda.asked == ["record", "replay", "record", "wait"]
    assert not timer._other_data.any(), "the cache was not flushed"
    assert timer.free_bytes() == 7


def test_what_is_measured_on_a_device_has_it_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and graphs go to the current device, which tensors on another one do not change."""
    entered: list[torch.device] = []
    current: list[bool] = []

    @contextmanager
    def device(which: torch.device):
        entered.append(which)
        current.append(True)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    benchmark = OperatorBenchmark([], SHORT)
    monkeypatch.setattr(benchmark, "facts", lambda: {"current": bool(current)})
    assert not run(benchmark, log=lambda line: None)["current"]
    assert not entered
    benchmark.device = torch.device("cuda", 1)
    assert run(benchmark, log=lambda line: None)["current"]
    assert entered == [torch.device("cuda", 1)]


def test_what_no_graph_can_hold_is_timed_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reluctant(clock.HostClock):
        def prepare(self, call: Callable[[], object], graph: bool) -> tuple[Callable[[], object], str]:
            if graph:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().prepare(call, graph)

    monkeypatch.setattr("hypermlp_lab.bench.run.clock_for", lambda device: Reluctant())
    report = silent([BY_NAME["sdpa"], BY_NAME["chunked"]], SHORT)
    launched = {row["provider"]: row["launched"] for row in report["rows"]}
    assert launched["chunked"] == "eager"
    assert launched["sdpa"].startswith("eager, no graph: RuntimeError: operation not permitted")


def test_command_for_operators(tmp_path) -> None:
    out = tmp_path / "operators.json"
    sizes = ["--hidden-size", "64", "--batch", "1", "--lengths", "8", "--repeats", "1"]
    arguments = ["attention", "--level", "operator", *sizes, "--forward-only", "--only", "chunked,sdpa"]
    done = CliRunner().invoke(command.app, [*arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert [(row["provider"], row["mode"]) for row in report["rows"]] == [("chunked", "forward"), ("sdpa", "forward")]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    done = CliRunner().invoke(command.app, ["attention", "--level", "model"])
    assert done.exit_code == 2
    assert "neither layer nor operator" in done.output


@pytest.mark.parametrize("level", ["layer", "operator"])
@pytest.mark.parametrize(("options", "limit"), [([], 3 << 30), (["--memory-limit", "0.5"], 1 << 29)])
def test_memory_has_a_limit_on_a_cpu(level: str, options: list[str], limit: int, tmp_path, monkeypatch) -> None:
    settings: list[Settings] = []

    def stop(benchmark: OperatorBenchmark, log: object) -> None:
        settings.append(benchmark.settings)
        raise ValueError("enough")

    monkeypatch.setattr(command, "run", stop)
    arguments = ["attention", "--level", level, *options, "--out", str(tmp_path / "result.json")]
    CliRunner().invoke(command.app, arguments)
    assert [found.memory_limit for found in settings] == [limit]

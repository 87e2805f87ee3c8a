"""The benchmark's own machinery: gate, order, memory, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from hypermlp import HyperGLU
from hypermlp_lab.bench import command, environment, gate, results
from hypermlp_lab.bench.layers import ATTENTION_PROVIDERS, Contestant, LayerBenchmark, LayerCase, LayerProvider
from hypermlp_lab.bench.measure import MODES, extra_peak_bytes, interleaved
from hypermlp_lab.bench.run import Report, count_parameters, passed
from hypermlp_lab.bench.run import run as run_benchmark
from hypermlp_lab.bench.settings import Settings

CASE = LayerCase(hidden_size=64)
SETTINGS = Settings(CASE.at(8, 24), repeats=2, seconds=60.0)
SHORT = replace(SETTINGS, cases=CASE.at(8))
BY_NAME = {provider.name: provider for provider in ATTENTION_PROVIDERS}
ROW_KEYS = {
    "provider", "length", "mode", "parameters", "rounds", "median_ms", "quartiles_ms", "tokens_per_second",
    "extra_peak_bytes", "skipped", "time_ratio",
}  # fmt: skip


def run(providers: Sequence[LayerProvider], settings: Settings[LayerCase]) -> Report:
    return run_benchmark(LayerBenchmark(providers, settings), log=lambda _: None)


def check(provider: LayerProvider, case: LayerCase) -> gate.Verdict:
    return gate.check(provider.name, LayerBenchmark([provider], Settings((case,))).trials(provider))


class SeesTheFuture(HyperGLU):
    """Wrong values: forgets causality."""

    def forward(self, hidden_states: Tensor, *args: object, **options: object) -> Tensor:
        return super().forward(hidden_states) + 0.5 * hidden_states.mean(1, keepdim=True)


class WrongGradient(HyperGLU):
    """Right values, wrong gradient: the scale of one parameter's gradient is off."""

    def forward(self, hidden_states: Tensor, *args: object, **options: object) -> Tensor:
        out = super().forward(hidden_states)
        if hidden_states.dtype == torch.float32:
            extra = out * 0.01
            out = out + (extra - extra.detach())
        return out


class Crashes(HyperGLU):
    def forward(self, hidden_states: Tensor, *args: object, **options: object) -> Tensor:
        raise RuntimeError("no kernel for this")


class MakesNaN(HyperGLU):
    def forward(self, hidden_states: Tensor, *args: object, **options: object) -> Tensor:
        return super().forward(hidden_states) * float("nan")


def broken(cls: type[HyperGLU]) -> LayerProvider:
    good = BY_NAME["hyperglu-chunked"]

    def exact(layer: HyperGLU, hidden_states: Tensor) -> Tensor:
        return HyperGLU.forward(layer, hidden_states)

    return replace(good, name="broken", build=lambda case: cls(case.hidden_size, max_lag=case.length), exact=exact)


@pytest.mark.parametrize("provider", ATTENTION_PROVIDERS, ids=lambda provider: provider.name)
def test_every_provider_passes_the_gate(provider: LayerProvider) -> None:
    verdict = check(provider, CASE)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gate_holds_in_every_precision(dtype: torch.dtype) -> None:
    case = replace(CASE, dtype=dtype, hidden_size=64)
    for provider in ATTENTION_PROVIDERS:
        verdict = check(provider, case)
        assert verdict.passed, verdict.reason
    verdict = check(broken(SeesTheFuture), replace(case, dtype=torch.bfloat16))
    assert not verdict.passed


@pytest.mark.parametrize("cls", [SeesTheFuture, WrongGradient, MakesNaN, Crashes])
def test_gate_catches_a_broken_provider(cls: type[HyperGLU]) -> None:
    verdict = check(broken(cls), CASE)
    assert not verdict.passed
    assert verdict.reason


def test_gate_tells_wrong_values_from_wrong_gradients() -> None:
    verdict = check(broken(WrongGradient), CASE)
    assert verdict.output_error is not None
    assert verdict.output_error < 1e-5
    assert verdict.gradient_error == pytest.approx(0.01, rel=0.1)
    assert verdict.reason is not None
    assert "output:" not in verdict.reason


def test_a_failed_gate_leaves_no_figure() -> None:
    result = run([broken(SeesTheFuture), BY_NAME["softmax"]], SHORT)
    assert not passed(result)
    assert {row["provider"] for row in result["rows"]} == {"softmax"}
    assert "broken failed its check" in results.markdown(result)


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_running_out_of_memory_is_said(message: str) -> None:
    class Greedy(HyperGLU):
        def forward(self, hidden_states: Tensor, *args: object, **options: object) -> Tensor:
            if hidden_states.shape[1] != gate.GATE_LENGTH and torch.is_grad_enabled():
                raise (torch.OutOfMemoryError if "CUDA" in message else RuntimeError)(message)
            return super().forward(hidden_states)

    greedy = [broken(Greedy)]
    for providers in (greedy, [*greedy, BY_NAME["softmax"]]):
        result = run(providers, SHORT)
        rows = {(row["provider"], row["mode"]): row["skipped"] for row in result["rows"]}
        assert rows.pop(("broken", "forward+backward")) == "out of memory"
        assert set(rows.values()) == {None}


def test_other_errors_are_not_hidden() -> None:
    class Fails(HyperGLU):
        def forward(self, hidden_states: Tensor, *args: object, **options: object) -> Tensor:
            if hidden_states.shape[1] != gate.GATE_LENGTH:
                raise RuntimeError("a bug")
            return super().forward(hidden_states)

    with pytest.raises(RuntimeError, match="a bug"):
        run([broken(Fails)], SHORT)


def test_rounds_interleave_and_rotate() -> None:
    rounds = list(interleaved("abc", 4))
    assert ["".join(names) for names in rounds] == ["abc", "bca", "cab", "abc"]


def test_the_runner_times_providers_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, str]] = []
    monkeypatch.setattr(Contestant, "seconds", lambda self, mode: calls.append((id(self), mode)) or 1.0)
    run([BY_NAME["softmax"], BY_NAME["softmax-pc"]], replace(SHORT, repeats=4))
    assert [mode for _, mode in calls] == [MODES[0]] * 8 + [MODES[1]] * 8
    first, second = calls[0][0], calls[1][0]
    assert first != second
    assert [who for who, _ in calls[:8]] == [first, second, second, first, first, second, second, first]


def test_rounds_stop_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Contestant, "seconds", lambda contestant, mode: 1.0)
    settings = replace(SHORT, repeats=50, seconds=0.0)
    result = run([BY_NAME["softmax"]], settings)
    assert {row["rounds"] for row in result["rows"]} == {3}


def test_memory_sees_known_allocations() -> None:
    kept = torch.ones(1 << 18)

    def call() -> None:
        first = torch.empty(1 << 18)
        second = torch.empty(1 << 18)
        del first
        third = torch.empty(1 << 17)
        del second, third

    # freed before more was asked for, so two at once; what was there before is not counted
    assert extra_peak_bytes(call, torch.device("cpu")) == 2 * kept.nbytes


def test_memory_sees_inside_operators() -> None:
    x = torch.ones(1 << 18)
    # the sum's input is a temporary of the size of x
    assert extra_peak_bytes(lambda: (x * 2).sum(), torch.device("cpu")) >= x.nbytes
    assert extra_peak_bytes(lambda: None, torch.device("cpu")) == 0


def test_a_call_leaves_no_gradient_behind() -> None:
    layer = HyperGLU(16, max_lag=8)
    contestant = Contestant(layer, torch.randn(1, 8, 16))
    contestant.call("forward+backward")
    once = layer.q_proj.weight.grad.clone()
    contestant.clear()
    assert layer.q_proj.weight.grad is None
    contestant.call("forward+backward")
    torch.testing.assert_close(layer.q_proj.weight.grad, once)


@pytest.mark.parametrize("length", [512, 8192])
def test_widened_softmax_has_the_parameters_of_hyperglu(length: int) -> None:
    case = LayerCase(length=length, hidden_size=256, device="meta")
    ours, wide = (count_parameters(BY_NAME[name].build(case)) for name in ("hyperglu-chunked", "softmax-wide"))
    assert abs(wide / ours - 1) < 0.002


def test_report_schema() -> None:
    too_small = 9 * 4 * 8**2 * 4
    result = run(ATTENTION_PROVIDERS, replace(SETTINGS, memory_limit=too_small))
    assert json.loads(json.dumps(result)) == result
    assert set(result) == {"schema", "benchmark", "settings", "environment", "timing", "providers", "gate", "rows"}
    assert len(result["rows"]) == 2 * 2 * len(ATTENTION_PROVIDERS)
    skipped = [row for row in result["rows"] if row["skipped"] is not None]
    assert {(row["provider"], row["length"]) for row in skipped} == {("hyperglu-reference", 24)}
    for row in result["rows"]:
        if row in skipped:
            assert "limit" in row["skipped"]
            continue
        assert set(row) == ROW_KEYS
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["length"] / row["median_ms"])
        assert set(row["time_ratio"]) == {"softmax", "softmax-pc", "softmax-wide"}
    text = results.markdown(result)
    assert "hyperglu-reference at T = 24 skipped" in text
    assert len(list(results.table_rows(result, "forward"))) == 2 * len(ATTENTION_PROVIDERS)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1


def test_environment_names_no_machine() -> None:
    import platform
    from pathlib import Path

    from hypermlp_lab.bench.environment import describe

    text = json.dumps(describe())
    assert set(describe()) >= {"cpu", "cores", "python", "torch", "commit"}
    assert str(Path.home()) not in text
    assert f'"{platform.node()}"' not in text
    assert str(Path.cwd()) not in text


@pytest.mark.parametrize("name", ["layer.py", "native/kernel.cpp", "native/call.h"])
def test_the_digest_of_sources_is_of_all_languages(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_source_folders", lambda: [tmp_path])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    empty = environment.describe()["sources"]
    (tmp_path / name).write_text("a")
    first = environment.describe()["sources"]
    (tmp_path / name).write_text("b")
    assert len({empty, first, environment.describe()["sources"]}) == 3


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    run([], replace(SETTINGS, threads=before + 1))
    assert torch.get_num_threads() == before


def test_command_writes_json_and_picture(tmp_path) -> None:
    out = tmp_path / "new" / "result.json"
    arguments = ["attention", "--lengths", "8,16", "--hidden-size", "64", "--repeats", "1", "--out", str(out)]
    done = CliRunner().invoke(command.app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["settings"]["lengths"] == [8, 16]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "hyperglu-chunked" in done.output


def test_command_fails_on_a_failed_gate(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "ATTENTION_PROVIDERS", (broken(SeesTheFuture), BY_NAME["softmax"]))
    arguments = ["attention", "--lengths", "8", "--hidden-size", "64", "--repeats", "1"]
    done = CliRunner().invoke(command.app, [*arguments, "--out", str(tmp_path / "result.json")])
    assert done.exit_code == 1
    assert "FAILED" in done.output


@pytest.mark.parametrize(
    "arguments",
    [["--lengths", "8,x"], ["--lengths", "0"], ["--dtype", "int8"], ["--device", "tpu"], ["--only", "flex"]],
)
def test_command_refuses_bad_options(arguments: list[str]) -> None:
    done = CliRunner().invoke(command.app, ["attention", *arguments])
    assert done.exit_code == 2
    assert arguments[0] in done.output

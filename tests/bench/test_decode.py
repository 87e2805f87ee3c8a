"""The decoding benchmark: its gate, its sessions, its report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from hypermlp import HyperGLU
from hypermlp_lab.bench import command, gate, results
from hypermlp_lab.bench.decoding import (
    COMPILED_PROVIDERS,
    DECODE_PROVIDERS,
    DecodeBenchmark,
    DecodeCase,
    DecodeProvider,
    Session,
)
from hypermlp_lab.bench.run import Report, count_parameters, passed
from hypermlp_lab.bench.run import run as run_benchmark
from hypermlp_lab.bench.settings import Settings

CASE = DecodeCase(hidden_size=16, window=12, steps=4, recompute_limit=8)
SETTINGS = Settings(CASE.at(8, 40), repeats=2, seconds=20.0)
BY_NAME = {provider.name: provider for provider in (*DECODE_PROVIDERS, *COMPILED_PROVIDERS)}


def run(providers: Sequence[DecodeProvider], settings: Settings[DecodeCase]) -> Report:
    return run_benchmark(DecodeBenchmark(providers, settings), log=lambda _: None)


def check(provider: DecodeProvider, case: DecodeCase) -> gate.Verdict:
    return gate.check(provider.name, DecodeBenchmark([provider], Settings(case.at(40))).trials(provider))


class ForgetsThePast(HyperGLU):
    """Right in one shot, wrong with a cache."""

    def forward(self, hidden_states: Tensor, *args: object, **options: object) -> Tensor:
        out = super().forward(hidden_states, *args, **options)
        return out if options.get("cache") is None else 1.01 * out


class MakesNaN(HyperGLU):
    def forward(self, hidden_states: Tensor, *args: object, **options: object) -> Tensor:
        return super().forward(hidden_states, *args, **options) * float("nan")


class Crashes(HyperGLU):
    def forward(self, hidden_states: Tensor, *args: object, **options: object) -> Tensor:
        raise RuntimeError("no cache here")


def broken(cls: type[HyperGLU]) -> DecodeProvider:
    def exact(layer: HyperGLU, hidden_states: Tensor) -> Tensor:
        return HyperGLU.forward(layer, hidden_states)

    def build(case: DecodeCase) -> HyperGLU:
        return cls(case.hidden_size, max_lag=case.length, layer_idx=0)

    return replace(BY_NAME["hyperglu"], name="broken", build=build, exact=exact)


@pytest.mark.parametrize("provider", DECODE_PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_provider_passes_the_gate(provider: DecodeProvider, dtype: torch.dtype) -> None:
    verdict = check(provider, replace(CASE, hidden_size=64, dtype=dtype))
    assert verdict.passed, verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize("provider", COMPILED_PROVIDERS, ids=lambda provider: provider.name)
def test_every_compiled_provider_passes_the_gate(provider: DecodeProvider) -> None:
    verdict = check(provider, replace(CASE, hidden_size=64))
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("cls", [ForgetsThePast, MakesNaN, Crashes])
def test_a_failed_gate_leaves_no_figure(cls: type[HyperGLU]) -> None:
    result = run([broken(cls), BY_NAME["softmax"]], SETTINGS)
    assert not passed(result)
    assert {row["provider"] for row in result["rows"]} == {"softmax"}
    assert "broken failed its check" in results.markdown(result)


@pytest.mark.parametrize("name", ["hyperglu", "hyperglu-window", "softmax-wide"])
@pytest.mark.parametrize("length", [9, 40])
def test_a_session_gives_the_last_outputs_again_and_again(name: str, length: int) -> None:
    case = replace(CASE, length=length, dtype=torch.float64)
    layer = BY_NAME[name].build(case)
    x = torch.randn(1, length, 16, dtype=torch.float64)
    session = Session(layer, x, case.steps, cached=True)
    with torch.no_grad():
        expected = layer(x)[:, -case.steps :]
    for _ in range(3):
        torch.testing.assert_close(session.decode(), expected, atol=1e-10, rtol=0)
        session.rewind()
    assert session.cache is not None
    assert session.cache.get_seq_length() == length - case.steps


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ for the CPU, and there is none")
def test_a_compiled_session_goes_back_past_the_window_too() -> None:
    case = replace(CASE, length=40, dtype=torch.float64)
    layer = BY_NAME["hyperglu-window-compiled"].build(case)
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    session = Session(layer, x, case.steps, cached=True, compiled=True)
    with torch.no_grad():
        expected = layer(x)[:, -case.steps :]
    for _ in range(2):
        torch.testing.assert_close(session.decode(), expected, atol=1e-10, rtol=0)
        session.rewind()


def test_report() -> None:
    result = run(DECODE_PROVIDERS, SETTINGS)
    assert json.loads(json.dumps(result)) == result
    assert passed(result)
    assert result["settings"]["modes"] == ["decode"]
    rows = {(row["provider"], row["length"]): row for row in result["rows"]}
    assert len(rows) == 2 * len(DECODE_PROVIDERS)
    assert "recompute-limit" in rows["hyperglu-recompute", 40].pop("skipped")
    assert rows["hyperglu-recompute", 8]["cache_bytes"] is None
    assert rows["hyperglu", 40]["cache_bytes_per_token"] == 4 * (4 + 16)
    assert rows["softmax", 40]["cache_bytes_per_token"] == 4 * 32
    sizes = [count_parameters(BY_NAME[name].build(replace(CASE, length=40))) for name in ("hyperglu", "softmax-wide")]
    assert [rows[name, 40]["parameters"] for name in ("hyperglu", "softmax-wide")] == sizes
    assert set(rows["hyperglu", 8]["time_ratio"]) == {"hyperglu-recompute", "softmax", "softmax-wide"}
    text = results.markdown(run(DECODE_PROVIDERS, SETTINGS))
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_layers_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Session] = []
    monkeypatch.setattr(Session, "seconds", lambda session: calls.append(session) or 1.0)
    run([BY_NAME["softmax"], BY_NAME["hyperglu"]], replace(SETTINGS, cases=CASE.at(8)))
    first, second = calls[:2]  # each once to warm up
    assert calls[2:] == [first, second, second, first]


def test_contexts_shorter_than_what_is_timed_are_refused() -> None:
    with pytest.raises(ValueError, match="exceed the 4 tokens"):
        run(DECODE_PROVIDERS, replace(SETTINGS, cases=CASE.at(4)))
    done = CliRunner().invoke(command.app, ["decode", "--lengths", "16"])
    assert done.exit_code == 2
    assert "--lengths" in done.output


def test_command(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "decode.json"
    size = ["--lengths", "8,12", "--hidden-size", "16", "--repeats", "1", "--steps", "4", "--threads", "1"]
    done = CliRunner().invoke(command.app, ["decode", *size, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["benchmark"] == "decode"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    done = CliRunner().invoke(command.app, ["decode", *size, "--only", "softmax-wide-compiled"])
    assert done.exit_code == 2  # only with --compiled
    monkeypatch.setattr(command, "DECODE_PROVIDERS", (broken(ForgetsThePast), BY_NAME["softmax"]))
    done = CliRunner().invoke(command.app, ["decode", *size, "--out", str(out)])
    assert done.exit_code == 1
    assert "FAILED" in done.output

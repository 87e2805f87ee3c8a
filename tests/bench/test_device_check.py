"""``make device-check``: it ends in time, goes on after a failure, and says what failed, with pretended stages."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import device_bench, device_check, device_smoke
from benchmarks.stages import Stage, pytest_notes, run_stages
from hypermlp.ops import hyper_attention, self_check_cases
from hypermlp.ops.self_check import Judged
from tests.quick import some

ROOT = Path(__file__).parents[2]


def python(name: str, program: str, limit: float = 60.0, **options: object) -> Stage:
    return Stage(name, "pretended", [sys.executable, "-c", program], limit, **options)


def run(stages: list[Stage], tmp_path: Path, seconds: float = 60.0) -> dict:
    report = run_stages(stages, seconds, {"schema": 1}, tmp_path, log=lambda line: None)
    assert json.loads((tmp_path / "device-check.json").read_text()) == report
    return report


def test_a_failure_does_not_stop_the_rest(tmp_path: Path) -> None:
    report = run([python("bad", "print('why'); raise SystemExit(3)"), python("good", "print('fine')")], tmp_path)
    bad, good = report["stages"]
    assert (bad["status"], bad["exit_status"], bad["reason"]) == ("failed", 3, "exit status 3")
    assert "why" in bad["tail"]
    assert (good["status"], good["tail"]) == ("passed", "")
    assert report["failed"] == ["bad"]
    log = (tmp_path / "device-check.log").read_text()
    assert "why" in log
    assert "fine" in log


def test_a_hang_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', '{}'])"
    held = tmp_path / "held"
    hold = f'import fcntl, time; file = open({str(held)!r}, "w"); fcntl.flock(file, fcntl.LOCK_EX); time.sleep(60)'
    report = run([python("hangs", child.format(hold.replace("'", "\\'")), limit=3.0), python("next", "")], tmp_path)
    assert [stage["status"] for stage in report["stages"]] == ["timed out", "passed"]
    with held.open() as file:  # a process that is left still holds it
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    slow = python("slow", "import time; time.sleep(60)", least=0.0)
    report = run([slow, python("dropped", "", least=5.0)], tmp_path, seconds=1.0)
    assert [stage["status"] for stage in report["stages"]] == ["timed out", "not run"]
    assert report["not_run"] == ["dropped"]
    assert "it needs 5" in report["stages"][1]["reason"]
    assert report["seconds"] < 4


def test_what_cannot_run_here_is_no_failure(tmp_path: Path) -> None:
    def notes(output: str, status: int | None) -> dict:
        return {"refused": "no such device"}

    report = run(
        [
            python("prevented", "raise SystemExit(1)", prevented=lambda: "no tool"),
            python("refused", "raise SystemExit(1)", notes=notes),
        ],
        tmp_path,
    )
    assert [(stage["status"], stage["reason"]) for stage in report["stages"]] == [
        ("not run", "no tool"), ("not run", "no such device"),
    ]  # fmt: skip
    assert not report["failed"]


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_outcomes_are_read_from_pytest(workers: list[str], tmp_path: Path) -> None:
    (tmp_path / "test_four.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "@pytest.mark.parametrize('x', ['a b'])\n"
        "def test_bad(x): assert x == 'c', 'no good'\n"
        "def test_left_out(): pytest.skip('why')\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_broken(broken): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--color=no", "-p", "no:cacheprovider", "test_four.py"]
    done = subprocess.run([*command, *workers], cwd=tmp_path, capture_output=True, text=True)
    found = pytest_notes(done.stdout, done.returncode)
    assert {n: x for n, x in found.items() if n != "failures"} == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert sorted(line.split(" - ")[0] for line in found["failures"]) == [
        "test_four.py::test_bad[a b]", "test_four.py::test_broken",
    ]  # fmt: skip
    # cut off before its summary
    cut = pytest_notes(done.stdout[: done.stdout.index("short test summary")], None)
    assert cut["failed"] == 1
    assert sorted(cut["failures"]) == ["test_four.py::test_bad[a b]", "test_four.py::test_broken"]


def test_stages_are_what_is_there(tmp_path: Path) -> None:
    """Every file and benchmark that a stage names exists, and pytest takes the options."""
    stages = [*device_check.stages(tmp_path), *device_check.smoke_stages(tmp_path)]
    assert len({stage.name for stage in stages}) == len(stages)
    for stage in stages:
        files = [part for part in stage.command if part.startswith("tests/")]
        assert all((ROOT / file).is_file() for file in files)
        if "benchmarks.device_bench" in stage.command:
            assert stage.command[3] in device_bench.BENCHMARKS
    tested = {part for stage in stages for part in stage.command if part.startswith("tests/")}
    there = {str(path.relative_to(ROOT)) for path in (ROOT / device_check.TESTS).glob("test_*.py")}
    assert there == tested - {f"{device_check.TESTS}/sanitized.py"}


def test_the_first_stages_fit_the_time() -> None:
    limits = [stage.limit for stage in device_check.stages(Path("unused"))]
    assert sum(limits[:6]) <= 470
    assert sum(stage.limit for stage in device_check.smoke_stages(Path("unused"))) <= 175


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("========= Error: Device not supported\n", {"refused": "Error: Device not supported"}),
        (
            "========= Invalid __global__ read of size 4 bytes\n=========     at kernel\n"
            "========= ERROR SUMMARY: 1 error\n",
            {"summary": ["ERROR SUMMARY: 1 error"], "failures": ["Invalid __global__ read of size 4 bytes"]},
        ),
        ("ran\n========= ERROR SUMMARY: 0 errors\n", {"summary": ["ERROR SUMMARY: 0 errors"], "failures": []}),
    ],
)
def test_sanitizer_output(output: str, expected: dict) -> None:
    assert device_check._sanitizer_notes(output, 1) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("options", [pytest.param(["--only", "habits"], marks=pytest.mark.slow), ["--smoke"]], ids=str)
def test_without_a_gpu_it_says_so(options: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.device_check", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "No GPU that PyTorch can use here" in done.stdout


MODES = {
    "row": {"forward", "forward+backward"}, "attention": {"forward"}, "decode": {"decode"},
    "layers": {"forward", "forward+backward"},
}  # fmt: skip


@pytest.mark.parametrize("what", some(MODES, quick=["row"]))
def test_benchmarks_run_without_the_command_line_libraries(what: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    program = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib'): sys.modules[name] = None\n"
        "from benchmarks import device_bench\n"
        f"sys.exit(device_bench.main([{what!r}, '--device', 'cpu', '--seconds', '30', '--out', {str(out)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert {row["mode"] for row in report["rows"] if row["skipped"] is None} >= MODES[what]
    notes = device_check._bench_notes(out, "", 0)
    assert notes["rows"] > 0
    assert not notes["failures"]


def test_the_first_look_judges_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_smoke, "forward_errors", lambda x: {"o (store)": Judged(1e-3, 2e-3)})
    monkeypatch.setattr(device_smoke, "backward_errors", lambda x, needs: {"gradient of q": Judged(float("nan"), 1.0)})
    row = device_smoke.judge("glu", torch.bfloat16, "cpu")
    assert row["failures"] == ["gradient of q: nan > 1.00e+00"]
    assert set(row["errors"]) == {"o (store)", "gradient of q"}

    def broken(x: object) -> dict:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(device_smoke, "forward_errors", broken)
    monkeypatch.setattr(device_smoke, "backward_errors", lambda x, needs: {"gradient of q": Judged(0.0, 1.0)})
    assert device_smoke.judge("glu", torch.bfloat16, "cpu")["failures"] == ["forward: RuntimeError: no kernel image"]


@pytest.mark.parametrize("name", device_smoke.CASES)
def test_the_first_look_has_calls_that_the_kernels_take(name: str) -> None:
    """Their twins are what the operator's door would let in, and awkward as they say."""
    shape, x = device_smoke.CASES[name], device_smoke.call_of(device_smoke.CASES[name], torch.float32, "cpu")
    twin = self_check_cases.like(x)
    o = hyper_attention(
        twin.q, twin.k, twin.v, twin.routing_mix, twin.readout_mix, **twin.options._asdict(),
        attention_mask=twin.tokens.valid, cu_seqlens=twin.tokens.cu_seqlens, backend="reference",
    )  # fmt: skip
    assert bool(torch.isfinite(o).all())
    assert (twin.tokens.valid is not None, twin.tokens.cu_seqlens is not None) == (shape.masked, shape.packed)
    assert self_check_cases._may_be_split(x) == shape.long


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_first_look_that_fails_goes_on_and_is_written(tmp_path: Path) -> None:
    out = tmp_path / "smoke.json"
    assert device_smoke.main(["--device", "cuda", "--cases", "relu", "--workers", "2", "--out", str(out)]) == 1
    rows = json.loads(out.read_text())
    assert sorted(row["dtype"] for row in rows) == ["bfloat16", "float16", "float32"]
    assert all(len(row["failures"]) == 1 for row in rows)
    notes = device_check._smoke_notes(out, "", 1)
    assert notes["cases"] == len(notes["failures"]) == 3

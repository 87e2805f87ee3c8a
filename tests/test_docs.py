"""What the documentation shows works: its Python blocks run, and its tables come from results."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hypermlp.integrations.hosts import CLASSES
from hypermlp_lab.bench.decoding import DECODE_PROVIDERS, DecodeBenchmark, DecodeCase
from hypermlp_lab.bench.layers import ATTENTION_PROVIDERS, LayerBenchmark, LayerCase
from hypermlp_lab.bench.run import SCHEMA, run
from hypermlp_lab.bench.settings import Settings
from hypermlp_lab.training.data import Corpus

ROOT = Path(__file__).resolve().parent.parent


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["index", "gpt2", "llama", "gpt-neox", "bert", "vision"])
def test_python_blocks_about_swapping_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra")
    test_python_blocks_run(f"docs/swap/{page}.md", monkeypatch)


def test_python_blocks_about_the_family_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra")
    monkeypatch.chdir(tmp_path)  # the page saves a checkpoint
    test_python_blocks_run("docs/huggingface.md", monkeypatch)


def test_python_blocks_of_a_users_week_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra")
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path))  # where the page saves its model
    test_python_blocks_run("docs/week.md", monkeypatch)


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/index.md", "docs/guide.md", "docs/caching.md", "docs/swap/torch-nn.md", "docs/swap/own.md"],
)
def test_python_blocks_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the default compiler needs a C++ one on the machine; tracing is what the page is about
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_the_page_of_hosts_lists_what_is_known() -> None:
    """Made by ``python docs/swap/hosts.py``."""
    page = (ROOT / "docs" / "swap" / "hosts.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    named = set(re.findall(r"`([\w.]+)`", "\n".join(rows)))
    for paths in CLASSES.values():
        for path in paths:
            shown = path.rpartition(".")[2] if path.startswith("transformers.") else path
            assert shown in named, f"{path} is not on the page"
    listed = {cell for row in rows if len(row.split("|")) == 10 for cell in re.findall(r"`(\w+)`", row.split("|")[2])}
    known = {
        path.rpartition(".")[2] for paths in CLASSES.values() for path in paths if path.startswith("transformers.")
    }
    assert listed - {"from_attention"} == known


def test_results_are_filled_in(tmp_path: Path) -> None:
    hooks = load(ROOT / "docs" / "hooks.py")
    missing = hooks.benchmark("attention-cpu", tmp_path)
    assert "make bench" in missing
    settings = Settings(LayerCase(hidden_size=64).at(8), repeats=1)
    report = run(LayerBenchmark(ATTENTION_PROVIDERS, settings), log=lambda _: None)
    report["rows"][0]["median_ms"] = 12345.6
    result = tmp_path / "benchmarks" / "results" / "attention-cpu.json"
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps(report))
    page = hooks.benchmark("attention-cpu", tmp_path)
    assert "12345.6" in page
    assert "![" not in page
    picture = tmp_path / "docs" / "pictures" / "attention-cpu.png"
    picture.parent.mkdir(parents=True)
    picture.touch()
    assert "(pictures/attention-cpu.png)" in hooks.benchmark("attention-cpu", tmp_path)


def test_performance_page_asks_for_results_that_make_bench_writes() -> None:
    page, makefile = (ROOT / "docs" / "performance.md").read_text(), (ROOT / "Makefile").read_text()
    names = re.findall(r"<!-- benchmark: ([\w-]+) -->", page)
    assert names
    for name in names:
        assert json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["schema"] == SCHEMA
        assert f"benchmarks/results/{name}.json" in makefile
        # a picture is of several lengths
        assert name.startswith("models") or f"docs/pictures/{name}.png" in makefile


def test_the_guide_has_the_measured_figures_of_a_longer_context() -> None:
    context = load(ROOT / "benchmarks" / "context.py")
    report = json.loads(context.OUT.read_text())
    assert report["schema"] == context.SCHEMA
    guide = (ROOT / "docs" / "guide.md").read_text()
    assert context.markdown(report) in guide
    last = {row["way"]: row["nats"][-1] for row in report["rows"] if not row["steps"]}
    said = re.search(r"last 32 bytes ([\d.]+) nats by\s+`\"identity\"` and ([\d.]+) .* window has ([\d.]+\d)", guide)
    assert said is not None
    assert [float(x) for x in said.groups()] == [round(last[way], 2) for way in ("identity", "continue", "window")]


def test_a_longer_context_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Tiny: the losses within the old window do not change by extending, and every way is there."""
    context = load(ROOT / "benchmarks" / "context.py")
    words = b"def f(x):\n    return x\n" * 40
    tokens = torch.frombuffer(bytearray(words), dtype=torch.uint8)
    corpus = Corpus("words", tokens, tokens, ("a",), ("b",))
    sizes = {"hidden_size": 16, "num_layers": 1, "max_lag": 8, "batch_bytes": 32, "steps": 1, "more_steps": 1}
    report = context.measure(context.SETTINGS | sizes | {"windows": 4, "bucket": 8}, corpus)
    rows = {(row["way"], row["steps"]): row for row in report["rows"]}
    assert set(rows) == {(way, steps) for way in context.WAYS for steps in (0, 1)}
    first = rows["window", 0]
    for way in ("identity", "continue"):
        assert rows[way, 0]["nats"][0] == first["nats"][0]
        assert rows[way, 0]["parameters"] > first["parameters"]
    assert len(first["nats"]) == context.TIMES
    assert first["beyond"] == pytest.approx(sum(first["nats"][1:]) / 3, abs=1e-3)
    assert context.markdown(report).count("\n") == 8


def test_lag_layout_picture_is_of_the_code(tmp_path: Path) -> None:
    picture = load(ROOT / "docs" / "pictures" / "lag_layout.py")
    by_key, by_column = picture.addresses()
    n = picture.TOKENS
    for i in range(n):
        for j in range(i + 1):
            assert by_key[i][j] == by_column[i][n - 1 - (i - j)]
    assert by_key[1][0] - by_key[0][0] + 1 == by_column[1][0] - by_column[0][0]
    picture.draw().savefig(tmp_path / "lag_layout.svg")
    assert (ROOT / "docs" / "pictures" / "lag_layout.svg").read_text().startswith("<?xml")


def test_decoding_results_are_filled_in(tmp_path: Path) -> None:
    hooks = load(ROOT / "docs" / "hooks.py")
    settings = Settings(DecodeCase(hidden_size=16, steps=4, recompute_limit=8).at(24), repeats=1)
    report = run(DecodeBenchmark(DECODE_PROVIDERS, settings), log=lambda _: None)
    report["rows"][0]["median_ms"] = 12345.678
    result = tmp_path / "benchmarks" / "results" / "decode-cpu.json"
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps(report))
    page = hooks.benchmark("decode-cpu", tmp_path)
    assert "12345.678" in page
    assert "hyperglu-recompute at T = 24 skipped" in page


def test_cache_ring_picture_is_of_the_code(tmp_path: Path) -> None:
    picture = load(ROOT / "docs" / "pictures" / "cache_ring.py")
    for count in picture.MOMENTS:
        slots, segments = picture.memory_after(count)
        window = [token for segment in segments for token in segment]
        assert window == list(range(max(0, count - picture.WINDOW), count))
        assert set(window) <= set(slots)
    assert len(segments) == 2
    picture.draw().savefig(tmp_path / "cache_ring.svg")
    assert (ROOT / "docs" / "pictures" / "cache_ring.svg").read_text().startswith("<?xml")


def test_works_with_names_what_is_there() -> None:
    """Every line of the tables names a test or a script of this repository."""
    lines = [line for line in (ROOT / "docs" / "works-with.md").read_text().splitlines() if line.startswith("| ")]
    rows = [line for line in lines if not line.startswith(("| works |", "| refused |", "| know |", "| ---"))]
    assert len(rows) > 30
    for row in rows:
        file = ""
        names = re.findall(r"`([^`]+)`", row.rsplit(" | ", 1)[1])
        assert names, row
        for name in names:
            path, _, test = name.partition("::")
            file = path or file  # "::name" is in the file named before it
            assert (ROOT / file).is_file(), row
            assert file.startswith("findings/") or f"def {test}(" in (ROOT / file).read_text(), name


# as the pages call what is installed by another name
PACKAGES = {
    "lm-evaluation-harness": "lm-eval", "open_clip": "open-clip-torch", "pytorch": "torch",
    "schedule-free": "schedulefree",
}  # fmt: skip


def test_works_with_and_the_hosts_say_the_releases_that_are_installed() -> None:
    """Every name with a number after it, in the headings and cells, is pinned so."""
    pins = {}
    for file in ("constraints.txt", "constraints-others.txt"):
        for line in (ROOT / file).read_text().splitlines():
            name, _, rest = line.partition("==")
            pins.setdefault(name.lower().replace("_", "-"), set()).add(rest.partition(" ")[0])
    page = (ROOT / "docs" / "works-with.md").read_text()
    headings = "\n".join(line for line in page.splitlines() if line.startswith("## "))
    said = re.findall(r"([\w-]+) (\d+(?:\.\d+)+)", headings) + re.findall(r"(ONNX|onnxruntime) (\d+\.\d+)", page)
    hosts = (ROOT / "docs" / "swap" / "hosts.md").read_text().partition("## Other libraries")[2]
    said += re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", hosts, re.MULTILINE)
    assert len(said) > 25
    for shown, version in said:
        name = shown.lower().replace("_", "-")
        found = pins[PACKAGES.get(shown.lower(), name)]
        assert any(f"{pin}.".startswith(f"{version}.") for pin in found), f"{shown} {version} is {found}"


def test_every_finding_is_named_where_its_users_look() -> None:
    page, listed = (ROOT / "docs" / "works-with.md").read_text(), (ROOT / "findings" / "README.md").read_text()
    for script in (ROOT / "findings").glob("*.sh"):
        assert f"findings/{script.name}" in page
        assert f"({script.name})" in listed


def test_nothing_is_to_be_installed_from_an_index_that_lacks_it() -> None:
    """The name is on no index: from a clone it is ``pip install -e ".[lab]"``."""
    texts = [
        p for folder in ("hypermlp", "kernels", "benchmarks", "docs", "examples") for p in (ROOT / folder).rglob("*")
    ]
    texts = [p for p in texts if p.suffix in (".py", ".md", ".sh")] + sorted(ROOT.glob("*.md"))
    assert len(texts) > 100
    found = [str(p) for p in texts if re.search(r"pip install[^\n]*[\s\"'`]hypermlp\b", p.read_text())]
    assert found == []


def test_every_public_name_has_an_entry() -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    entries = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    for module in ("hypermlp", "hypermlp.cache", "hypermlp.generation", "hypermlp.models", "hypermlp.integrations"):
        for name in importlib.import_module(module).__all__:
            assert {f"{module}.{name}", f"hypermlp.{name}"} & entries, f"{module}.{name}"

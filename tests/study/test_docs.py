"""The documentation's page is filled from the records."""

from __future__ import annotations

import re
from pathlib import Path

from hypermlp_lab.study import ledger
from hypermlp_lab.study.plan import Cell, Variant, search
from hypermlp_lab.study.presets import preset
from tests.study.fakes import record
from tests.test_docs import ROOT, load


def test_the_page_is_filled_in(tmp_path: Path) -> None:
    hooks = load(ROOT / "docs" / "hooks.py")
    assert "make study" in hooks.study("answer", tmp_path)
    assert hooks.study("claims", tmp_path) == ""
    assert hooks.picture("text", tmp_path) == ""
    study = preset("cpu")
    run = search(study, Cell(Variant("S-pc"), study.text), {})[0][0]
    ledger.append(tmp_path / "benchmarks" / "results" / "study" / "text.jsonl", record(run, 1.5))
    assert "not complete" in hooks.study("answer", tmp_path)
    assert "| HyperGLU beats softmax" in hooks.study("claims", tmp_path)
    page = (ROOT / "docs" / "does-it-work.md").read_text()
    filled = hooks.on_page_markdown(page)
    assert len(re.findall(r"^<!-- study: ", page, re.MULTILINE)) == 11
    assert "<!--" not in filled


def test_labels_are_explained_before_they_are_used() -> None:
    """On every page that has them, in the order in which it is read."""
    explained = {
        "README.md": "(Labels: `S` softmax",
        "docs/does-it-work.md": "## Labels",
        "benchmarks/hypermlp_lab/study/report.html.j2": "<p>Labels name variants",
    }
    for page, words in explained.items():
        before, found, _ = (ROOT / page).read_text().partition(words)
        assert found, page
        for used in ("<!-- study: ", "{{ table(", "{{ figure(", "`!`"):
            assert used not in before, page
        assert not re.search(r"\b[SRG]-[pcgqvh12o]", before), page

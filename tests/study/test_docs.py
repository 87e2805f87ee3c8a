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

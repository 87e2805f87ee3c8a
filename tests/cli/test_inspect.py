"""``hypermlp inspect``: from a checkpoint and a text to a page that needs nothing else."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
import torch

from hypermlp import inspect
from hypermlp.models import LanguageModel
from hypermlp_lab.training import Trainer, TrainingConfig, load_corpus
from hypermlp_lab.training.checkpoint import load_model
from hypermlp_lab.training.recipe import byte_model

TEXT = "def function(x):\n    return x < 3\n" * 9
MIXING = ("diagonal", "low-rank", "ranks", "response-0")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.py"
    file.write_text(TEXT)
    return file


def run_of(mixer: str, folder: Path, text: Path) -> Path:
    torch.manual_seed(0)
    model = LanguageModel(byte_model(mixer, hidden_size=16, num_layers=1, seq_len=16))
    Trainer(
        model, load_corpus(text, validation_fraction=0.2), TrainingConfig(1, batch_size=2, seq_len=16), out=folder
    ).run()
    return folder


@pytest.fixture(scope="module")
def looked(trained, text, tmp_path_factory):
    from typer.testing import CliRunner

    from hypermlp_lab.cli import build_app

    out = tmp_path_factory.mktemp("looked") / "page"
    arguments = ["inspect", trained, "--text", text, "--out", out, "--start", 4, "--length", 24, "--device", "cpu"]
    result = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert result.output == f"Page: {out / 'index.html'}\n"
    return out


def test_the_page_stands_alone_and_has_all_pictures(looked):
    page = (looked / "index.html").read_text()
    names = re.findall(r'id="figure-([\w-]+)"', page)
    assert sorted(names) == sorted(("weights-0", "reach", "active", *MIXING))
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    for link in re.findall(r'(?:href|src)="([^"]*)"', page):
        assert link.startswith("data:") or link.removeprefix("#") in ids
    assert "<script" not in page
    assert "{{" not in page
    assert "24 bytes of" in page
    assert unescape(re.search(r"<pre[^>]*>(.*?)</pre>", page, re.DOTALL)[1]) == TEXT[4:28]
    for name in names:
        assert (looked / f"{name}.svg").read_text().startswith("<?xml")
        assert (looked / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_the_numbers_of_the_library(looked, trained):
    ids = torch.tensor([list(TEXT.encode()[4:28])])
    (call,) = inspect.record(load_model(trained), ids)
    maps = inspect.head_maps(call)
    page = (looked / "index.html").read_text()
    for head in range(2):
        numbers = [
            f"{100 * float(inspect.active_share(maps)[head]):.1f} %",
            f"{float(inspect.reach(maps).mean[head]):.1f}",
        ]
        row = re.search(rf"<td>blocks.0.attention</td><td>head {head}</td>(.*?)</tr>", page, re.DOTALL)[1]
        cells = re.findall(r"<td>(.*?)</td>", row)
        assert cells[:2] == numbers
        assert cells[5] == f"{100 * float(inspect.negative_share(maps).by_number[head]):.1f} %"


@pytest.mark.parametrize(
    ("mixer", "absent"), [("softmax", ("active", *MIXING)), pytest.param("G-12", (), marks=pytest.mark.slow)]
)
def test_what_a_model_does_not_have_is_not_shown(command, mixer, absent, text, tmp_path):
    run = run_of(mixer, tmp_path / "run", text)
    result = command("inspect", run, "--text", text, "--out", tmp_path / "page", "--length", 16)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page" / "index.html").read_text()
    for name in ("weights-0", "reach", "active", *MIXING):
        assert (f'id="figure-{name}"' in page) == (name not in absent)
    assert ("Sequence mixing" in page) == (not absent)
    assert ("at each position" in page) == (mixer == "G-12")
    if mixer == "softmax":
        assert page.count("<td>0.0 %</td>") == 2 * 4
        assert page.count("<td>-</td>") == 4


def test_nothing_is_written_over_silently(command, trained, text, looked, tmp_path):
    few_pictures = run_of("softmax", tmp_path / "run", text)
    again = ["inspect", trained, "--text", text, "--out", looked, "--length", 8]
    before = (looked / "index.html").read_bytes()
    result = command(*again)
    assert result.exit_code == 2
    assert "--fresh" in result.output
    assert (looked / "index.html").read_bytes() == before
    other = tmp_path / "notes"
    other.mkdir()
    (other / "mine.txt").touch()
    assert command("inspect", trained, "--text", text, "--out", other, "--length", 8).exit_code == 2
    assert [file.name for file in other.iterdir()] == ["mine.txt"]
    assert command("inspect", few_pictures, "--text", text, "--out", other, "--length", 8, "--fresh").exit_code == 0
    assert (other / "mine.txt").exists()
    assert (other / "index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "missing.txt"], "missing.txt cannot be read"),
        (["--start", 10**6], "has 306 bytes, none of them from --start 1000000 on"),
        (["--device", "meta"], "meta holds no values: say cpu, cuda"),
    ],
)
def test_mistakes_get_one_line(command, trained, text, arguments, message, tmp_path):
    result = command("inspect", trained, "--text", text, "--out", tmp_path / "page", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "page").exists()


def test_a_folder_without_a_checkpoint(command, text, tmp_path):
    result = command("inspect", tmp_path, "--text", text, "--out", tmp_path / "page")
    assert (result.exit_code, "no checkpoint" in result.output) == (2, True)

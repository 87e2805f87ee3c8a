"""Every command of the program: its paths are looked at before any work, and misspelt words answered with the nearest.

A command, or a path of one, that is not in the table fails the first test.
"""

from __future__ import annotations

import errno
import inspect
import os
import re
import shlex
import stat
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import pytest
import torch
import typer

from hypermlp_lab import cli
from hypermlp_lab.bench import command as bench_command
from hypermlp_lab.study.runner import Runner
from hypermlp_lab.training import Trainer
from tests.cli.conftest import TINY

Kind = Literal["read", "file", "folder"]


class Case(NamedTuple):
    """A command.

    Attributes:
        paths: its options and arguments that are paths: what they read, or write.
        arguments: with which it runs, paths but those it writes included; ``{text}`` and ``{run}`` are there.
        quick: whether a test can run it.
    """

    paths: dict[str, Kind]
    arguments: str
    quick: bool = True


_FEW = shlex.join(TINY)
_BENCH: dict[str, Kind] = {"out": "file", "plot": "file"}
_MEASURED = "--lengths 32 --hidden-size 16 --repeats 1"
COMMANDS: dict[str, Case] = {
    "train": Case({"data": "read", "out": "folder"}, f"--data {{text}} --steps 1 {_FEW}"),
    "demo": Case({"data": "read", "out": "folder"}, f"--data {{text}} --steps 1 {_FEW}"),
    "generate": Case({"checkpoint": "read"}, "{run} --max-new-tokens 1"),
    "doctor": Case({}, "--seconds 0", quick=False),
    "plan": Case({}, "--params 1e8"),
    "inspect": Case({"checkpoint": "read", "text": "read", "out": "folder"}, "{run} --text {text}", quick=False),
    "bench attention": Case(_BENCH, f"{_MEASURED} --only softmax"),
    "bench decode": Case(_BENCH, f"{_MEASURED} --steps 1 --only softmax"),
    "bench models": Case(_BENCH, "--lengths 16 --batch 1 --repeats 1 --only softmax"),
    "study mad": Case({"out": "folder"}, "--preset smoke", quick=False),
    "study text": Case({"data": "read", "out": "folder"}, "--preset smoke", quick=False),
    # its data is a name in the records, which must be the same
    "study report": Case({"data": "read", "out": "folder", "pictures": "folder"}, "--preset smoke", quick=False),
}
WRITTEN = [(name, path) for name, case in COMMANDS.items() for path, kind in case.paths.items() if kind != "read"]
QUICK = [name for name, case in COMMANDS.items() if case.quick]


def commands(app: typer.Typer, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command by its full name, and the function behind it."""
    for command in app.registered_commands:
        yield f"{before}{command.name or command.callback.__name__}", command.callback
    for group in app.registered_groups:
        yield from commands(group.typer_instance, f"{before}{group.name} ")


def is_path(hint: Any) -> bool:
    return hint is Path or (get_origin(hint) in (Union, types.UnionType) and Path in get_args(hint))


FUNCTIONS = dict(commands(cli.build_app()))


def options(name: str) -> list[str]:
    given = inspect.signature(FUNCTIONS[name]).parameters.keys() - {"context", "checkpoint"}
    return ["--" + option.replace("_", "-") for option in sorted(given)]


@pytest.fixture
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("a text") / "text.txt"
    file.write_text("def function(x):\n    return x\n" * 100)
    return file


@pytest.fixture
def arguments(text, trained):
    def of(name: str) -> list[str]:
        given = shlex.split(COMMANDS[name].arguments)
        return [*name.split(), *(argument.format(text=text, run=trained) for argument in given)]

    return of


@pytest.fixture
def idle(monkeypatch) -> None:
    """Nothing is trained or measured."""

    def work(*args: Any, **options: Any) -> None:
        raise AssertionError("work began before its paths were looked at")

    monkeypatch.setattr(torch.nn.Module, "__call__", work)
    monkeypatch.setattr(Trainer, "run", work)
    monkeypatch.setattr(Runner, "run", work)
    monkeypatch.setattr(bench_command, "run", work)


def test_every_command_and_each_of_its_paths_is_in_the_table() -> None:
    found = {
        name: {path for path, hint in get_type_hints(function).items() if is_path(hint)}
        for name, function in FUNCTIONS.items()
    }
    assert found == {name: set(case.paths) for name, case in COMMANDS.items()}


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("mistake", ["occupied", "below a file", "forbidden", "a dangling link"])
@pytest.mark.parametrize(("name", "path"), WRITTEN)
def test_places_are_tried_first(command, arguments, idle, monkeypatch, tmp_path, name, path, mistake) -> None:
    """One line that names the place and says what to do, before any work, and nothing is made."""
    kind = COMMANDS[name].paths[path]
    place = tmp_path / "a place" / ("results.json" if path == "out" else "picture.png")
    place.parent.mkdir()
    if mistake == "occupied" and kind == "folder":
        place.write_text("notes")
    elif mistake == "occupied":
        place.mkdir()
    elif mistake == "a dangling link":
        place.symlink_to(tmp_path / "nowhere")
    elif mistake == "below a file":
        place.write_text("notes")
        place = place / ("below.json" if path == "out" else "below.png")
    else:  # the superuser may write everywhere, so permissions say nothing to it
        able = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place.parent and able(path, mode))
    before = contents(tmp_path)
    more = [] if path == "out" or name.startswith("study") else ["--out", str(tmp_path / "out.json")]
    result = command(*arguments(name), *more, f"--{path}", place)
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) == 1, result.output
    assert result.output.startswith(f"hypermlp: {place}")
    assert "choose another" in result.output
    assert contents(tmp_path) == before


# files of a run, which stand in the folder that is written
INSIDE = {
    "train": ("options.json", "report.json", "curves.png"),
    "demo": ("report.json", "curves.png"),
    "inspect": ("index.html",),
    "study mad": ("mad.jsonl",),
    "study text": ("text.jsonl",),
    "study report": ("report/index.html",),
}


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in INSIDE.items() for file in files])
def test_files_in_a_folder_are_tried_first(command, arguments, idle, tmp_path, name, file) -> None:
    (tmp_path / file).mkdir(parents=True)
    fresh = ["--fresh"] if "--fresh" in options(name) else []
    result = command(*arguments(name), "--out", tmp_path, *fresh)
    assert result.exit_code == 2, result.output
    assert result.output.startswith(f"hypermlp: {tmp_path / file} cannot be written: it is a folder, and a file is to")


def test_a_folder_by_a_name_that_is_none_is_no_file(command, arguments, idle, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = command(*arguments("bench attention"), "--out", ".")
    assert result.exit_code == 2, result.output
    assert result.output.startswith(
        "hypermlp: . cannot be written: it is a folder, and a file is to be written; name a"
    )


def test_a_demo_needs_the_folders_of_both_models(command, arguments, idle, tmp_path) -> None:
    (tmp_path / "softmax").write_text("notes")
    result = command(*arguments("demo"), "--out", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path / 'softmax'} cannot be made a folder" in result.output


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (name, path)
        for name, case in COMMANDS.items()
        for path, kind in case.paths.items()
        if kind == "read" and name != "study report"
    ],
)
def test_what_is_read_is_tried_first(command, arguments, idle, tmp_path, name, path) -> None:
    given = arguments(name)
    missing = str(tmp_path / "no such place")
    if path == "checkpoint":
        given[1] = missing
    else:
        given += [f"--{path}", missing]
    more = ["--out", str(tmp_path / "out")] if "out" in COMMANDS[name].paths else []
    result = command(*given, *more)
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) == 1
    assert missing in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", QUICK)
def test_what_is_written_is_in_runs_and_has_the_usual_permissions(
    command, arguments, monkeypatch, tmp_path, name
) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o027)
    try:
        result = command(*arguments(name))
    finally:
        os.umask(before)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} <= {"runs"}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.name != ".lock"}
    assert all(mode == (0o750 if path.is_dir() else 0o640) for path, mode in modes.items()), modes


def test_studies_write_in_runs() -> None:
    from hypermlp_lab.study.command import RESULTS

    assert RESULTS.parts[0] == "runs"


def test_what_does_not_end_leaves_what_was_measured_before(command, arguments, monkeypatch, tmp_path) -> None:
    given = [*arguments("bench attention"), "--out", str(tmp_path / "out.json")]
    assert command(*given).exit_code == 0
    before = contents(tmp_path)
    assert set(before) == {str(tmp_path / "out.json"), str(tmp_path / "out.png")}
    original = bench_command.run

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    def empty(*args: Any) -> Any:
        report = original(*args)
        return report | {"rows": [row | {"skipped": "it needs more memory"} for row in report["rows"]]}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for run, status, words in ((interrupted, 130, ""), (empty, 1, "as they were")):
        monkeypatch.setattr(bench_command, "run", run)
        result = command(*given)
        assert result.exit_code == status
        assert words in result.output
        assert contents(tmp_path) == before
    monkeypatch.setattr(bench_command, "run", original)
    monkeypatch.setattr(os, "fsync", full)
    result = command(*given)
    assert result.exit_code == 2
    assert "No space left on device; free space" in result.output
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("out", "plot", "message"),
    [
        ("out.json", "picture.xyz", "must end in .png, .svg, .pdf"),
        ("out.json", "picture", "must end in .png, .svg, .pdf"),
        ("out.png", None, "would be written over it"),
        ("out.svg", "../{folder}/out.svg", "would be written over it"),
    ],
)
def test_pictures_that_cannot_be(command, arguments, idle, tmp_path, out, plot, message) -> None:
    more = [] if plot is None else ["--plot", tmp_path / plot.format(folder=tmp_path.name)]
    result = command(*arguments("bench attention"), "--out", tmp_path / out, *more)
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["study mad", "study report"])
def test_commands_to_copy_are_quoted(command, arguments, monkeypatch, tmp_path, name) -> None:
    """Those of ``train`` are in test_runs.py."""
    out = tmp_path / "my study's"
    monkeypatch.setattr(Runner, "run", lambda self: True)
    result = command(*arguments(name), "--out", out)
    printed = re.search(r"(?:with|study report) (--preset .*?)(?: first)?$", result.output.strip())
    assert shlex.split(printed[1]) == ["--preset", "smoke", "--out", str(out)]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_misspelt_command_or_option_is_answered_with_the_nearest(command, name) -> None:
    """By typer itself, once for all commands."""
    group, last = name.split()[:-1], name.split()[-1]
    result = command(*group, last[0] + last[2:])
    assert result.exit_code == 2
    assert last in words(result.output)
    option = options(name)[-1]
    result = command(*name.split(), option[:-1], "1")
    assert result.exit_code == 2
    assert option in words(result.output), result.output


def words(output: str) -> set[str]:
    return set(re.findall(r"[\w-]+", output))

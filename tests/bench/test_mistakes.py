"""Options of ``hypermlp bench`` that cannot be are refused before anything is measured."""

import pytest
from typer import testing as typer_testing

from hypermlp_lab import cli
from hypermlp_lab.bench import command


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(command, "run", None)  # nothing is measured

    def invoke(*arguments):
        result = typer_testing.CliRunner().invoke(cli.build_app(), ["bench", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


@pytest.mark.parametrize("kind", ["attention", "decode"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--seconds", "nan"],
        ["--seconds", "inf"],
        ["--lengths", str(10**400)],
        ["--seconds", -1],
        ["--threads", 0],
        ["--threads", 10**11],
        ["--seed", 10**20],
        ["--seed", -1],
        ["--device", "meta"],
        ["--device", "cpu:x"],
        ["--device", "cpu:"],
        ["--device", "auto"],
        ["--device", "cuda:77"],
        ["--lengths", "0"],
        ["--lengths", "x"],
        ["--lengths", ""],
        ["--only", "nothing"],
        ["--only", ""],
        ["--dtype", "int8"],
        ["--hidden-size", 0],
    ],
)
def test_options(bench, tmp_path, kind, arguments):
    result = bench(kind, "--out", tmp_path / "out.json", *arguments)
    assert result.exit_code == 2, result.output
    assert arguments[0] in result.output
    assert "Traceback" not in result.output
    if arguments[0] == "--device":  # this command has no auto
        assert "auto" not in result.output.replace("'auto'", "")


@pytest.mark.parametrize(
    "arguments", [["--memory-limit", "nan"], ["--memory-limit", "1e300"], ["--memory-limit", -1], ["--level", "x"]]
)
def test_options_of_attention(bench, tmp_path, arguments):
    result = bench("attention", "--out", tmp_path / "out.json", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output

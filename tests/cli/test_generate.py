import subprocess
import sys

import pytest
import torch

from hypermlp.generation import generate
from hypermlp_lab.text import decode
from hypermlp_lab.training.checkpoint import load_model
from hypermlp_lab.training.demo import printable


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_generate_nothing(command, trained, stream):
    result = command("generate", trained, "--prompt", "def ", "--max-new-tokens", 0, *stream)
    assert (result.exit_code, result.output) == (0, "def \n")


def test_generate_at_the_smallest_temperature_is_greedy(command, trained):
    texts = [
        command("generate", trained, "--max-new-tokens", 12, "--temperature", temperature, "--top-p", 1).output
        for temperature in ("0", "1e-300", "5e-324", "1e-40")
    ]
    assert len(set(texts)) == 1


def test_generate_from_bytes_that_are_no_utf8(trained):
    """In a process: how arguments come is the operating system's affair."""
    command = [sys.executable, "-c", "from hypermlp_lab.cli import main; main()", "generate"]
    arguments = [str(trained), "--max-new-tokens", "4", "--temperature", "0", "--prompt", b"a\xffb"]
    result = subprocess.run([*command, *arguments], capture_output=True, check=True)
    expected = generate(load_model(trained), torch.tensor([list(b"a\xffb")]), 4, temperature=0)
    assert result.stdout.decode().strip() == printable(decode(expected[0])).strip()


def test_the_bytes_of_one_character_in_prompt_and_text(command, trained, monkeypatch):
    whole = "\N{SNOWMAN}".encode()
    steps = [torch.tensor([byte]) for byte in whole[2:]]
    monkeypatch.setattr("hypermlp_lab.commands.stream_tokens", lambda *args, **options: iter(steps))
    prompt = whole[:2].decode(errors="surrogateescape")
    for more in ([], ["--stream"]):
        assert command("generate", trained, "--prompt", prompt, *more).output == "\N{SNOWMAN}\n"


def test_samples_come_in_groups_that_fit_into_memory(command, trained, monkeypatch):
    """As many as asked for, no two groups alike, and the first before the last is drawn."""
    monkeypatch.setattr("hypermlp_lab.commands._SAMPLES_AT_ONCE", 2)
    arguments = ["generate", trained, "--prompt", "a", "--max-new-tokens", 8, "--seed", 3]
    lines = command(*arguments, "--samples", 5).output
    assert lines == command(*arguments, "--samples", 5).output
    assert lines.startswith(command(*arguments, "--samples", 2).output)
    heads = [line for line in lines.splitlines() if line.startswith("--- sample ")]
    assert heads == [f"--- sample {number} ---" for number in range(1, 6)]
    neighbour = command(*arguments[:-1], 4, "--samples", 2).output
    first, second = neighbour.replace("--- sample 1 ---\n", "").split("--- sample 2 ---\n")
    assert first not in lines
    assert second not in lines
    assert "--- sample" not in command(*arguments).output

    class EnoughError(Exception):
        """Printed so far is what was wanted."""

    printed = []

    def echo(text):
        printed.append(text)
        if len(printed) == 5:
            raise EnoughError

    monkeypatch.setattr("typer.echo", echo)
    with pytest.raises(EnoughError):
        command(*arguments, "--samples", 10**9)
    assert len(set(printed)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", -1], "max_new_tokens"),
        (["--temperature", -1], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "inf"], "temperature"),
        (["--top-k", 0], "top_k"),
        (["--top-p", "nan"], "top_p"),
        (["--top-p", 2], "top_p"),
        (["--repetition-penalty", 0], "repetition_penalty"),
        (["--repetition-penalty", "inf"], "repetition_penalty"),
        (["--stop", ""], "stop"),
        (["--samples", 0], "--samples"),
        (["--samples", -5], "--samples"),
        (["--samples", 2, "--stream"], "--stream"),
        (["--prompt", ""], "--prompt"),
        (["--seed", 10**30], "seed"),
        (["--device", "meta"], "meta holds no values: say cpu, cuda"),
        (["--device", "cuda:77"], "cuda:77"),
    ],
)
def test_generate_mistakes_get_one_line(command, trained, arguments, message):
    result = command("generate", trained, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_out_of_memory_is_one_line(command, trained, monkeypatch):
    monkeypatch.setattr("hypermlp_lab.commands.load_byte_model", lambda *args, **options: torch.empty(10**15))
    result = command("generate", trained)
    assert result.exit_code == 2
    assert "out of memory" in result.output


def test_generate_without_a_checkpoint(command, tmp_path, trained):
    result = command("generate", tmp_path)
    assert result.exit_code == 2
    assert "no checkpoint" in result.output
    with pytest.raises(FileNotFoundError, match=f"no checkpoint in '{trained.parent}': there is one in '{trained}'"):
        load_model(trained.parent)

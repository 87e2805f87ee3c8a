"""``hypermlp plan``: what it chooses, prints and refuses. Its formulas: ``tests/plan``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hypermlp import HyperConfig
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp_lab.plan import search
from hypermlp_lab.plan.command import plan
from hypermlp_lab.plan.costs import Mesh, Step
from hypermlp_lab.plan.search import Limits, choose
from hypermlp_lab.plan.sizes import sized_model
from hypermlp_lab.training.recipe import parameter_count


def run(*arguments):
    """This command alone, which is there faster than all of them."""
    app = typer.Typer()
    app.command()(plan)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def planned(*arguments):
    return json.loads(run("--json", *arguments).stdout)


@pytest.mark.parametrize("mixer", ["hyperglu", "hypermlp", "relu", "softmax"])
@pytest.mark.parametrize("params", [2e8, 7e9, 7e10])
def test_a_model_of_about_the_parameters(mixer, params):
    model = sized_model(params, mixer=mixer, seq_len=4096)
    assert abs(parameter_count(model) / params - 1) < 0.05
    assert model.attention.mixer == mixer
    assert 0.5 < model.hidden_size / model.num_layers / 128 < 2


def test_a_model_of_a_given_width_or_depth():
    wide = sized_model(1e9, seq_len=512, hidden_size=4096)
    deep = sized_model(1e9, seq_len=512, num_layers=40)
    assert (wide.hidden_size, deep.num_layers) == (4096, 40)
    for model in (wide, deep):
        assert abs(parameter_count(model) / 1e9 - 1) < 0.2
    exact = sized_model(None, seq_len=64, hidden_size=32, num_layers=2, num_heads=4, max_lag=16, vocab_size=99)
    expected = LanguageModelConfig(99, 32, 2, HyperConfig(32, 4, max_lag=16))
    assert exact == expected
    assert parameter_count(exact) == LanguageModel(exact).num_parameters()


def test_the_command_prints_all_parts(command):
    result = command("plan", "--params", "7e9", "--seq-len", 131072, "--gpus", 64)
    assert result.exit_code == 0
    for part in ("mesh: data ", "weights", "gradients", "optimizer", "operator", "activations", "logits", "at once"):
        assert part in result.output
    for part in ("computed a step by each GPU", "recomputed", "sent a step by each GPU", "sequence", "together"):
        assert part in result.output
    assert max(map(len, result.output.splitlines())) <= 120


@pytest.mark.parametrize("more", [["--checkpointing"], ["--no-checkpointing", "--memory-gb", 1e4]])
def test_every_row_says_what_it_stands_for(more):
    lines = run("--params", "7e9", "--seq-len", 131072, "--gpus", 64, *more).stdout.splitlines()
    rows = {words[0]: words for words in (line.split(maxsplit=2) for line in lines if line.startswith("  "))}
    plain = {"forward", "backward", "together"}
    assert {name for name, words in rows.items() if len(words) == 2} == plain
    assert rows.keys() - plain >= {"weights", "operator", "block", "at", "heads", "sequence", "recomputed"}
    assert ("once more" in " ".join(rows["operator"])) == ("--checkpointing" in more)


def test_the_page_shows_what_it_prints():
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    section = page.partition("## What it takes\n")[2].partition("\n- ")[0]
    command, *shown = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    printed = [line.strip() for line in run(*command.split()[2:]).stdout.splitlines()]
    assert len(shown) > 10
    assert set(shown) <= set(printed)


def test_json_is_what_the_formulas_say():
    report = planned("--hidden-size", 256, "--layers", 3, "--seq-len", 512, "--gpus", 4, "--batch", 8)
    model = sized_model(None, seq_len=512, hidden_size=256, num_layers=3)
    step = Step(model, 512, 8, Mesh(data=4), passes=1)
    assert report["fits"]
    assert report["mesh"] == {"data": 4, "heads": 1, "sequence": 1}
    assert report["memory_bytes"] == step.memory()
    assert report["memory_bytes_peak"] == step.peak()
    assert (report["flops"], report["sent_bytes"]) == (step.flops(), step.sent())
    assert report["flops_total"] == 4 * report["flops_per_gpu"] == sum(step.flops().values())


def test_what_fits_is_chosen_in_order():
    """Less memory: more passes, then checkpointing, then processes that share a sequence, then nothing."""
    model = sized_model(None, seq_len=4096, hidden_size=1024, num_layers=8)
    step = Step(model, 4096, 8)
    found = []
    for memory in (80e9, 6e9, 4e9, 2.5e9, 1e8):
        chosen, fits = choose(step, Limits(gpus=4, per_node=4, memory=memory))
        assert fits == (chosen.peak() <= memory)
        found.append((chosen.mesh.data, chosen.checkpointing, chosen.passes, fits))
    assert found[0] == (4, False, 1, True)
    assert found[1] == (4, False, 2, True)
    assert found[2][:2] == (4, True)
    assert found[3][0] < 4
    assert found[4][3] is False
    for memory in (80e9, 2.5e9):
        chosen, _ = choose(step, Limits(4, 4, memory, heads=2, sequence=2, checkpointing=True))
        assert (chosen.mesh, chosen.checkpointing) == (Mesh(1, 2, 2), True)


def test_rows_fewer_than_gpus_are_shared():
    report = planned("--params", "1e9", "--seq-len", 8192, "--gpus", 16, "--batch", 2)
    mesh = report["mesh"]
    assert mesh["data"] == 2
    assert mesh["heads"] * mesh["sequence"] == 8
    fixed = planned("--params", "1e9", "--seq-len", 8192, "--gpus", 16, "--batch", 2, "--heads", 2)
    assert fixed["mesh"] == {"data": 2, "heads": 2, "sequence": 4}


def test_divisors():
    for number in range(1, 200):
        assert search._divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_what_does_not_fit_is_said_with_status_1():
    result = run("--params", "7e10", "--seq-len", 8192, "--gpus", 8)
    assert result.exit_code == 1
    assert "no mesh fits: this one, of the least memory, takes" in result.output
    assert "--gpus or --memory-gb" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --params, or --hidden-size and --layers both"),
        (["--params", "7e9", "--hidden-size", 64, "--layers", 2], "and no --params"),
        (["--params", "0"], "--params must be a number of parameters such as 7e9, got 0"),
        (["--params", "nan"], "--params must be a number"),
        (["--params", "1000"], "--params 1000 has no model near it: hidden size 256 and 1 layers make"),
        (
            ["--params", "7e9", "--mixer", "mamba"],
            "--mixer 'mamba' is unknown: known are hyperglu, hypermlp, relu, softmax",
        ),
        (["--params", "7e9", "--mixer", "softmax", "--max-lag", 8], "--max-lag 8 is for hyperglu and hypermlp"),
        (["--params", "7e9", "--dtype", "int8"], "--dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (["--params", "7e9", "--gpus", 0], "--gpus must be positive, got 0"),
        (["--params", "7e9", "--gpus", 10**400], "--gpus must be at most 1e+09, got an integer of 1329 bits"),
        (["--params", "7e9", "--batch", 10**10], "--batch must be at most 1e+09, got 10000000000"),
        (["--params", "7e9", "--seq-len", -1], "--seq-len must be positive, got -1"),
        (["--params", "7e9", "--memory-gb", "nan"], "--memory-gb must be positive, got nan"),
        (["--params", "7e9", "--headroom", 1], "--headroom must be a share from 0 to below 1, got 1.0"),
        (["--params", "7e9", "--layers", 0], "num_layers must be a positive integer, got 0"),
        (["--params", "7e9", "--hidden-size", 0], "hidden_size must be a positive integer, got 0"),
        (["--params", "7e9", "--vocab-size", 0], "vocab_size must be a positive integer, got 0"),
        (["--params", "7e9", "--num-heads", 7], "choose a multiple"),
        (["--params", "7e9", "--heads", 3], "no mesh of --gpus 8 --heads 3: data x heads x sequence must be all GPUs"),
        (
            ["--params", "7e9", "--batch", 1, "--mixer", "softmax", "--heads", 1],
            "attention is planned on whole sequences",
        ),
        (["--params", "7e9", "--batch", 1, "--seq-len", 4097], "--seq-len 4097 a multiple of 2 times"),
    ],
)
def test_mistakes_get_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1

import io

import pytest
from rich.console import Console

from hypermlp_lab.training.display import TrainingDisplay
from hypermlp_lab.training.run_report import RunReport, table, verdict


def shown(terminal, start=0):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120)
    with TrainingDisplay(console, "HyperGLU", 10, start) as display:
        for step in range(start + 1, 11):
            display.on_step(step, 2.5, 1234.4)
        display.on_evaluation({"step": 10, "bits_per_byte": 3.25})
    return file.getvalue()


def test_terminal_gets_a_bar():
    text = shown(terminal=True)
    for part in ("\x1b[", "HyperGLU", "10/10", "loss 2.500", "1,234 tokens/s", "0:00:00", "3.2500 bits per byte"):
        assert part in text


@pytest.mark.parametrize("start", [0, 9])
def test_other_outputs_get_plain_lines(start):
    text = shown(terminal=False, start=start)
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.splitlines() == [
        "HyperGLU  step 10/10  loss 2.500  1,234 tokens/s  0 s left",
        "HyperGLU  step 10/10  validation 3.2500 bits per byte",
    ]


def report(name, bits, memory=2**20):
    return RunReport(name, 1000, bits, 10.0, memory, [], {}, {})


def test_verdict_names_the_better_one_whichever_it_is():
    assert verdict([report("a", 2.0), report("b", 1.5)]).startswith("b ends lower than a by 0.5000")
    assert verdict([report("a", 1.0), report("b", 1.5)]).startswith("a ends lower than b")
    assert verdict([report("a", 1.0), report("b", 1.00001)]) == "a and b end level."


def test_table_shows_unknown_memory():
    console = Console(file=io.StringIO(), width=120)
    console.print(table([report("a", 2.0, None), report("b", 1.5)]))
    assert "unknown" in console.file.getvalue()
    assert "1 MiB" in console.file.getvalue()

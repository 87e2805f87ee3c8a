"""What the paper says: its numbers, its claims, and the pairs of variants that differ in one component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Published(NamedTuple):
    """A variant in the paper's study, of one run each.

    Attributes:
        tasks: mean accuracy on MAD's tasks, percent; None where we know of no number.
        text: final loss of the language model, nats a token.
        quoted: from the authors' table; else read off their plot, to about 0.005.
    """

    tasks: float | None
    text: float
    quoted: bool = True


# Lu & Yang, arXiv 2602.12601, and the authors' talk about it
PUBLISHED = {
    "S-pc": Published(80.15, 3.0466),
    "R-pc": Published(80.50, 3.0481),
    "R-cg-q": Published(66.78, 3.0828),
    "R-cg-q-12o": Published(81.01, 2.9956),
    "R-12!": Published(46.27, 4.3567),
    "R-12o!": Published(81.82, 3.0497),
    "G-cg-q-12o": Published(81.12, 2.9865),
    "R-cg-q-1o": Published(None, 3.002, quoted=False),
    "R-g-q-12o": Published(None, 3.013, quoted=False),
    "G-cg-q": Published(None, 3.058, quoted=False),
    "G-cg-q-1o": Published(None, 2.987, quoted=False),
}


@dataclass(frozen=True)
class Claim:
    """``better`` beats ``other``; or is level with it, where ``level`` says so.

    Args:
        text: the claim in words.
        better, other: variants.
        level: the claim is that neither is better.
    """

    text: str
    better: str
    other: str
    level: bool = False

    def published(self, measure: str) -> float | None:
        """The paper's advantage of ``better``, see :func:`published`."""
        return published(self.better, self.other, measure)


def published(better: str, other: str, measure: str) -> float | None:
    """The paper's advantage of ``better``: percent points of accuracy, or nats less of loss; None if not known."""
    first, second = PUBLISHED.get(better), PUBLISHED.get(other)
    if first is None or second is None:
        return None
    if measure == "text":
        return second.text - first.text
    return None if first.tasks is None or second.tasks is None else first.tasks - second.tasks


# of a claim that two variants are level: percent points, nats
LEVEL_MARGIN = {"tasks": 1.0, "text": 0.02}

CLAIMS = (
    Claim("HyperGLU beats softmax attention with RoPE and convolutions", "G-cg-q-12o", "S-pc"),
    Claim("HyperMLP beats softmax attention with RoPE and convolutions", "R-cg-q-12o", "S-pc"),
    Claim("A gated linear unit is better than a ReLU", "G-cg-q-12o", "R-cg-q-12o"),
    Claim("Sequence mixing makes up for compressed queries and keys, and more (ReLU)", "R-cg-q-12o", "R-cg-q"),
    Claim("The same with GLU", "G-cg-q-12o", "G-cg-q"),
    Claim("The lag layout is what makes the mixing work", "R-12o!", "R-12!"),
    Claim("Mixing on the routing side alone gives most of it (ReLU)", "R-cg-q-1o", "R-cg-q"),
    Claim("Mixing on the readout side adds a little (ReLU)", "R-cg-q-12o", "R-cg-q-1o"),
    Claim("Mixing on the readout side adds a little (GLU)", "G-cg-q-12o", "G-cg-q-1o"),
    Claim("The convolutions on keys and values help", "R-cg-q-12o", "R-g-q-12o"),
    Claim("ReLU attention without mixing is level with softmax", "R-pc", "S-pc", level=True),
)

# what decides by task, beside the tables' learning rate
BY_TASK = (
    ("both mixings (ReLU)", "R-cg-q-12o", "R-cg-q"),
    ("both mixings (GLU)", "G-cg-q-12o", "G-cg-q"),
    ("h over q (ReLU)", "R-cg-h-12o", "R-cg-q-12o"),
    ("h over q (GLU)", "G-cg-h-12o", "G-cg-q-12o"),
)

# each row: the component, the variant that has it, the one that differs in it alone
COMPONENTS = (
    ("c: convolutions", "R-cg-q-12o", "R-g-q-12o"),
    ("g: gates", "R-cg-q-12o", "R-c-q-12o"),
    ("1: routing mixing (ReLU)", "R-cg-q-1o", "R-cg-q"),
    ("1: routing mixing (GLU)", "G-cg-q-1o", "G-cg-q"),
    ("2: readout mixing (ReLU)", "R-cg-q-12o", "R-cg-q-1o"),
    ("2: readout mixing (GLU)", "G-cg-q-12o", "G-cg-q-1o"),
    ("o: lag layout", "R-12o!", "R-12!"),
    ("h over q: queries and keys of half the width (ReLU)", "R-cg-h-12o", "R-cg-q-12o"),
    ("h over q: queries and keys of half the width (GLU)", "G-cg-h-12o", "G-cg-q-12o"),
    ("GLU, no mixing", "G-cg-q", "R-cg-q"),
    ("GLU, routing mixing", "G-cg-q-1o", "R-cg-q-1o"),
    ("GLU, both mixings", "G-cg-q-12o", "R-cg-q-12o"),
    # these starts differ in the convolutions alone
    ("convolutions start at identity (softmax)", "S-pc@gpt", "S-pc@paper"),
    ("convolutions start at identity (HyperMLP)", "R-cg-q-12o@gpt", "R-cg-q-12o@paper"),
    ("convolutions start at identity (HyperGLU)", "G-cg-q-12o@gpt", "G-cg-q-12o@paper"),
    # and these in the linear maps
    ("GPT-2's start over reset (softmax)", "S-pc@gpt", "S-pc@reset"),
    ("GPT-2's start over reset (HyperMLP)", "R-cg-q-12o@gpt", "R-cg-q-12o@reset"),
    ("GPT-2's start over reset (HyperGLU)", "G-cg-q-12o@gpt", "G-cg-q-12o@reset"),
)

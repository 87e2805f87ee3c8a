"""PTX text to instructions."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple


class Register(NamedTuple):
    """``%r1``; also the name of a label, or of shared memory."""

    name: str


class Constant(NamedTuple):
    """A number, of floating point by its bits."""

    bits: int


class Group(NamedTuple):
    """``{a, b, ...}``."""

    items: tuple[Operand, ...]


class Address(NamedTuple):
    """``[base + offset]``; the base of a parameter is its name, shared memory begins at 0."""

    base: Register | str
    offset: int


Operand = Register | Constant | Group | Address


class Instruction(NamedTuple):
    """``@guard name.modifiers operands``."""

    guard: str | None
    negated: bool
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str

    @property
    def kind(self) -> str:
        """The last modifier, most often the type."""
        return self.modifiers[-1] if self.modifiers else ""


class Program(NamedTuple):
    """One kernel: parameters in order as ``(type, name)``, instructions, and where labels point."""

    parameters: tuple[tuple[str, str], ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_STATEMENT = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)", re.S)
_LABEL = re.compile(r"\s*([$\w]+):(?!:)")


def parse(ptx: str) -> Program:
    """The only kernel in ``ptx``.

    Raises:
        ValueError: for a statement that is no instruction.
    """
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    ptx = re.sub(r"^\s*\.(loc|file|section)\b[^\n]*", "", ptx, flags=re.M)
    head, body = ptx[ptx.index(".entry") :].split("{", 1)
    parameters = tuple(re.findall(r"\.param\s+\.(\w+)[^,\n)]*?(\w+_param_\d+)", head))
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in body[: body.rindex(".func") if ".func" in body else None].split(";"):
        text = statement.strip()
        while text:
            if label := _LABEL.match(text):
                labels[label[1]] = len(instructions)
                text = text[label.end() :].strip()
            elif text[0] in "{}":
                text = text[1:].strip()
            else:
                break
        # declarations of registers, pragmas, and what follows the kernel
        if text and not text.startswith("."):
            instructions.append(_instruction(" ".join(text.split())))
    return Program(parameters, tuple(instructions), labels)


def _instruction(text: str) -> Instruction:
    found = _STATEMENT.fullmatch(text)
    if found is None:
        raise ValueError(f"no PTX instruction: {text!r}")
    negated, guard, name, modifiers, rest = found.groups()
    operands = tuple(_operand(part) for part in _split(rest))
    # shared memory is the block's own where nothing else is said, and newer compilers say it
    kinds = tuple("shared" if kind == "shared::cta" else kind for kind in modifiers.split(".")[1:])
    return Instruction(guard, negated == "!", name, kinds, operands, text)


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts = re.split(r",(?![^{\[]*[}\]])", text)
    return [part.strip() for part in parts if part.strip()]


@cache
def _operand(text: str) -> Operand:
    if text[0] == "{":
        return Group(tuple(_operand(part) for part in _split(text[1:-1])))
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        inside = Register(base) if base[0] == "%" else base
        return Address(inside, int(offset, 0) if offset else 0)
    if text.startswith(("0f", "0F", "0d", "0D")):
        return Constant(int(text[2:], 16))
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        return Constant(int(text.rstrip("U"), 0))
    # the second result of a shuffle, "a|b", is never used here
    return Register(text.split("|")[0])

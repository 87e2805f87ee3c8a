"""Runs the blocks of a grid: registers, branches, barriers, and the table of instructions."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from emulator.memory import FaultError, GlobalMemory, SharedMemory
from emulator.program import Address, Constant, Instruction, Operand, Program, Register
from emulator.values import U32, U64, Array, is_wide

WARP = 32
Execute = Callable[["Block", Instruction], None]
INSTRUCTIONS: dict[str, Execute] = {}
_MOST_STEPS = 5_000_000


def instruction(*names: str) -> Callable[[Execute], Execute]:
    """Put a function into the table."""

    def register(execute: Execute) -> Execute:
        INSTRUCTIONS.update(dict.fromkeys(names, execute))
        return execute

    return register


class Block:
    """One block of threads. Instructions read and write its registers through :meth:`read` and :meth:`write`."""

    def __init__(
        self, program: Program, memory: GlobalMemory, threads: int, shared: int, place: tuple[int, ...],
        grid: Sequence[int], arguments: dict[str, int | float], found: Counter[str],
    ) -> None:  # fmt: skip
        self.program, self.memory, self.threads, self.arguments, self.found = program, memory, threads, arguments, found
        self.shared = SharedMemory(shared, found)
        self.thread = np.arange(threads)
        self.lane, self.warp = self.thread % WARP, self.thread // WARP
        self.registers: dict[str, Array] = {"%tid.x": self.thread.astype(U32), "%laneid": self.lane.astype(U32)}
        for axis, at, size in zip("xyz", place, grid, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.full(threads, at, U32)
            self.registers[f"%nctaid.{axis}"] = np.full(threads, size, U32)
        self.mask: NDArray[np.bool_] = np.ones(threads, bool)
        # asynchronous copies to shared memory: those issued, then groups of them in order
        self.issued: list[Callable[[], None]] = []
        self.groups: deque[list[Callable[[], None]]] = deque()
        self._next = 0

    def run(self) -> None:
        """Until ``ret``."""
        code = self.program.instructions
        for _ in range(_MOST_STEPS):
            if self._next >= len(code):
                break
            step = code[self._next]
            self._next += 1
            self.found["instructions"] += 1
            self.mask = np.ones(self.threads, bool)
            if step.guard is not None:
                self.mask = self.registers[step.guard].astype(bool) ^ step.negated
            if step.name == "ret":
                if self.mask.all():
                    break
                self._refuse_divergence(step)
                continue
            execute = INSTRUCTIONS.get(step.name)
            if execute is None:
                raise NotImplementedError(f"the emulator does not know {step.text!r}")
            try:
                execute(self, step)
            except FaultError as fault:
                raise FaultError(f"{fault}, thread block at {self.registers['%ctaid.x'][0]}") from None
        else:
            raise RuntimeError(f"no end after {_MOST_STEPS} instructions")
        if any(self.groups) or self.issued:
            self.found["copies nobody waited for"] += sum(map(len, self.groups)) + len(self.issued)

    def read(self, operand: Operand, kind: str) -> Array:
        """The operand's bit pattern in every thread; bool for a predicate."""
        if isinstance(operand, Register):
            value = self.registers.get(operand.name)
            if value is None:
                if operand.name.startswith("%"):
                    # a loop's first round may carry what nobody wrote; it must not be used
                    self.found["reads of registers never written"] += 1
                    return np.zeros(self.threads, bool if kind == "pred" else U64 if is_wide(kind) else U32)
                return np.zeros(self.threads, U64 if is_wide(kind) else U32)  # shared memory begins at 0
            return value
        assert isinstance(operand, Constant)
        if kind == "pred":
            return np.full(self.threads, operand.bits != 0)
        width = 64 if is_wide(kind) else 32
        return np.full(self.threads, operand.bits & ((1 << width) - 1), U64 if width == 64 else U32)

    def write(self, operand: Operand, value: Array) -> None:
        """In the threads that the guard lets through."""
        assert isinstance(operand, Register)
        if operand.name == "_":
            return
        value = np.broadcast_to(value, (self.threads,))
        if not self.mask.all():
            old = self.registers.get(operand.name, np.zeros(self.threads, value.dtype))
            value = np.where(self.mask, value, old).astype(value.dtype)
        self.registers[operand.name] = value

    def address(self, operand: Operand) -> NDArray[np.int64]:
        assert isinstance(operand, Address)
        base: Array = np.zeros(self.threads, np.int64)
        if isinstance(operand.base, Register):
            base = self.read(operand.base, "b64").astype(np.int64)
        return base + operand.offset

    def jump(self, step: Instruction) -> None:
        target = step.operands[0]
        assert isinstance(target, Register)
        if self.mask.all():
            self._next = self.program.labels[target.name]
        else:
            self._refuse_divergence(step)

    def _refuse_divergence(self, step: Instruction) -> None:
        if self.mask.any():
            raise NotImplementedError(f"threads of a block part at {step.text!r}")


def launch(
    program: Program, memory: GlobalMemory, grid: Sequence[int], threads: int, shared: int,
    arguments: Sequence[int | float], found: Counter[str],
) -> None:  # fmt: skip
    """Run every block of a grid, in order.

    Args:
        program: the kernel.
        memory: holds what the arguments point to.
        grid: blocks along x, y, z.
        threads: of a block.
        shared: bytes of shared memory.
        arguments: addresses and numbers, as many as the kernel has, or fewer: the rest are 0.
        found: counts what was seen.
    """
    values = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
    named = {name: value for (_, name), value in zip(program.parameters, values, strict=True)}
    with np.errstate(all="ignore"):
        for z, y, x in product(*(range(size) for size in reversed(grid))):
            Block(program, memory, threads, shared, (x, y, z), grid, named, found).run()


@instruction("bra")
def _(block: Block, step: Instruction) -> None:
    block.jump(step)


@instruction("bar", "barrier")
def _(block: Block, step: Instruction) -> None:
    if step.modifiers[0] == "warp":
        return
    if step.operands[:1] != (Constant(0),):
        raise NotImplementedError(f"a barrier of part of a block: {step.text!r}")
    block.shared.barrier()


@instruction("fence")
def _(block: Block, step: Instruction) -> None:
    if step.modifiers[:2] == ("proxy", "async"):
        block.shared.fence()

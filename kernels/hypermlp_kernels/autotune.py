"""Tiles found by timing, for those who ask: ``launch.forward(..., autotune=True)``, or for a whole model
``with TUNED.searching(): model(batch)``.

What was found holds for the process, or longer through a file. Every later launch of the same kernel,
architecture, precision, widths and switches takes it; the number of tokens is no part of that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import triton

from hypermlp_kernels.tiles import Tile, check_tile

Timer = Callable[[Callable[[], None]], float]


def milliseconds(launch: Callable[[], None]) -> float:
    """Median time of a launch on the current device, with a cold L2 cache."""
    return float(triton.testing.do_bench(launch, warmup=5, rep=30, return_mode="median"))


class Tuned:
    """The tile of each case, by its key."""

    def __init__(self) -> None:
        self._found: dict[str, Tile] = {}
        self.wanted = False
        self.revision = 0  # other after every change of what was found

    @contextmanager
    def searching(self, wanted: bool = True) -> Iterator[None]:
        """Within it every launch of a case that is not known times the tiles for it, or none does."""
        before, self.wanted = self.wanted, wanted
        try:
            yield
        finally:
            self.wanted = before

    def get(self, key: str) -> Tile | None:
        """What was found for ``key``, if anything was."""
        return self._found.get(key)

    def search(
        self, key: str, candidates: Sequence[Tile], launch: Callable[[Tile], None], timer: Timer = milliseconds
    ) -> Tile:
        """The fastest of ``candidates`` that the device has shared memory for, timed unless it is known.

        ``launch`` runs several times with each, so it must give the same output however often it runs.
        """
        if key not in self._found:
            times = {tile: _time(launch, tile, timer) for tile in dict.fromkeys(candidates)}
            fitting = {tile: time for tile, time in times.items() if time is not None}
            if not fitting:
                raise ValueError(f"no tile of {tuple(candidates)} fits the device's shared memory: {key}")
            self._found[key] = min(fitting, key=fitting.__getitem__)
            self.revision += 1
        return self._found[key]

    def save(self, path: str | Path) -> None:
        """Write all that was found as JSON."""
        Path(path).write_text(json.dumps(self._found, indent=2, sort_keys=True) + "\n")

    def load(self, path: str | Path) -> None:
        """Add what :meth:`save` wrote; it replaces what is known for the same keys.

        Raises:
            ValueError: the file is not of that form, or holds a tile no kernel can take. Nothing is added then.
        """
        try:
            found = {str(key): Tile(*sizes) for key, sizes in json.loads(Path(path).read_text()).items()}
            for tile in found.values():
                check_tile(tile)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a file of tiles that Tuned.save wrote: {error}") from error
        self._found |= found
        self.revision += 1

    def clear(self) -> None:
        """Forget all: launches go back to the static table."""
        self._found.clear()
        self.revision += 1


def _time(launch: Callable[[Tile], None], tile: Tile, timer: Timer) -> float | None:
    try:
        return timer(lambda: launch(tile))
    except triton.OutOfResources:
        return None


# of this process: what forward(autotune=True) finds, and every launch looks up
TUNED = Tuned()

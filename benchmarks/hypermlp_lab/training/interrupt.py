"""Ctrl-C asks the loop to stop after the step at hand; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """Context in which SIGINT and SIGTERM set :attr:`requested` instead of raising.

    A step that is cut short would leave weights and optimizer apart, so the loop looks at
    ``requested`` between steps. Outside the main thread, where Python takes no handlers, this does
    nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

"""Signals, where their handlers must not come between two things that belong together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Those whose handlers are known to raise: Ctrl-C, a scheduler that wants the machine back, a timeout.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name)]

# Without signal's own conversion of numbers to enumerations and back, which takes longer than a launch.
_handler_of = getattr(signal.getsignal, "__wrapped__", signal.getsignal)
_handle = getattr(signal.signal, "__wrapped__", signal.signal)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep signals for afterwards that Python code handles; only the main thread ever sees them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, handler) for number in _SIGNALS if callable(handler := _handler_of(number))]
    came: list[int] = []

    def keep(number: int, _: Any) -> None:
        came.append(number)

    for number, _ in before:
        _handle(number, keep)
    try:
        yield
    finally:
        for number, handler in before:
            _handle(number, handler)
    for number in came:
        signal.raise_signal(number)

"""Holds back signals while several writes must all happen or none."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Signals whose handlers often raise: Ctrl-C, a scheduler that takes the machine back, a timeout.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name)]

# The unwrapped functions skip the conversion between numbers and enumerations, which takes longer than a kernel launch.
_handler_of = getattr(signal.getsignal, "__wrapped__", signal.getsignal)
_handle = getattr(signal.signal, "__wrapped__", signal.signal)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay the signals that have handlers in Python until the end; they only ever run in the main thread."""
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

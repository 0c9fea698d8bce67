"""Ctrl-C, where it must not come between two things that belong together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Without signal's own conversion of numbers to enumerations and back, which takes longer than a launch.
_handler_of = getattr(signal.getsignal, "__wrapped__", signal.getsignal)
_handle = getattr(signal.signal, "__wrapped__", signal.signal)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep Ctrl-C for afterwards; only the main thread ever sees it."""
    before = _handler_of(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[int] = []
    _handle(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        _handle(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)

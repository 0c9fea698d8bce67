"""Updates beside backward: state on the host is updated on a stream of its own, while backward goes on.

The kernels that update such state wait for the bus most of the time, and on the stream of backward all that follows
would wait with them. On a stream of their own

- an update waits for the stream that has made the gradient;
- the gradient's memory is held until that stream waits for the update. (With `Tensor.record_stream` the allocator would
  free it when the host finds the update finished. The host runs ahead, so backward would allocate all gradients anew.)
  Gradients that are held have at most the size of the largest one, so the stream of backward waits for earlier updates;
- the stream on which backward was called waits for all updates at the end of backward. Until then nothing may read
  weights that are updated; a step in backward requires that anyway.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lucid import engine


class Streams:
    """The current stream of a GPU, and another one for updates."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.own: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def current(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def within(self) -> AbstractContextManager[Any]:
        """Return a context manager that makes the other one the current stream."""
        return torch.cuda.stream(self.own)


def streams_for(device: torch.device) -> Streams | None:
    """Return the streams of a device, or None if it has none."""
    return Streams(device) if device.type == "cuda" else None


class _Held(NamedTuple):
    """A gradient that an update reads: the stream that has made it, and the event that ends the update."""

    gradient: Tensor
    made_on: Any
    event: Any


class _Lane:
    """The updates of one device's parameters beside backward."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._held: deque[_Held] = deque()
        self._bytes = self._room = 0  # of gradients: that are held, and that may be
        self._ends: set[int] = set()  # of the backwards at whose end the streams are joined

    @contextmanager
    def updating(self, gradient: Tensor) -> Iterator[None]:
        """Return a context manager in which the current stream is that of the updates."""
        made_on = self._streams.current()
        self._room = max(self._room, gradient.nbytes)
        while self._held and self._bytes + gradient.nbytes > self._room:
            self._let_go()
        self._join_at_the_end()
        self._streams.own.wait_stream(made_on)
        try:
            with self._streams.within():
                yield
        finally:
            self._held.append(_Held(gradient, made_on, self._streams.own.record_event()))
            self._bytes += gradient.nbytes

    def _join_at_the_end(self) -> None:
        backward = torch._C._current_graph_task_id()
        if backward not in self._ends:
            self._ends.add(backward)
            torch.autograd.Variable._execution_engine.queue_callback(_End(lambda: self._end(backward)))

    def _end(self, backward: int) -> None:
        self._ends.discard(backward)
        self.join()

    def join(self) -> None:
        """Make the current stream, and those that have made gradients, wait for all updates."""
        if self._held:
            self._streams.current().wait_event(self._held[-1].event)
        while self._held:
            self._let_go()

    def _let_go(self) -> None:
        held = self._held.popleft()
        self._bytes -= held.gradient.nbytes
        held.made_on.wait_event(held.event)  # and only then the allocator may give the gradient's memory to it


class _End:
    """What autograd calls at the end of a backward. If backward fails, autograd drops it instead."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = weakref.finalize(self, act)
        self._act.atexit = False

    def __call__(self) -> None:
        self._act()


class Overlap:
    """The updates beside backward, on all devices that have any (``lanes``)."""

    def __init__(self) -> None:
        self.lanes: dict[torch.device, _Lane] = {}

    def updating(self, param: Tensor) -> AbstractContextManager[None]:
        """Return a context manager in which a hook updates a parameter, whose state is on the host, beside backward."""
        device, gradient = param.device, param.grad
        if gradient is None or not engine.in_place(device) or engine.cuda.is_capturing():
            return nullcontext()
        if torch._C._current_graph_task_id() < 0:  # no backward is running, whose end could be waited for
            return nullcontext()
        if device not in self.lanes:
            streams = streams_for(device)
            if streams is None:
                return nullcontext()
            self.lanes[device] = _Lane(streams)
        return self.lanes[device].updating(gradient)

    def join(self) -> None:
        """Make the current streams wait for all updates."""
        for lane in self.lanes.values():
            lane.join()

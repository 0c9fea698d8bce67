"""Pinned host memory for state that a GPU reads and writes where it lies.

Pinned memory has the same address for the host and for every GPU, so kernels need nothing else. To pin is slow, and
torch rounds each request up to a power of two. So an `Arena` asks for few large pieces and cuts tensors from them. To
torch, each tensor has a storage of its own size.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import cuda
from .row import span

Bytes = NDArray[np.uint8]

_ALIGNMENT = 256  # of each tensor: whole lines of a GPU's cache, and what torch's own allocators give
# The size of a piece: 1/16 of all pieces before it, within these bounds, but at least as large as the tensor for which
# it is made. With these, models of 0.1 to 7 B parameters waste 0.5 to 10 %; pieces of one tensor each would waste 66 %
# of GPT-2 small.
_PART, _LEAST, _MOST = 16, 1 << 20, 1 << 30


class Event(Protocol):
    """A place in a device's work, as ``torch.cuda.Event`` is."""

    def record(self) -> Any:
        """Move it behind all work that the current stream has now."""

    def synchronize(self) -> Any:
        """Wait until the device has reached it."""


class InFlight:
    """Launched kernels that may not have finished to write to pinned state, which looks like ordinary CPU tensors."""

    def __init__(self) -> None:
        self._events: dict[Any, Event] = {}  # by device and stream

    def launched(self, where: Any, event: Callable[[], Event]) -> None:
        """Remember what the current stream has been given; ``where`` names it, and ``event`` makes a new event."""
        if where not in self._events:
            self._events[where] = event()
        self._events[where].record()

    def wait(self) -> None:
        """Wait until these kernels have finished, but not while a step is captured, which forbids to wait."""
        if self._events and not cuda.is_capturing():
            for event in list(self._events.values()):
                event.synchronize()


class _Piece:
    """A piece of pinned memory, and which parts of it are free: [begin, end) in order, none next to another."""

    def __init__(self, size: int, memory: Bytes | None) -> None:
        self.size, self.memory = size, memory
        self.address = 0 if memory is None else memory.ctypes.data
        self.free = [(0, size)]

    def cut(self, size: int) -> int | None:
        """Take the first free part that is large enough; return where it begins."""
        for number, (begin, end) in enumerate(self.free):
            if end - begin >= size:
                self.free[number : number + 1] = [(begin + size, end)] if end - begin > size else []
                return begin
        return None

    def join(self, begin: int, end: int) -> None:
        """Make a part free again."""
        place = bisect_left(self.free, (begin, end))
        if place < len(self.free) and self.free[place][0] == end:
            _, end = self.free.pop(place)
        if place and self.free[place - 1][1] == begin:
            place -= 1
            begin, _ = self.free.pop(place)
        self.free.insert(place, (begin, end))


class Arena:
    """Pinned memory in pieces, each a power of two; a piece is freed with the last tensor in it.

    ``allocate``: returns a new piece of a size.
    """

    def __init__(self, allocate: Callable[[int], Bytes | None]) -> None:
        self._allocate = allocate
        self._pieces: list[_Piece] = []
        self._filled: dict[int, int] = {}  # by size: how many of the first pieces have no room for it
        self._lock = threading.Lock()
        self._returned: deque[tuple[_Piece, int, int]] = deque()  # by finalizers, which may run at any time

    @property
    def reserved(self) -> int:
        """The bytes of all pieces."""
        return sum(piece.size for piece in self._pieces)

    @property
    def waste(self) -> int:
        """The bytes of all pieces that are in no tensor."""
        return sum(end - begin for piece in self._pieces for begin, end in piece.free)

    def take(self, size: int) -> Bytes:
        """Return `size` bytes, uninitialized, which are free again when nobody holds them; or raise MemoryError."""
        with self._lock:
            self._sweep()
            piece, begin = self._place(size)
        assert piece.memory is not None
        found: Bytes = piece.memory[begin : begin + size]
        weakref.finalize(found, self._give_back, piece, begin, size).atexit = False
        return found

    def _place(self, size: int) -> tuple[_Piece, int]:
        size = _aligned(size)
        for number in range(self._filled.get(size, 0), len(self._pieces)):
            begin = self._pieces[number].cut(size)
            if begin is not None:
                self._filled[size] = number
                return self._pieces[number], begin
        wanted = _power_of_two(max(size, _LEAST, min(_MOST, self.reserved // _PART)))
        try:
            piece = _Piece(wanted, self._allocate(wanted))
        except (RuntimeError, MemoryError) as error:
            raise MemoryError(
                f'state_device="cpu" asked for {_mib(wanted)} of pinned host memory beside the {_mib(self.reserved)} '
                f"that it has, and did not get them ({error}). Nothing was changed. Free memory of the host, give this "
                "process more (a container has a limit), or use a smaller state_format"
            ) from error
        self._filled[size] = len(self._pieces)
        self._pieces.append(piece)
        return piece, piece.cut(size) or 0

    def _give_back(self, piece: _Piece, begin: int, size: int) -> None:
        self._returned.append((piece, begin, begin + _aligned(size)))
        if self._lock.acquire(blocking=False):  # else whoever holds it may be in this thread
            try:
                self._sweep()
            finally:
                self._lock.release()

    def _sweep(self) -> None:
        """Free what was given back, after all kernels that may still write there."""
        while (count := len(self._returned)) and not cuda.is_capturing():
            in_flight.wait()
            self._filled.clear()
            for _ in range(count):  # what comes back meanwhile may be of kernels launched since
                piece, begin, end = self._returned.popleft()
                piece.join(begin, end)
                if piece.free == [(0, piece.size)]:
                    self._pieces.remove(piece)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in this memory."""
        if not tensor.numel():
            return True
        at = tensor.data_ptr()
        return any(piece.address <= at < piece.address + piece.size for piece in list(self._pieces))


def _allocate(size: int) -> Bytes:
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True).numpy()


in_flight = InFlight()
arena = Arena(_allocate)


def empty_like(meta: Tensor) -> Tensor:
    """Return uninitialized pinned memory with the dtype, shape and strides of a tensor on the meta device."""
    size = span(meta)
    if not size:
        return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device="cpu")
    storage = torch.frombuffer(arena.take(size), dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=meta.dtype, device="cpu").set_(storage, 0, meta.shape, meta.stride())


def bytes_for(sizes: Iterable[int]) -> int:
    """Return how many bytes of pinned memory tensors of these sizes take if they are made in this order."""
    planned = Arena(lambda size: None)
    for size in sizes:
        if size:
            planned._place(size)
    return planned.reserved


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _power_of_two(size: int) -> int:
    """Return the least power of two that is not less than `size`."""
    return 1 << (size - 1).bit_length()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"

"""State on the host, parameters and gradients on a GPU.

Parameters and gradients are copied to the host in pieces, updated there by the CPU engine, and parameters are copied
back. A piece is some rows of dimension 0. To the CPU engine it looks like a shard, so the bits are the same. While one
piece is updated, the next is copied in and the previous one is copied out.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import cuda, exact_sum, reference
from .cpu import bind, new_rows
from .numbers import MomentFormat
from .observed import Observed, Seen
from .protocol import StepOrder
from .row import Row
from .scalars import ScalarTable, scalars_in, table_of
from .shards import WHOLE, Numbering, local
from .step_counts import StepCounts

if TYPE_CHECKING:
    from ._cpu import Rows
    from .cuda.device import CUDA

PIECE_BYTES = 16 << 20  # the largest piece of a parameter, but at least one row
SLOTS = 3  # buffers for pieces: one is copied in, one is updated, one is copied out


def is_offloaded(row: Row) -> bool:
    """Whether a row's state is on the host and its parameter is not."""
    return row.gradient.device.type != "cpu" and any(local(slot).device.type == "cpu" for slot in _moments(row))


def _moments(row: Row) -> Iterator[Tensor]:
    return (slot for key, slot in row.slots.items() if key != "stream")


class _Piece(NamedTuple):
    """Some rows of a parameter, with their gradient and state."""

    row: Row
    param: Tensor
    gradient: Tensor
    slots: dict[str, Tensor]
    numbering: Numbering
    table: ScalarTable[float]


def _pieces(row: Row, table: ScalarTable[float]) -> Iterator[_Piece]:
    param, gradient = local(row.param).detach(), row.gradient.detach()
    slots = {key: local(slot).detach() for key, slot in row.slots.items()}
    tensors = [param, gradient, *(slot for key, slot in slots.items() if key != "stream")]
    in_blocks = row.format.moments is MomentFormat.EIGHT_BIT
    if param.dim() == 0 or (not in_blocks and all(tensor.is_contiguous() for tensor in tensors)):
        flat = {id(tensor): tensor.reshape(-1) for tensor in tensors}  # then pieces may begin anywhere
        param, gradient = flat[id(param)], flat[id(gradient)]
        slots = {key: flat.get(id(slot), slot) for key, slot in slots.items()}
    inner = math.prod(param.shape[1:])
    rows = max(1, PIECE_BYTES // max(1, inner * param.element_size()))
    numbers = inner * (2 if param.is_complex() else 1)
    for begin in range(0, param.shape[0] if inner else 0, rows):
        part = slice(begin, begin + rows)
        own = {key: slot if key == "stream" else slot[part] for key, slot in slots.items()}
        yield _Piece(row, param[part], gradient[part], own, WHOLE._replace(first=begin * numbers), table)


class Copies(Protocol):
    """How pieces are copied to the host and back."""

    def staging(self, size: int) -> Tensor:
        """Return a buffer of `size` bytes on the host."""

    def begin(self) -> None:
        """Make the following copies wait for earlier writes to parameters and gradients."""

    def fetch(self, slot: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start to copy each (target on the host, source on the device), after the last `send` from `slot` is done."""

    def wait(self, slot: int) -> None:
        """Wait until the copies that `fetch` started for `slot` are done."""

    def send(self, slot: int, target: Tensor, source: Tensor) -> None:
        """Start to copy a source on the host to a target on the device."""

    def end(self) -> None:
        """Make the following work on the device wait for all copies."""


class GPUCopies:
    """Copies from and to a GPU, in two separate streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward, self._outward = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._fetched = [torch.cuda.Event() for _ in range(SLOTS)]  # type: ignore[no-untyped-call]
        self._sent = [torch.cuda.Event() for _ in range(SLOTS)]  # type: ignore[no-untyped-call]

    def staging(self, size: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def begin(self) -> None:
        current = torch.cuda.current_stream(self._device)
        self._inward.wait_stream(current)
        self._outward.wait_stream(current)

    def fetch(self, slot: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._inward.wait_event(self._sent[slot])
        with torch.cuda.stream(self._inward):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            self._fetched[slot].record(self._inward)

    def wait(self, slot: int) -> None:
        self._fetched[slot].synchronize()

    def send(self, slot: int, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._outward):
            target.copy_(source, non_blocking=True)
            self._sent[slot].record(self._outward)

    def end(self) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._inward)
        current.wait_stream(self._outward)


class _Ready(NamedTuple):
    """A piece that is bound to the CPU engine as its only row, with its buffers on the host."""

    piece: _Piece
    param: Tensor
    gradient: Tensor
    rows: Rows
    state_box: list[Any]

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The (target on the host, source on the device) pairs to copy."""
        return [(self.param, self.piece.param), (self.gradient, self.piece.gradient)]


class Offload:
    """A `lucid.engine.protocol.Engine` for the rows of a plan whose state is on the host."""

    def __init__(self, groups: list[list[Tensor]], rows: Rows) -> None:
        self._groups = groups
        self._rows = rows  # only this engine's: to compare them, and to measure their gradients
        self._device: CUDA | None = None
        self._copies: dict[torch.device, Copies] = {}
        self._stages: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        self._ready: dict[torch.device, list[_Ready]] = {}
        self._order: StepOrder | None = None
        self._seen: dict[int, Observed] = {}
        self._sent = False
        self.rows: list[Row] = []
        self.first_set = 0  # of this engine's rows in the table of scalars; each row has its own set

    def bind(self, row: Row) -> None:
        if not self.rows:
            self._rows.gather(self._groups, [{}, True])
        bind(self._rows, row, on_device=row.gradient.device.type != "cpu")
        self.rows.append(row)

    def compare(self) -> None:
        """Raise if the state of a row shares memory with another row."""
        if self.rows:
            self._rows.compare()

    def measure(self, scale: float, kinds: array[int] | None) -> list[int]:
        """Return the words as `Engine.measure` does, computed on the gradients' devices."""
        if not self.rows:
            return exact_sum.blank(kinds)
        if all(row.gradient.device.type == "cpu" for row in self.rows):
            self._rows.steps()
            return self._rows.measure(torch.get_num_threads(), scale, kinds)
        if cuda.missing is not None:
            return reference.measure(self.rows, scale, kinds)
        if self._device is None:
            from .cuda.device import CUDA

            self._device = CUDA(self._rows, StepCounts())
        self._rows.steps()
        return self._device.measure(scale, kinds)

    def prepare(self, order: StepOrder) -> None:
        self._ready, self._order, self._sent = {}, order, False
        if not self.rows:  # then the device may decide, without a table
            return
        assert order.table is not None
        pieces: dict[torch.device, list[_Piece]] = {}
        for number, row in enumerate(self.rows, self.first_set):
            table = table_of(scalars_in(order.table, number))
            pieces.setdefault(row.gradient.device, []).extend(_pieces(row, table))
        for device, found in pieces.items():
            if device not in self._copies:
                self._copies[device] = copies_for(device)
            size = max((max(piece.param.nbytes, piece.gradient.nbytes) for piece in found), default=0)
            stages = self._stages.get(device)
            if stages is None or len(stages[0][0]) < size:
                staging = self._copies[device].staging
                stages = self._stages[device] = [(staging(size), staging(size)) for _ in range(SLOTS)]
            self._ready[device] = [_bound(piece, stages[number % SLOTS]) for number, piece in enumerate(found)]

    def write(self) -> list[tuple[int, Seen]]:
        if not self._sent:
            self._sent = True
            self._send()
        return list(self._seen.items())

    def _send(self) -> None:
        """Copy, update and copy back, piece by piece; count the step of each row."""
        assert self._order is not None
        alone = self._rows.serial  # some rows share memory, so each piece waits until the previous one is copied back
        for device, ready in self._ready.items():
            copies = self._copies[device]
            copies.begin()
            for number, each in enumerate(ready):
                slot = number % SLOTS
                if alone and number:
                    copies.end()
                    copies.begin()
                if alone or not number:
                    copies.fetch(slot, each.pairs)
                if not alone and number + 1 < len(ready):
                    copies.fetch((number + 1) % SLOTS, ready[number + 1].pairs)
                copies.wait(slot)
                each.rows.update(each.piece.table, self._order.threads, self._order.observe, True, each.state_box)
                copies.send(slot, each.piece.param, each.param)
                if self._order.observe:
                    index, observed = each.piece.row.index, Observed(*each.rows.observed()[0][1])
                    self._seen[index] = _together(self._seen[index], observed) if index in self._seen else observed
            copies.end()
        for row in self.rows:
            row.step.add_(1)

    def release(self) -> None:
        for ready in self._ready.values():
            for each in ready:
                each.rows.release()
        self.rows, self._ready, self._order, self._seen = [], {}, None, {}
        self._rows.release()


def copies_for(device: torch.device) -> Copies:
    """Return how pieces are copied from and to `device`."""
    return GPUCopies(device)


def _bound(piece: _Piece, stage: tuple[Tensor, Tensor]) -> _Ready:
    param, gradient = (
        whole[: part.nbytes].view(part.dtype).view(part.shape)
        for whole, part in zip(stage, (piece.param, piece.gradient), strict=True)
    )
    param.grad_dtype = None
    param.grad = gradient
    row = piece.row
    step = row.step.clone()
    entry: dict[str, Any] = {"step": step} | piece.slots
    own = replace(
        row, index=0, group=0, param=param, gradient=gradient, entry=entry, step=step, slots=piece.slots,
        numbering=piece.numbering,
    )  # fmt: skip
    rows = new_rows([[param]])
    state_box: list[Any] = [{param: entry}, True]
    rows.gather([[param]], state_box)
    bind(rows, own, on_device=False)
    rows.steps()
    rows.before_writing(state_box[0])
    return _Ready(piece, param, gradient, rows, state_box)


def _together(one: Observed, other: Observed) -> Observed:
    ratio = one.ratio if one.ratio > other.ratio or math.isnan(one.ratio) else other.ratio
    return Observed(one.gradient + other.gradient, one.update + other.update, one.param + other.param, ratio)

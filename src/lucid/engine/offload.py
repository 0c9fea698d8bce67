"""State on the host, parameters and gradients on a GPU: they come over in chunks, the CPU engine updates, and return.

A chunk is some rows of dimension 0, so that it is to the CPU engine what a shard is, and has the same bits. While one
is updated the next is on its way in and the one before on its way out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import cpu
from .observed import Observed
from .row import Row
from .scalars import Scalars
from .shards import WHOLE, Numbering, local

if TYPE_CHECKING:
    from .cuda.device import DevicePlan

CHUNK_BYTES = 16 << 20  # of a parameter
SLOTS = 3  # one on its way in, one that is updated, one on its way out


def is_offloaded(row: Row) -> bool:
    """Whether a row's state is on the host and its parameter is not."""
    return row.gradient.device.type != "cpu" and any(local(slot).device.type == "cpu" for slot in _moments(row))


def _moments(row: Row) -> Iterator[Tensor]:
    return (slot for key, slot in row.slots.items() if key != "stream")


class _Chunk(NamedTuple):
    """Some rows of a parameter, with their gradient and state."""

    row: Row
    param: Tensor
    gradient: Tensor
    slots: dict[str, Tensor]
    numbering: Numbering
    scalars: Scalars


def _chunks(row: Row, scalars: Scalars) -> Iterator[_Chunk]:
    param, gradient = local(row.param).detach(), row.gradient.detach()
    slots = {key: local(slot).detach() for key, slot in row.slots.items()}
    tensors = [param, gradient, *(slot for key, slot in slots.items() if key != "stream")]
    if param.dim() == 0 or ("exp_avg_code" not in slots and all(tensor.is_contiguous() for tensor in tensors)):
        flat = {id(tensor): tensor.reshape(-1) for tensor in tensors}  # to be cut anywhere
        param, gradient = flat[id(param)], flat[id(gradient)]
        slots = {key: flat.get(id(slot), slot) for key, slot in slots.items()}
    inner = math.prod(param.shape[1:])
    rows = max(1, CHUNK_BYTES // max(1, inner * param.element_size()))
    for begin in range(0, param.shape[0] if inner else 0, rows):
        part = slice(begin, begin + rows)
        own = {key: slot if key == "stream" else slot[part] for key, slot in slots.items()}
        yield _Chunk(row, param[part], gradient[part], own, WHOLE._replace(first=begin * inner), scalars)


class Copies(Protocol):
    """How chunks get to the host and back."""

    def staging(self, size: int) -> Tensor:
        """Return `size` bytes of the host."""

    def begin(self) -> None:
        """Let what follows see what was written to parameters and gradients so far."""

    def fetch(self, slot: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to copy sources on the device to targets on the host, once `slot` has been sent."""

    def wait(self, slot: int) -> None:
        """Wait until what was fetched to `slot` is there."""

    def send(self, slot: int, target: Tensor, source: Tensor) -> None:
        """Begin to copy a source on the host to a target on the device."""

    def end(self) -> None:
        """Let what follows on the device see what was sent."""


class GPUCopies:
    """Copies of a GPU, in two streams of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward, self._outward = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._fetched = [torch.cuda.Event() for _ in range(SLOTS)]  # type: ignore[no-untyped-call]
        self._sent = [torch.cuda.Event() for _ in range(SLOTS)]  # type: ignore[no-untyped-call]

    def staging(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

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


class Offload:
    """The rows of a plan whose state is on the host."""

    def __init__(self, groups: list[list[Tensor]]) -> None:
        self._native = cpu.Plan(groups)  # to measure gradients
        self._device: DevicePlan | None = None
        self._copies: dict[torch.device, Copies] = {}
        self._stages: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        self._chunks: list[_Chunk] = []
        self.rows: list[Row] = []

    def bind(self, row: Row) -> None:
        """Let a checked row take part in this step."""
        self.rows.append(row)

    def steps(self) -> list[tuple[int, float]]:
        """Return (group, step count) of each row."""
        return [(row.group, row.step.item() + 1) for row in self.rows]

    def squares(self, groups: list[list[Tensor]]) -> list[tuple[int, float]]:
        """Return (row number, sum of the squares of its gradient) of each row, measured where the gradients are."""
        self._native.gather(groups, [{}, True])
        for row in self.rows:
            there = row.gradient.device.type != "cpu"
            slots = {"step": row.step} | row.slots  # on the host, where nothing looks: they tell the order
            self._native.bind(row.index, row.gradient, row.entry, slots, row.numbering, there)
            if there and self._device is None:
                from .cuda.device import DevicePlan

                self._device = DevicePlan(self._native)
        try:
            self._native.steps()
            if self._device is not None:
                return self._device.squares()
            self._native.measure(torch.get_num_threads())
            return self._native.squares()
        finally:
            self._native.release()

    def prepare(self, scalars: Sequence[Scalars]) -> None:
        """Allocate what `run` needs: what can go wrong does so here."""
        self._chunks = [chunk for row, own in zip(self.rows, scalars, strict=True) for chunk in _chunks(row, own)]
        sizes: dict[torch.device, int] = {}
        for chunk in self._chunks:
            device, size = chunk.param.device, max(chunk.param.nbytes, chunk.gradient.nbytes)
            sizes[device] = max(size, sizes.get(device, 0))
        for device, size in sizes.items():
            if device not in self._copies:
                self._copies[device] = copies_for(device)
            stages = self._stages.get(device)
            if stages is None or len(stages[0][0]) < size:
                staging = self._copies[device].staging
                self._stages[device] = [(staging(size), staging(size)) for _ in range(SLOTS)]

    def run(self, threads: int, *, observe: bool) -> list[tuple[int, Observed]]:
        """Update every row; return what its step was like, if that is to `observe`."""
        seen: dict[int, Observed] = {}
        for device, copies in self._copies.items():
            chunks = [chunk for chunk in self._chunks if chunk.param.device == device]
            copies.begin()
            staged: list[tuple[Tensor, Tensor]] = []
            for ahead in range(-1, len(chunks)):
                if ahead + 1 < len(chunks):
                    staged.append(self._fetch(copies, device, ahead + 1, chunks[ahead + 1]))
                if ahead < 0:
                    continue
                slot = ahead % SLOTS
                copies.wait(slot)
                chunk, (param, gradient) = chunks[ahead], staged[ahead]
                observed = _update(chunk, param, gradient, threads, observe=observe)
                copies.send(slot, chunk.param, param)
                if observed is not None:
                    before = seen.get(chunk.row.index)
                    seen[chunk.row.index] = observed if before is None else _together(before, observed)
            copies.end()
        for row in self.rows:
            row.step.add_(1)
        return list(seen.items())

    def _fetch(self, copies: Copies, device: torch.device, number: int, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        stages = self._stages[device][number % SLOTS]
        param, gradient = (
            stage[: part.nbytes].view(part.dtype).view(part.shape)
            for stage, part in zip(stages, (chunk.param, chunk.gradient), strict=True)
        )
        copies.fetch(number % SLOTS, [(param, chunk.param), (gradient, chunk.gradient)])
        return param, gradient

    def release(self) -> None:
        """End the step; let go of its gradients."""
        self.rows, self._chunks = [], []


def copies_for(device: torch.device) -> Copies:
    """Return how chunks get from `device` and back."""
    return GPUCopies(device)


def _update(chunk: _Chunk, param: Tensor, gradient: Tensor, threads: int, *, observe: bool) -> Observed | None:
    """Update a chunk on the host, as a plan of one row."""
    param.grad_dtype = None
    param.grad = gradient
    plan = cpu.Plan([[param]])
    entry: dict[str, Any] = {"step": chunk.row.step.clone()} | chunk.slots
    state_box: list[Any] = [{param: entry}, True]
    plan.gather([[param]], state_box)
    fault = plan.bind(0, gradient, entry, entry, chunk.numbering)
    if fault is not None:
        raise RuntimeError(f"{chunk.row.name} could not be updated on the host: {fault}")
    plan.steps()
    plan.remember(state_box[0])
    plan.run([chunk.scalars], threads, observe, True, state_box)
    observed = Observed(*plan.observed()[0][1]) if observe else None
    plan.release()
    return observed


def _together(one: Observed, other: Observed) -> Observed:
    ratio = one.ratio if one.ratio > other.ratio or math.isnan(one.ratio) else other.ratio
    return Observed(one.gradient + other.gradient, one.update + other.update, one.param + other.param, ratio)

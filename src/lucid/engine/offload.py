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

from . import cpu, cuda, reference
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
    """A chunk that is bound to the CPU engine, as the only row of a plan, with where it comes to lie on the host."""

    chunk: _Chunk
    param: Tensor
    gradient: Tensor
    plan: Any
    state_box: list[Any]

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """What is copied to the host, and from where."""
        return [(self.param, self.chunk.param), (self.gradient, self.chunk.gradient)]


class Offload:
    """The rows of a plan whose state is on the host."""

    def __init__(self, groups: list[list[Tensor]]) -> None:
        self._groups = groups
        self._native = cpu.Plan(groups)  # compares them, and measures their gradients
        self._device: DevicePlan | None = None
        self._copies: dict[torch.device, Copies] = {}
        self._stages: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        self._ready: dict[torch.device, list[_Ready]] = {}
        self.rows: list[Row] = []

    def bind(self, row: Row) -> None:
        """Let a checked row take part in this step."""
        if not self.rows:
            self._native.gather(self._groups, [{}, True])
        there = row.gradient.device.type != "cpu"
        fault = self._native.bind(
            row.index, row.gradient, row.entry, {"step": row.step} | row.slots, row.numbering, there
        )
        if fault is not None:
            raise ValueError(f"{row.name} cannot be updated: {fault}")
        self.rows.append(row)

    def compare(self) -> None:
        """Raise where the state of a row lies in the memory of another."""
        if self.rows:
            self._native.compare()

    def steps(self) -> list[tuple[int, float]]:
        """Return (group, step count) of each row."""
        return [(row.group, row.step.item() + 1) for row in self.rows]

    def squares(self) -> list[tuple[int, float]]:
        """Return (row number, sum of the squares of its gradient) of each row, measured where the gradients are."""
        if all(row.gradient.device.type == "cpu" for row in self.rows):
            self._native.steps()
            self._native.measure(torch.get_num_threads())
            return self._native.squares()
        if cuda.missing is not None:
            return [(row.index, reference.squares(row)) for row in self.rows]
        if self._device is None:
            from .cuda.device import DevicePlan

            self._device = DevicePlan(self._native)
        self._native.steps()
        return self._device.squares()

    def prepare(self, scalars: Sequence[Scalars]) -> None:
        """Allocate and bind what `run` needs: what can go wrong does so here."""
        chunks: dict[torch.device, list[_Chunk]] = {}
        for row, own in zip(self.rows, scalars, strict=True):
            chunks.setdefault(row.gradient.device, []).extend(_chunks(row, own))
        self._ready = {}
        for device, found in chunks.items():
            if device not in self._copies:
                self._copies[device] = copies_for(device)
            size = max((max(chunk.param.nbytes, chunk.gradient.nbytes) for chunk in found), default=0)
            stages = self._stages.get(device)
            if stages is None or len(stages[0][0]) < size:
                staging = self._copies[device].staging
                stages = self._stages[device] = [(staging(size), staging(size)) for _ in range(SLOTS)]
            self._ready[device] = [_bound(chunk, stages[number % SLOTS]) for number, chunk in enumerate(found)]

    def run(self, threads: int, *, observe: bool) -> list[tuple[int, Observed]]:
        """Update every row; return what its step was like, if that is to `observe`."""
        seen: dict[int, Observed] = {}
        alone = self._native.serial  # some rows share memory: each chunk waits for the one before to be back
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
                each.plan.run([each.chunk.scalars], threads, observe, True, each.state_box)
                copies.send(slot, each.chunk.param, each.param)
                if observe:
                    index, observed = each.chunk.row.index, Observed(*each.plan.observed()[0][1])
                    seen[index] = _together(seen[index], observed) if index in seen else observed
            copies.end()
        for row in self.rows:
            row.step.add_(1)
        return list(seen.items())

    def release(self) -> None:
        """End the step; let go of its gradients."""
        for ready in self._ready.values():
            for each in ready:
                each.plan.release()
        self.rows, self._ready = [], {}
        self._native.release()


def copies_for(device: torch.device) -> Copies:
    """Return how chunks get from `device` and back."""
    return GPUCopies(device)


def _bound(chunk: _Chunk, stage: tuple[Tensor, Tensor]) -> _Ready:
    param, gradient = (
        whole[: part.nbytes].view(part.dtype).view(part.shape)
        for whole, part in zip(stage, (chunk.param, chunk.gradient), strict=True)
    )
    param.grad_dtype = None
    param.grad = gradient
    plan = cpu.Plan([[param]])
    entry: dict[str, Any] = {"step": chunk.row.step.clone()} | chunk.slots
    state_box: list[Any] = [{param: entry}, True]
    plan.gather([[param]], state_box)
    fault = plan.bind(0, gradient, entry, entry, chunk.numbering)
    if fault is not None:
        raise ValueError(f"{chunk.row.name} cannot be updated on the host: {fault}")
    plan.steps()
    plan.remember(state_box[0])
    return _Ready(chunk, param, gradient, plan, state_box)


def _together(one: Observed, other: Observed) -> Observed:
    ratio = one.ratio if one.ratio > other.ratio or math.isnan(one.ratio) else other.ratio
    return Observed(one.gradient + other.gradient, one.update + other.update, one.param + other.param, ratio)

"""The plan: which rows a step updates, and on which engines, as one unit.

A step calls `gather`, `bind` for every changed row and `compare` after them, `steps`, `measure` if the host needs the
gradient norm, `write`, and `release`. Nothing that the user sees is written before `write`, and `write` updates all
rows or none.
"""

from __future__ import annotations

from array import array
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import choice, cpu, cuda, offload, pinned, reference
from .interrupts import uninterrupted
from .observed import Seen
from .protocol import Engine, StepOrder
from .row import Row, check_apart
from .step_counts import StepCounts
from .told import warn

if TYPE_CHECKING:
    from .cuda.device import CUDA


class Plan:
    """The rows that are stepped as one unit, and the engines that update them.

    The plan keeps the rows of the CPU and CUDA engines from step to step, and finds those that have changed. Rows of
    the other engines count as changed at each step. ``groups``: the parameters of each group. ``counts``: the step
    counts, shared with earlier plans for the same rows.
    """

    def __init__(self, groups: list[list[Tensor]], counts: StepCounts) -> None:
        self._groups = groups
        self._only = choice.forced
        native = cpu.missing is None and self._only != "reference"
        self._rows = cpu.new_rows(groups) if native else reference.Rows(groups)
        self._counts = counts
        self._cpu = cpu.CPU(self._rows)
        self._cuda: CUDA | None = None
        self._offload: offload.Offload | None = None
        self._reference = reference.Reference()
        self._engines: list[Engine] = [self._cpu]  # in the order in which they write

    def gather(self, groups: list[list[Tensor]], state_box: list[Any]) -> list[int] | None:
        """Begin a step; return the numbers of the changed rows, or None if the groups have other parameters now.

        ``state_box`` is [state, whether somebody has read ``optimizer.state`` since the last step]. It holds the only
        reference to the state. If nobody has read it and nobody holds a reference to a part of it, the state is
        unchanged, and the plan does not read it again.
        """
        if len(self._engines) > 1:
            for engine in self._engines[1:]:  # if an interrupt has prevented the last release
                engine.release()
        return self._rows.gather(groups, state_box) if self._only == choice.forced else None

    def bind(self, row: Row) -> None:
        """Add a checked row to this step, on the engine for its device."""
        engine = self._engine_of(row)
        if engine is not self._cuda:
            pinned.in_flight.wait()  # its parameter may have moved here from a GPU that still writes its state
        engine.bind(row)

    def _engine_of(self, row: Row) -> Engine:
        device = row.gradient.device
        native = not isinstance(self._rows, reference.Rows)
        if native and choice.forced != "reference" and offload.is_offloaded(row):
            return self._begun_offload()
        name = choice.name_for(device)
        if name == "cpu" and native:
            return self._cpu
        if name == "cuda" and native:
            return self._begun_cuda()
        if choice.forced is None:
            _warn_of_reference(device)
        return self._begun_reference()

    def _begun_reference(self) -> reference.Reference:
        if self._reference not in self._engines:
            self._engines.append(self._reference)
        return self._reference

    def _begun_cuda(self) -> CUDA:
        if self._cuda is None:
            from .cuda.device import CUDA

            assert not isinstance(self._rows, reference.Rows)
            self._cuda = CUDA(self._rows, self._counts)
            self._engines.insert(1, self._cuda)
        return self._cuda

    def _begun_offload(self) -> offload.Offload:
        if self._offload is None:
            self._offload = offload.Offload(self._groups, cpu.new_rows(self._groups))
            self._engines.append(self._offload)
        return self._offload

    def compare(self) -> None:
        """Raise if the state of a bound row shares memory with another row."""
        self._rows.compare()
        check_apart(self._reference.rows)
        if self._offload is not None:
            self._offload.compare()

    # Steps that a device decides

    @property
    def on_device(self) -> bool:
        """Whether any row was bound to a GPU."""
        return self._cuda is not None

    @property
    def deciding(self) -> torch.device | None:
        """The GPU that all rows of this step are on, which can then decide the step; None if there is no such GPU."""
        if self._cuda is None or self._reference.rows or (self._offload is not None and self._offload.rows):
            return None
        kind, index = self._cuda.counts.rows.only_device()
        if not kind:
            return None
        return torch.device("cpu") if kind == 1 else torch.device("cuda", index)

    @property
    def begun(self) -> bool:
        """Whether the device of this step's rows has taken a step before, which capturing requires."""
        return self._cuda is not None and self._cuda.counts.begun

    def assume(self) -> bool:
        """Assume this step's counts until the device confirms them; return False if those of other rows are assumed."""
        return self._cuda is not None and self._cuda.counts.assume()

    def leaves_captured_alone(self) -> bool:
        """Whether captured steps update rows that are not in this step."""
        own = isinstance(self._rows, reference.Rows)
        return not own and self._counts.leaves_captured_alone(self._rows.step_counts())

    def decided(self) -> tuple[Tensor, Tensor]:
        """Return the gradient norm (if it was measured) and the scale that the device has used, as tensors there."""
        assert self._cuda is not None
        return self._cuda.counts.decided()

    # The step

    def steps(self) -> list[tuple[int, float]]:
        """Return (group, step count after this step) for each set of scalars that the rows of this step need."""
        found = self._rows.steps()
        if len(self._engines) == 1:
            return found
        for engine in (self._reference, self._offload):
            if engine is not None and engine.rows:
                engine.first_set = len(found)
                found += [(row.group, row.step.item() + 1) for row in engine.rows]
        return found

    def measure(self, scale: float, kinds: array[int] | None) -> list[int]:
        """Return the words of the exact sum of the squares of this step's gradients, as `Engine.measure` does."""
        if len(self._engines) == 1:
            return self._rows.measure(torch.get_num_threads(), scale, kinds)
        return [sum(words) for words in zip(*(engine.measure(scale, kinds) for engine in self._engines), strict=True)]

    def write(self, order: StepOrder) -> list[tuple[int, Seen]]:
        """Update every row, or none if an exception occurs before the first write.

        Returns (row number, observation) of each row if the step is observed.
        """
        for engine in self._engines:
            engine.prepare(order)
        if self._cuda is not None:
            self._cuda.exchange()
        params = self._rows.before_writing(order.state_box[0])
        if self._offload is not None:
            params += [row.param for row in self._offload.rows]
        torch.autograd.graph.increment_version(params)
        try:
            return self._write(counts=order.counts)
        except BaseException:  # an interrupt between two writes: finish them first
            if self.written:
                self._write(counts=order.counts)
            raise

    def _write(self, *, counts: bool) -> list[tuple[int, Seen]]:
        if len(self._engines) == 1:
            return self._cpu.write()
        seen: list[tuple[int, Seen]] = []
        with uninterrupted() if self._cuda is not None or self._offload is not None else nullcontext():
            for engine in self._engines:
                seen += engine.write()
            if counts and self._counts.captured:
                self._counts.keep_up()
        return seen

    @property
    def written(self) -> bool:
        """Whether this step has begun to write."""
        return self._rows.written

    def release(self) -> None:
        """End the step; drop the references to its gradients."""
        for engine in self._engines:
            engine.release()


_warned_of: set[str] = set()


def _warn_of_reference(device: torch.device) -> None:
    """Warn once for each type of device that its parameters are updated slowly, and why."""
    if device.type in _warned_of:
        return
    _warned_of.add(device.type)
    known = {"cpu": cpu.missing, "cuda": cuda.missing}
    reason = known.get(device.type) or f"there is no faster engine for {device.type} devices yet"
    warn(
        f"lucid.optim updates parameters on {device.type} with its slow reference engine: {reason}",
        RuntimeWarning,
    )

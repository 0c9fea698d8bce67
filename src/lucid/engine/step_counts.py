"""Whether the host's step counts are confirmed, and what captured steps keep alive.

The host counts every step as taken. If a device decides whether a step is taken, the count is *assumed* until it is
*confirmed*. Until then the device keeps a *correction*, and adds it in every later step. A step that is *captured* in a
CUDA graph counts at each replay: the host's count does not change, and the correction grows.

If processes decide together and one of them cannot step, the devices of the others do not take the step, and set an
*alarm* in the host's memory. The host raises the error when it next confirms, which the next step does after an alarm.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .interrupts import uninterrupted
from .numbers import KEPT, SET, Kept, Scalar
from .spikes import ToldMemory

if TYPE_CHECKING:
    from . import _cpu

Device = tuple[int, int]  # DLPack's type and index


class OtherFailedError(RuntimeError):
    """Another process could not step, so nothing was updated here."""

    def __init__(self) -> None:
        super().__init__("another process could not step, so nothing was updated here; its own error says why")


@dataclass(frozen=True, slots=True, eq=False)
class CapturedStep:
    """A captured step: the host memory that each replay reads, and the step counts that it continues from.

    ``config``: int64, pinned host memory, as the kernel ``decide`` reads it. ``counts``: one step count for each set in
    ``config``. ``every_count``: the step counts of all rows. ``alive``: the tables, the words that stay on
    the device, the state: all other memory that a replay reads or writes.
    """

    config: Tensor
    counts: list[Tensor]
    every_count: list[Tensor]
    alive: list[Any]

    def keep_up(self, spikes: ToldMemory) -> None:
        """Make the next replay continue from the host's step counts and memory of norms."""
        spikes.write(self.config.numpy())
        words = self.config.view(torch.float64)
        for number, count in enumerate(self.counts, 1):
            words[number * SET + Scalar.COUNT] = count.item() + 1


class Confirmed(NamedTuple):
    """What devices tell of the steps since they were asked last.

    ``skipped``: how many were skipped. ``refused``: how many were not taken because another process could not step.
    ``spiked``: of the skipped ones, those with a spike. ``anew``: how often the memory of norms became blank.
    """

    skipped: int = 0
    refused: int = 0
    spiked: int = 0
    anew: int = 0

    def and_(self, other: Confirmed) -> Confirmed:
        return Confirmed(*map(operator.add, self, other))


@dataclass(slots=True, eq=False)
class DeviceCounts:
    """The step counts of the rows of one plan that are on devices. ``spikes``: the memory of norms, of all plans."""

    rows: _cpu.Rows
    spikes: ToldMemory
    words: dict[Device, Tensor] = field(default_factory=dict)  # int64[KEPT] on each device
    alarms: dict[Device, NDArray[np.int64]] = field(default_factory=dict)  # one word for each device
    decider: Device = (0, 0)  # the device whose counts are assumed
    assumed: bool = False
    captured: list[CapturedStep] = field(default_factory=list)

    def assume(self) -> bool:
        """Assume that the rows of this step take it; return False if the counts of other rows are already assumed."""
        device = self.rows.only_device()
        if (self.assumed and device != self.decider) or not self.rows.assume():
            return False
        self.assumed, self.decider = True, device
        return True

    @property
    def begun(self) -> bool:
        """Whether the device of this step's rows has taken a step before, which capturing requires."""
        return self.rows.only_device() in self.words

    @property
    def alarmed(self) -> bool:
        """Whether another process could not take a step with this one, as far as the host knows without waiting."""
        return self.assumed and self.decider in self.alarms and bool(self.alarms[self.decider][0])

    def confirm(self) -> Confirmed:
        """Correct the host's step counts and memory of norms, waiting for the device."""
        if not self.assumed:
            return Confirmed()
        words = self.words.get(self.decider)
        kept = np.array([0] * KEPT if words is None else words.tolist(), np.int64)
        found = Confirmed(*kept[[Kept.SKIPPED, Kept.REFUSED, Kept.SPIKED, Kept.ANEW]].tolist())
        with uninterrupted():
            if words is not None:
                words[: Kept.REFUSED + 1].zero_()
                words[Kept.SPIKED : Kept.ANEW + 1].zero_()
            if found.refused:
                self.alarms[self.decider][0] = 0
            self.rows.correct(int(kept[Kept.CORRECTION]), keep=bool(self.captured))
            self.spikes.take(kept)
            self.assumed = bool(self.captured)
        self.keep_up()
        return found

    def keep_up(self) -> None:
        """Make replays of captured steps continue from the host's step counts and memory of norms."""
        if self.captured and self.spikes.memory is not None:
            self.spikes.tell(self.spikes.memory)
        for step in self.captured:
            step.keep_up(self.spikes)

    def decided(self) -> tuple[Tensor, Tensor]:
        """Return the gradient norm and the scale of the last step that the device decided: 0-dim, on the device."""
        words = self.words[self.decider].view(torch.float64)
        return words[Kept.NORM], words[Kept.SCALE]


class StepCounts:
    """The step counts of one `lucid.optim.atomic_step.AtomicStep`, over all plans that it has had.

    It is the only owner of captured steps: those that are counted, including those of earlier plans, and those that are
    no longer counted but may still be replayed.
    """

    def __init__(self) -> None:
        self.found = Confirmed()  # what devices have told that is not yet added to the optimizer's skipped steps
        self.spikes = ToldMemory()
        self._current: DeviceCounts | None = None
        self._earlier: list[DeviceCounts] = []  # with captured steps that may still be replayed
        self._uncounted: list[CapturedStep] = []

    def begin(self, rows: _cpu.Rows) -> DeviceCounts:
        """Return new counts, for a plan that has its first row on a device."""
        self._current = DeviceCounts(rows, self.spikes)
        return self._current

    def retire(self) -> None:
        """Drop the current plan's counts, but keep what its captured steps need."""
        self.confirm()
        if self._current is not None and self._current.captured:
            self._earlier.append(self._current)
        self._current = None

    def _all(self) -> list[DeviceCounts]:
        return self._earlier if self._current is None else [self._current, *self._earlier]

    @property
    def assumed(self) -> bool:
        """Whether any count has to be confirmed."""
        if self._current is None and not self._earlier:
            return False
        return any(counts.assumed for counts in self._all())

    @property
    def captured(self) -> bool:
        """Whether there are captured steps, which may have been replayed since."""
        return bool(self._earlier) or (self._current is not None and bool(self._current.captured))

    @property
    def alarmed(self) -> bool:
        """Whether another process could not take an earlier step, as far as the host knows without waiting."""
        return self._current is not None and self._current.alarmed

    def confirm(self) -> None:
        """Confirm all assumed counts, waiting for the devices; add what they tell to ``found``.

        Raises OtherFailedError, after all this, if another process could not take one of the steps.
        """
        refused = self.found.refused
        for counts in self._all():
            self.found = self.found.and_(counts.confirm())
        if self.found.refused > refused:
            raise OtherFailedError

    def leaves_captured_alone(self, own: list[tuple[int, Tensor]]) -> bool:
        """Whether captured steps update rows that are not among the rows with these step counts."""
        present = {id(count) for _, count in own}
        steps = [step for counts in self._all() for step in counts.captured]
        return any(id(count) not in present for step in steps for count in step.every_count)

    def hold(self, state: list[dict[str, Any]]) -> None:
        """Keep alive the state that the step just captured writes to, even if the optimizer's state is replaced."""
        assert self._current is not None
        self._current.captured[-1].alive.append(state)

    def keep_up(self) -> None:
        """Make replays of captured steps continue from the host's step counts."""
        for counts in self._all():
            counts.keep_up()

    def stop_counting(self) -> None:
        """Stop counting captured steps, because the state that they write to is replaced."""
        self.confirm()
        for counts in self._all():
            self._uncounted += counts.captured
            counts.captured.clear()
            counts.rows.correct(0, keep=False)
            counts.assumed = False
        self._earlier.clear()

    def release_captured(self) -> None:
        """Drop captured steps and the memory that they need; their graphs must not be replayed again."""
        self.stop_counting()
        self._uncounted.clear()

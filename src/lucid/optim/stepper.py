"""Lets one step run at a time, and keeps the results. A wrapper that copies an optimizer's attributes shares this."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from lucid import engine
from lucid.engine.spikes import MOST_IN_A_ROW, WARM_UP
from lucid.engine.step_counts import Confirmed
from lucid.engine.told import warn

from .atomic_step import AtomicStep
from .backward import StepInBackward, UpdatesAlone, record_stream
from .exchange import Exchange
from .inputs import Inputs, Outcome
from .overlap import Overlap
from .state_box import StateBox
from .statistics import Observations

_forks = 0  # that made this process


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)  # os.getpid() would ask the system at each step


_AVERAGED = (
    "within averaged() the parameters hold averages and the state holds the training weights; step, save, load, add "
    "groups, and read state and averages outside of that block"
)


class SkippedSteps:
    """The numbers of skipped steps: of the whole optimizer, and in backward of single parameters."""

    def __init__(self) -> None:
        self.whole = 0
        self.spikes = 0  # of the whole optimizer, those with a spike
        self.in_backward = 0
        self.alone: dict[Tensor, int] = {}  # those in backward, by parameter

    @property
    def total(self) -> int:
        """The number of all skipped steps; in backward, each skipped update of a parameter counts."""
        return self.whole + self.in_backward

    def count(self, step: AtomicStep, left_out: int) -> None:
        """Count skipped steps."""
        if step.param is None:
            self.whole += left_out
        elif left_out:
            self.in_backward += left_out
            self.alone[step.param] = self.alone.get(step.param, 0) + left_out

    def count_spikes(self, spiked: int, anew: int) -> None:
        """Count spikes, already counted as skipped steps; warn if their memory was blank afterwards."""
        self.spikes += spiked
        if anew:
            warn(
                f"spike_threshold: {MOST_IN_A_ROW} steps in a row were skipped because their gradient norm was far "
                f"above those before. The optimizer forgets the earlier norms and takes the next {WARM_UP} steps "
                "whatever their norm; look at your data and your learning rate",
                RuntimeWarning,
            )

    def of(self, param: Tensor) -> int:
        """Return how many skipped steps concern a parameter."""
        return self.whole + self.alone.get(param, 0)


class Stepper:
    """Lets one step run at a time, of the whole optimizer or of one parameter in backward, and keeps its results."""

    def __init__(self) -> None:
        self.whole = AtomicStep()
        self.alone: weakref.ref[UpdatesAlone]  # the optimizer
        self.backward: StepInBackward | None = None
        self.accumulating = 0
        self.skipped = SkippedSteps()
        self.grad_norm: float | Tensor | None = None
        self.observations = Observations()
        self.overlap = Overlap()
        self._exchange: Exchange | None = None  # while parameters hold averages
        self._unconfirmed: dict[AtomicStep, None] = {}  # steps with assumed counts, in the order of insertion
        self._unlock()

    def _unlock(self) -> None:
        self._lock = threading.RLock()
        self._stepping = False
        self._forks = _forks

    # Stepping

    def step(self, inputs: Inputs, failed: Callable[[], None]) -> None:
        """Update every parameter that has a gradient, all of them or none. ``failed``: called if the step raises."""
        if self.overlap.lanes:
            self.overlap.join()
        try:
            outcome = self._run(self.whole, inputs, inputs.state, failed)
        finally:
            if inputs.left is not None:
                inputs.left.clear()
        in_backward = self.backward is not None
        self.grad_norm = None if in_backward else outcome.norm
        self.observations.add(outcome.observed, None if in_backward else outcome.scale)

    def step_alone(self, param: Tensor, inputs: Callable[[], Inputs], failed: Callable[[], None]) -> None:
        """Update one parameter, whose gradient is complete in this backward, and free the gradient."""
        backward = self.backward
        if backward is None or self.accumulating or param.grad is None or backward.leaves_to_step(param):
            return
        left = backward.left if param in backward.sharded.params else None
        try:
            outcome = self._update_alone(backward, param, inputs(), failed)
        except Exception as error:
            if left is None:
                raise
            left.keep(error)  # for step(): the other processes wait for this one in the rest of backward
            return
        if outcome is None:
            return
        if left is None:
            if outcome.observed:
                self.observations.add(outcome.observed, None)
        else:
            left.seen |= outcome.observed
            record_stream(param.grad)
        param.grad = None

    def _update_alone(
        self, backward: StepInBackward, param: Tensor, inputs: Inputs, failed: Callable[[], None]
    ) -> Outcome | None:
        """Update one parameter; return None if the groups no longer contain it."""
        step = backward.step_of(param, inputs.groups, self.confirm)
        if step is None:
            return None
        box = StateBox.of_one(param, inputs.state.peek().get(param))
        try:
            if inputs.settings.state_device is None or param in backward.sharded.params:
                return self._run(step, inputs, box, failed)  # FSDP2 calls hooks on a stream of its own
            with self.overlap.updating(param):
                return self._run(step, inputs, box, failed)
        except BaseException:
            if step.written:
                param.grad = None  # the update has used it, even if it raised afterwards
            raise

    def _run(self, step: AtomicStep, inputs: Inputs, box: StateBox, failed: Callable[[], None]) -> Outcome:
        """Run a step under the lock; raise, without ``failed``, if a step of this thread is already running."""
        if self._forks != _forks:  # the same as _own_lock() and _check_idle(), without two calls in each step
            self._unlock()
        with self._lock:
            if self._stepping:
                self._check_idle("step()")
            self._stepping = True
            try:
                if self._unconfirmed and not engine.cuda.is_capturing():
                    self._confirm_others(step)
                if self._exchange is not None:
                    error = RuntimeError(_AVERAGED)
                    step.tell_others(inputs, inputs.left, error)
                    raise error
                try:
                    outcome = step.update(inputs, box)
                finally:
                    if self._unconfirmed or step.counts.assumed or step.counts.found.skipped:
                        self._count(step)
                if outcome.skipped:
                    self.skipped.count(step, 1)
                    if outcome.spike is not None:
                        self.skipped.count_spikes(1, outcome.spike.anew)
                return outcome
            except BaseException:
                failed()
                raise
            finally:
                self._stepping = False

    def _own_lock(self) -> threading.RLock:
        """Return the lock that a step holds, of this process."""
        if self._forks != _forks:  # a fork may have happened while another thread held the lock
            self._unlock()
        return self._lock

    def _check_idle(self, call: str) -> None:
        if self._stepping:
            raise RuntimeError(f"{call} was called within a running step(), perhaps by a signal handler")

    # While parameters hold averages

    def check_trains(self) -> None:
        """Raise if parameters hold averages."""
        if self._exchange is not None:
            raise RuntimeError(_AVERAGED)

    @contextmanager
    def exchanged(self, exchange: Exchange) -> Iterator[None]:
        """Return a context in which the parameters hold averages, and no step is taken."""
        try:
            with self._own_lock():
                self._check_idle("averaged()")
                self.check_trains()
                self._exchange = exchange
                exchange.enter()
            yield
        finally:
            try:
                self._leave(exchange)
            finally:
                self._leave(exchange)  # if an interrupt came before the first call held interrupts back

    def _leave(self, exchange: Exchange) -> None:
        if self._exchange is exchange:
            with self._own_lock():
                exchange.leave()
                self._exchange = None

    # Steps that a device decides

    def _confirm_others(self, step: AtomicStep) -> None:
        for other in [other for other in self._unconfirmed if other is not step]:
            if other is self.whole or step is self.whole:  # only these share parameters
                self._confirm(other)

    def _confirm(self, step: AtomicStep) -> None:
        try:
            step.counts.confirm()
        finally:  # it raises if another process could not step
            self._count(step)

    def _count(self, step: AtomicStep) -> None:
        """Count the steps that a device has skipped; remember the step if its counts are assumed."""
        found, step.counts.found = step.counts.found, Confirmed()
        self.skipped.count(step, found.skipped)
        if step.counts.assumed:
            self._unconfirmed[step] = None
        else:
            self._unconfirmed.pop(step, None)
        if found.spiked:
            self.skipped.count_spikes(found.spiked, found.anew)

    def confirm(self) -> None:
        """Confirm all assumed step counts, waiting for the devices that decide steps."""
        self.overlap.join()  # it reads on the current stream
        if not self._unconfirmed or engine.cuda.is_capturing():
            return
        with self._lock:
            for step in list(self._unconfirmed):
                self._confirm(step)

    def settle(self) -> None:
        """Confirm all assumed step counts, and wait for kernels that still write to state on the host."""
        self.confirm()
        engine.pinned.in_flight.wait()

    def stop_counting_captured(self) -> None:
        """Stop counting captured steps, because the state that they write to is replaced."""
        self.confirm()
        for step in self._unconfirmed:
            step.counts.stop_counting()
        self._unconfirmed.clear()

    def release_captured(self) -> None:
        """Release captured steps and the memory that they need."""
        self.stop_counting_captured()
        for step in self._steps():
            step.counts.release_captured()

    def _steps(self) -> Iterator[AtomicStep]:
        yield self.whole
        if self.backward is not None:
            yield from self.backward.steps.values()

    # In backward

    @contextmanager
    def accumulated(self) -> Iterator[None]:
        """Return a context manager in which backward only accumulates gradients."""
        self.accumulating += 1
        try:
            yield
        finally:
            self.accumulating -= 1

    def forget(self, param: Tensor) -> None:
        """Drop the results of a parameter that is no longer in the optimizer."""
        self.observations.seen.pop(param, None)
        self.skipped.alone.pop(param, None)

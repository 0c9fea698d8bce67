"""The all-or-nothing step: gather, check, judge, adopt, write.

It updates all parameters of an optimizer or, in backward, one. It does not know the optimizer: it reads `Inputs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lucid import engine
from lucid.engine.formats import STEP
from lucid.engine.scalars import MAX_STEP
from lucid.engine.values import checked_lr, is_on

from .agreement import Agreement, Finding
from .gradients import NO_AMP, Described, device_verdict, found_inf_in, host_verdict, scale_of
from .groups import ParamGroup, checked_params
from .hyperparameters import Hyperparameters, Readings
from .inputs import UPDATED, Inputs, Outcome
from .left_to_step import LeftToStep
from .members import Member, flat, member_at, members, params_of
from .new_state import NewEntry, NewState
from .spike_memory import shared_memory
from .state_box import StateBox


class _Gathered(NamedTuple):
    """A gathered step: the plan with all rows bound, and for each group its parameters and hyperparameters.

    ``exchanges``: whether processes exchange words in this step. ``memory``: the memory of norms, None if no spike is
    looked for.
    """

    plan: engine.Plan
    agreement: Agreement
    params: list[list[Tensor]]
    hyperparameters: list[Hyperparameters]
    exchanges: bool
    memory: list[Any] | None


class AtomicStep:
    """The step of a set of parameters, which updates all or none, with its plan that is kept from step to step.

    ``only``: the (group, place) of the one parameter ``param``, or None for all parameters.
    """

    def __init__(self, only: tuple[int, int] | None = None, param: Tensor | None = None) -> None:
        self.only, self.param = only, param
        self.counts = engine.StepCounts()
        self.written = False  # whether the last update raised (an interrupt) after it had written
        self.plan: engine.Plan | None = None
        self._first_group = 0 if only is None else only[0]  # the optimizer's number of the plan's first group
        self._readings = Readings(None if only is None else only[0])
        self._agreement: Agreement | None = None
        self._planned: list[Any] = []  # for each group, the hyperparameters on which its slots depend
        self._checked: dict[int, Tensor] = {}  # gradients of the rows that were checked in this step
        self._exchanged = False  # whether this process has taken part in this step's exchange

    def update(self, inputs: Inputs, box: StateBox) -> Outcome:
        """Update the parameters that have gradients, unless the verdict is to skip.

        ``box``: the box with all state, or with that of the one parameter.
        """
        self.written = self._exchanged = False
        left = None if self.only is not None else inputs.left
        if box is inputs.state:
            box = box.now()
            new = NewState([box])
        else:
            new = NewState([box, inputs.state])
        try:
            try:
                if inputs.left is not None:
                    inputs.left.check_uncaptured()
                if self.counts.alarmed:
                    self.counts.confirm()
                if left is not None:
                    left.check()
                gathered = self._gather(inputs, box, new)
                verdict = self._left_to_device(inputs, gathered, new)
                scale, found_inf = 1.0, False
                if verdict is None and inputs.amp is not NO_AMP:
                    scale, found_inf = scale_of(inputs.amp.grad_scale), found_inf_in(inputs.amp.found_inf)
                recipes = self._recipes(gathered, verdict)
                if left is not None:
                    self._exchanged = True
                    left.check_others(gathered.agreement)
                    self._exchanged, left = False, None
                if verdict is not None:
                    return self._write(inputs, gathered, box, new, recipes, verdict)
                begun = _has_begun(self.only, gathered, box, new)
                judged, begun = self._judge(inputs, gathered, scale, found_inf, begun)
            except Exception as error:
                if not self._exchanged:
                    self.tell_others(inputs, left, error)
                raise
            # If gradients are judged, all processes skip together. Otherwise others may step and exchange
            # observations, so this process must take part in that exchange.
            if judged.skip:
                observed = {} if inputs.settings.judges else self._observed(inputs, gathered, box, skips=True)
                if judged.spike is not None and gathered.memory is not None:
                    gathered.memory[:] = judged.spike.memory
                    self.counts.keep_up()
                return Outcome(True, judged.norm, scale, observed, judged.spike)
            if not begun:
                new.adopt()
                return Outcome(False, judged.norm, scale, {})
            if judged.spike is not None and gathered.memory is not None:
                new.remember(gathered.memory, judged.spike.memory)
            return self._write(inputs, gathered, box, new, recipes, judged)
        except BaseException:
            self.written = self.plan is not None and self.plan.written
            raise
        finally:
            if self.plan is not None:
                self.plan.release()
            self._checked.clear()

    # Gather

    def _gather(self, inputs: Inputs, box: StateBox, new: NewState) -> _Gathered:
        read = self._readings
        read.renew(inputs.groups, inputs.read)
        params, hyperparameters = read.params, read.hyperparameters.copy()
        if self.only is not None:
            place = self.only[1]
            params = [params[0][place : place + 1]]
        changed = None
        if self.plan is not None and self._planned == read.slots_depend_on:
            changed = self.plan.gather(params, box.cells)
        if self.plan is None or changed is None:
            checked_params(flat(params))
            agreement, plan = self._agreement_of(flat(params), inputs), engine.Plan(params, self.counts)
            self.plan = None  # only now, because an exception above must leave the plan together with its counts
            self.counts.retire()
            self._agreement, self._planned, self.plan = agreement, read.slots_depend_on, plan
            changed = self.plan.gather(params, box.cells)
        assert self._agreement is not None
        if changed:
            for row in self._rows(inputs, changed, box, hyperparameters, new):
                self.plan.bind(row)
            every = flat(params)
            if not all(self._agreement.knows(row, every[row]) for row in changed):
                self._agreement = self._agreement_of(every, inputs)
            self.plan.compare()
        exchanges = bool(self._agreement) and self._exchanges(inputs, [hyper.lr for hyper in hyperparameters])
        memory = None if inputs.settings.spike_threshold is None else shared_memory(inputs.groups)
        return _Gathered(self.plan, self._agreement, params, hyperparameters, exchanges, memory)

    def _agreement_of(self, params: list[Tensor], inputs: Inputs) -> Agreement:
        """Return with whom this step decides: in backward, where no process must wait for another, with nobody."""
        return NOBODY if self.only is not None else Agreement(params, inputs.settings.shard_group)

    # Check

    def _members(self, groups: list[ParamGroup]) -> list[Member]:
        """Return the parameters in the order of the plan's rows."""
        return list(members(groups)) if self.only is None else [member_at(groups, *self.only)]

    def _rows(
        self,
        inputs: Inputs,
        changed: Iterable[int],
        box: StateBox,
        hyperparameters: list[Hyperparameters],
        new: NewState,
    ) -> Iterator[engine.Row]:
        """Check the changed rows and make state for those that have none; raise if one is invalid."""
        own = self._members(inputs.groups)
        for index in changed:
            member = own[index]
            group, param, name = member.group - self._first_group, member.param, member.name
            hyper = hyperparameters[group]
            kept = hyper.format_of(param, name, inputs.settings.state_device)
            gradient = self._checked[index] = engine.checked_gradient(param, name)
            entry = box.entry(param, name)
            missing = kept.complete(param, entry, hyper.amsgrad, name, member.rounding_key(hyper.seed))
            if missing:
                new.entries.append(NewEntry(param, gradient, entry, missing))
            whole: dict[str, Any] = entry | missing
            slots = {key: whole[key] for key in kept.slots_with(hyper.amsgrad)}
            form = kept.row_format
            numbering = engine.shards.numbering(param, name) if form.draws else engine.shards.WHOLE
            row = engine.Row(index, group, name, param, gradient, entry, whole[STEP], slots, form, numbering)
            engine.check_memory(row)
            yield row

    def _left_to_device(self, inputs: Inputs, gathered: _Gathered, new: NewState) -> engine.DeviceVerdict | None:
        """Return what the device needs if it decides this step, else None; confirm step counts if the host decides."""
        plan, counts = gathered.plan, self.counts
        captured, capturing = counts.captured, engine.cuda.is_capturing()
        if not (plan.on_device or captured or capturing) or (capturing and not (plan.steps() or gathered.agreement)):
            return None
        if captured and plan.steps() and plan.leaves_captured_alone():
            raise RuntimeError(
                "step() updates other parameters than the steps captured in CUDA graphs, whose step counts would then "
                "be wrong; give gradients to all parameters of the captured steps, or release these steps with "
                "optimizer.release_captured() and capture again"
            )
        verdict = device_verdict(
            plan,
            counts,
            inputs.settings,
            inputs.amp,
            gathered.hyperparameters,
            gathered.agreement,
            self._exchange if gathered.exchanges else None,
            gathered.memory,
            fresh=bool(new.entries),
        )
        waits = verdict is None or (captured and not verdict.captured)
        if waits and (plan.on_device or captured):
            counts.confirm()
        return verdict

    def _exchanges(self, inputs: Inputs, rates: Iterable[Any]) -> bool:
        """Whether processes that decide together exchange words in this step.

        They do to judge gradients, and if every learning rate is 0, because torch may be creating state. A rate in a
        tensor is not read, but may be 0. ``rates``: those of all groups. All processes have these in common.
        """
        return inputs.settings.judges or (
            self.only is None and all(isinstance(rate, Tensor) or rate == 0 for rate in rates)
        )

    def _exchange(self, words: Tensor) -> Tensor:
        assert self._agreement is not None
        self._exchanged = True
        return self._agreement.exchange(words)

    def _total(self, words: list[int]) -> list[int]:
        assert self._agreement is not None
        self._exchanged = True
        return self._agreement.total(words)

    def _recipes(self, gathered: _Gathered, verdict: engine.DeviceVerdict | None) -> list[engine.Recipe]:
        """Return the recipes of this step's scalars; learning rate tensors are read unless the device reads them."""
        plan, hyperparameters = gathered.plan, gathered.hyperparameters
        recipes, sets = [], plan.steps()
        for group, hyper in enumerate(hyperparameters) if sets else ():
            if isinstance(hyper.lr, Tensor) and (verdict is None or not is_on(plan.deciding, hyper.lr)):
                hyperparameters[group] = hyper.with_lr(checked_lr(hyper.lr))
        for group, step in sets:
            if not (1 <= step < MAX_STEP and step.is_integer()):
                raise _bad_count(step, group + self._first_group)
            recipes.append(hyperparameters[group].recipe(group, step))
        return recipes

    # Judge

    def _judge(
        self, inputs: Inputs, gathered: _Gathered, scale: float, found_inf: bool, begun: bool
    ) -> tuple[engine.HostVerdict, bool]:
        if inputs.amp is NO_AMP and not inputs.settings.judges and not gathered.exchanges:
            return engine.UNJUDGED, begun

        def described() -> Iterator[Described]:
            for row, member in enumerate(self._members(inputs.groups)):
                if member.param.grad is not None:
                    gradient = self._checked.get(row)
                    if gradient is None:
                        gradient = engine.checked_gradient(member.param, member.name)
                    yield Described(member.name, member.param, gradient)

        untouched = "nothing was updated" if self.only is None else "it was not updated"
        plan, agreement, total = gathered.plan, gathered.agreement, self._total if gathered.exchanges else None
        return host_verdict(
            plan, agreement, inputs.settings, scale, found_inf, begun, total, described, untouched, gathered.memory
        )

    # Adopt, write

    def _write(
        self,
        inputs: Inputs,
        gathered: _Gathered,
        box: StateBox,
        new: NewState,
        recipes: list[engine.Recipe],
        verdict: engine.Verdict,
    ) -> Outcome:
        plan = gathered.plan
        observe = inputs.settings.observing
        try:
            new.adopt()
            table = engine.table(recipes, verdict.factor) if isinstance(verdict, engine.HostVerdict) else None
            threads = torch.get_num_threads()
            counts = isinstance(verdict, engine.HostVerdict) or not verdict.captured
            seen = plan.write(engine.StepOrder(recipes, table, verdict, box.cells, threads, observe, counts))
        except BaseException as error:
            if not plan.written:
                new.abandon()
            if isinstance(error, Exception):
                with suppress(Exception):
                    self._observed(inputs, gathered, box)
            raise
        if verdict is engine.UNJUDGED and not observe:
            return UPDATED
        observed = self._observed(inputs, gathered, box, seen) if observe else {}
        if isinstance(verdict, engine.HostVerdict):
            return Outcome(False, verdict.norm, verdict.scale, observed)
        if verdict.captured:  # each replay writes to the tensors that are the state now
            self.counts.hold([dict(entry) for entry in box.peek().values() if isinstance(entry, dict)])
        norm, scale = plan.decided()
        return Outcome(False, norm if verdict.measures else None, scale, observed)

    def _observed(
        self,
        inputs: Inputs,
        gathered: _Gathered,
        box: StateBox,
        seen: Iterable[tuple[int, engine.Seen]] = (),
        *,
        skips: bool = False,
    ) -> dict[Tensor, engine.Seen]:
        """Return the observations of all processes together. If observing is on, every process must call this."""
        if not inputs.settings.observing:
            return {}
        every = flat(gathered.params)
        if self.only is None and inputs.left is not None:
            before = inputs.left.seen
            seen = [*((row, before[param]) for row, param in enumerate(every) if param in before), *seen]
        state: Mapping[Any, Any] = box.peek()
        rows = gathered.agreement.observed(seen, every, state, inputs.skipped + skips)
        return {every[row]: values for row, values in rows}

    def tell_others(self, inputs: Inputs, left: LeftToStep | None, error: Exception) -> None:
        """Tell the processes that wait for this one that it cannot step. ``left``: if they ask about backward too.

        If it has only learned that another failed in an earlier step, they skip this one: an error would come back.
        """
        if self.only is not None or engine.cuda.is_capturing():  # the latter is refused on every process
            return
        late = isinstance(error, engine.OtherFailedError) and left is None
        with suppress(Exception):  # the caller raises the error that made the step fail
            agreement, params = _others(inputs, self._agreement, flat(self._readings.params))
            rates = [hyper.lr for hyper in self._readings.hyperparameters]  # groups may hold an invalid one now
            if left is not None or self._exchanges(inputs, rates or (group["lr"] for group in inputs.groups)):
                agreement.worst(Finding.BAD if late else Finding.FAILED)
            elif inputs.settings.observing:  # the others have stepped and exchange observations
                agreement.observed([], params, {}, inputs.skipped)


def _has_begun(only: tuple[int, int] | None, gathered: _Gathered, box: StateBox, new: NewState) -> bool:
    """Whether this step is not, as far as this process knows, one by which torch creates the optimizer's state.

    torch's checkpoint tools step a new optimizer with lr 0 and zero gradients. This must not count as a step.
    """
    if only is not None or (not new.entries and not gathered.agreement):
        return True
    if not all(hyper.lr == 0 for hyper in gathered.hyperparameters):
        return True
    return any(box.peek().values()) or any(bool(item.gradient.any()) for item in new.entries)


NOBODY = Agreement([torch.empty(0)], None)  # of one process


def _others(inputs: Inputs, agreement: Agreement | None, before: list[Tensor]) -> tuple[Agreement, list[Tensor]]:
    """Return with whom a step decides, and its parameters; if the groups are broken, those of the step before."""
    with suppress(Exception):
        params = params_of(inputs.groups)
        return Agreement(params, inputs.settings.shard_group), params
    params = before or params_of([group for group in inputs.groups if isinstance(group, dict)])
    return agreement or Agreement(params, inputs.settings.shard_group), params


def _bad_count(step: float, group: int) -> ValueError:
    return ValueError(
        f"step count of a parameter in group {group}: expected a whole number from 1 to {MAX_STEP - 1} "
        f"(float32 cannot count beyond {MAX_STEP}), got {step}"
    )

"""What is updated as one unit: all parameters of an optimizer, or, when it steps in backward, one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from lucid import engine
from lucid.engine.scalars import MAX_STEP

from .agreement import Agreement, Finding
from .formats import STEP, STREAM, StateFormatName
from .gradients import Judged, clip_factor, fault, found_inf_in, scale_of
from .groups import ParamGroup, checked_params
from .values import checked_lr, is_on

if TYPE_CHECKING:
    from .optimizer import Hyperparameters, Optimizer


class Member(NamedTuple):
    """A parameter of a part: its number over all groups, its group and its place in that."""

    number: int
    group: int
    place: int
    param: Tensor


def members_of(groups: list[ParamGroup]) -> list[Member]:
    """Return all parameters of the groups, in order."""
    positions = (
        (group, place, param) for group, items in enumerate(groups) for place, param in enumerate(items["params"])
    )
    return [Member(number, *position) for number, position in enumerate(positions)]


class Outcome(NamedTuple):
    """What an update did: the gradients' norm if it was measured, the scale they came with, what was observed.

    Where the device decided, norm and scale are there, and whether it skipped the step is known from `Part.settle`.
    """

    skipped: bool
    norm: float | Tensor | None
    scale: float | Tensor
    observed: dict[Tensor, engine.Seen]


class _NewState(NamedTuple):
    """State that a step has made and not yet shown to anyone."""

    param: Tensor
    gradient: Tensor
    entry: dict[str, Any]
    missing: dict[str, Tensor]


class Part:
    """Parameters whose updates happen all or none, and the plan for it that is kept from step to step.

    ``only``: the (group, place) of the one `param`, or None for all.
    """

    def __init__(self, only: tuple[int, int] | None = None, param: Tensor | None = None) -> None:
        self.only, self.param = only, param
        self.updated = False  # by the last update(), also if that was interrupted afterwards
        self.left_out = 0  # steps that a device has left out, and that nobody has counted yet
        self._retired: list[engine.Plan] = []  # whose captured steps may still be run
        self._forgotten: list[engine.Plan] = []  # whose captured steps nobody counts, but which may find their tables
        self._held: list[list[dict[str, Any]]] = []  # state that captured steps write to, whatever becomes of it here
        self._first_group = 0 if only is None else only[0]  # of the plan's groups
        self.plan: engine.Plan | None = None
        self._agreement: Agreement
        self._looked_at: dict[int, Tensor] = {}  # gradients of rows that were looked at in this step
        self._planned: list[tuple[bool, StateFormatName, bool]] = []  # of each group

    def update(self, optimizer: Optimizer, state_box: list[Any]) -> Outcome:
        """Update the parameters that have gradients, unless GradScaler has found some that are not finite.

        ``state_box``: as `engine.Plan.gather` takes it; of all state or of the one parameter's.
        """
        self.updated = False
        new: list[_NewState] = []
        try:
            try:
                plan, params, hyperparameters = self._prepared(optimizer, state_box, new)
                if (plan.captured or self._retired) and plan.steps():
                    self._keep_to_captured(plan)
                decision = self._decision(optimizer, plan, hyperparameters, new)
                waits = decision is None or ((plan.captured or self._retired) and not decision.captured)
                if waits and (plan.on_device or self._retired):
                    self.settle()
                scale = scale_of(vars(optimizer).get("grad_scale")) if decision is None else 1.0
                found_inf = decision is None and found_inf_in(vars(optimizer).get("found_inf"))
                for group, hyper in enumerate(hyperparameters):
                    if isinstance(hyper.lr, Tensor) and (decision is None or not is_on(plan.deciding, hyper.lr)):
                        hyperparameters[group] = hyper._replace(lr=checked_lr(hyper.lr))
                recipes = [
                    _recipe(group, hyperparameters[group], _checked_count(step, group + self._first_group))
                    for group, step in plan.steps()
                ]
            except Exception:
                self._tell_others(optimizer)
                raise
            judged = Judged(None, 1.0, False)
            if decision is None:
                judged = self._judged(optimizer, plan, scale, found_inf)
            if judged.skip:  # together where gradients are judged; else others may step, and tell of it
                told = {} if _is_judging(optimizer) else self._observed(optimizer, params, state_box[0], skips=True)
                return Outcome(True, judged.norm, scale, told)
            if decision is None and self.only is None and self._is_initialising(state_box[0], new, hyperparameters):
                _adopt(optimizer, state_box, new)
                return Outcome(False, judged.norm, scale, {})
            had = [(item.param in state_box[0], dict(item.entry)) for item in new]
            try:
                _adopt(optimizer, state_box, new)
                seen = plan.run(recipes, decision or judged.factor, state_box, observe=optimizer._observing)
            except BaseException as error:
                if not plan.ran:
                    _abandon(optimizer, state_box, new, had)
                if isinstance(error, Exception):
                    with suppress(Exception):
                        self._observed(optimizer, params, state_box[0])
                raise
            finally:
                for retired in self._retired:
                    retired.keep_up()
        finally:
            if self.plan is not None:
                self.updated = self.plan.ran
                self.plan.release()
            self._looked_at.clear()
        observed = self._observed(optimizer, params, state_box[0], seen)
        if decision is None:
            return Outcome(False, judged.norm, scale, observed)
        if decision.captured:  # run again, it writes to what is the state now
            self._held.append([dict(entry) for entry in state_box[0].values() if isinstance(entry, dict)])
        norm, scale_there = plan.decided()
        return Outcome(False, norm if decision.measures else None, scale_there, observed)

    def _prepared(
        self, optimizer: Optimizer, state_box: list[Any], new: list[_NewState]
    ) -> tuple[engine.Plan, list[list[Tensor]], list[Hyperparameters]]:
        """Return the plan with all rows of this step bound to it, and each group's parameters and hyperparameters."""
        groups = optimizer._checked_groups(None if self.only is None else self.only[0])
        hyperparameters = [optimizer._hyperparameters(group, reads=False) for group in groups]
        kept = [hyper.kept for hyper in hyperparameters]
        params = [group["params"] for group in groups]
        if self.only is not None:
            place = self.only[1]
            params = [params[0][place : place + 1]]
        looks = None
        if self.plan is not None and self._planned == kept:
            looks = self.plan.gather(params, state_box)
        if self.plan is None or looks is None:
            self._retire()
            checked_params(_flat(params))
            self._agreement = Agreement(_flat(params), optimizer._shard_group)
            self.plan, self._planned = engine.Plan(params), kept
            looks = self.plan.gather(params, state_box)
        if looks:
            for row in self._rows(optimizer, looks, hyperparameters, new):
                self.plan.bind(row)
            every = _flat(params)
            if not all(self._agreement.knows(row, every[row]) for row in looks):
                self._agreement = Agreement(every, optimizer._shard_group)
            self.plan.compare()
        return self.plan, params, hyperparameters

    def _decision(
        self, optimizer: Optimizer, plan: engine.Plan, hyperparameters: list[Hyperparameters], new: list[_NewState]
    ) -> engine.Decision | None:
        """What this step leaves to the device, so that nothing has to wait for it; None where the host decides."""
        device = plan.deciding if plan.on_device else None
        if device is None or self._agreement:
            if engine.cuda.is_capturing():
                raise RuntimeError(
                    "step() is being captured in a CUDA graph, which needs all parameters that have gradients to be on "
                    "one GPU, updated by the CUDA engine, and not spread over processes"
                )
            return None
        captured = engine.cuda.is_capturing()
        given: Any = vars(optimizer).get("grad_scale")
        found_inf: Any = vars(optimizer).get("found_inf")
        told = any(is_on(device, value) for value in (given, found_inf, *(hyper.lr for hyper in hyperparameters)))
        if captured:
            self._check_capture(optimizer, ready=plan.begun and not new)
        elif new or optimizer.nonfinite == "error" or not (told or _is_judging(optimizer)):
            return None
        scale = given if is_on(device, given) else scale_of(given)
        if found_inf is not None and not is_on(device, found_inf):
            if found_inf_in(found_inf):
                return None
            found_inf = None
        if not plan.guess():
            if captured:
                raise RuntimeError(
                    "step() is being captured in a CUDA graph, but the last step was of other parameters; take a step "
                    "with the same parameters before"
                )
            self.settle()
            if not plan.guess():
                return None
        return engine.Decision(scale, found_inf, optimizer.max_grad_norm, optimizer.nonfinite == "skip", captured)

    def _check_capture(self, optimizer: Optimizer, *, ready: bool) -> None:
        if not ready:
            raise RuntimeError(
                "step() is being captured in a CUDA graph without having been taken before: what it makes at first "
                "would be made anew each time the graph is run; take a step with the same parameters before"
            )
        if optimizer.nonfinite == "error":
            raise RuntimeError(
                'step() is being captured in a CUDA graph, which cannot raise: nonfinite="error" does not work there; '
                'set nonfinite="skip"'
            )

    def _keep_to_captured(self, plan: engine.Plan) -> None:
        if any(plan.left_alone(captured) for captured in (plan, *self._retired)):
            raise RuntimeError(
                "step() is of other parameters than the steps that were captured in CUDA graphs, whose counts would "
                "then be wrong; give all of these gradients, or let go of the captured steps: "
                "optimizer.load_state_dict(optimizer.state_dict()), and capture anew"
            )

    def forget_captured(self) -> None:
        """Count the steps of captured ones no longer, since the state that they work on is replaced."""
        for plan in self._plans():
            if plan.captured:
                plan.forget_captured()
                self._forgotten.append(plan)
        self._retired.clear()

    def _retire(self) -> None:
        """Let go of a plan of other parameters, but not of what a captured step needs that may be run again."""
        self.settle()
        if self.plan is not None and self.plan.captured:
            self._retired.append(self.plan)

    def settle(self) -> None:
        """Wait for the device where it decides which steps are taken, and count them."""
        for plan in self._plans():
            self.left_out += plan.settle()

    def _plans(self) -> list[engine.Plan]:
        """The plan, and those before it of which captured steps may still be run."""
        return self._retired if self.plan is None else [self.plan, *self._retired]

    @property
    def guessing(self) -> bool:
        """Whether step counts are a guess until `settle`."""
        return any(plan.guessing for plan in self._plans())

    def _members(self, groups: list[ParamGroup]) -> list[Member]:
        """The part's parameters in the order of its plan's rows."""
        if self.only is None:
            return members_of(groups)
        group, place = self.only
        number = sum(len(before["params"]) for before in groups[:group]) + place
        return [Member(number, group, place, groups[group]["params"][place])]

    def _rows(
        self, optimizer: Optimizer, looks: list[int], hyperparameters: list[Hyperparameters], new: list[_NewState]
    ) -> Iterator[engine.Row]:
        """Check the rows numbered `looks`, making state for those that have none; raise where one is not right."""
        members = self._members(optimizer.param_groups)
        for look in looks:
            number, group, index, param = members[look]
            hyper = hyperparameters[group - self._first_group]
            name = optimizer._name(group, index)
            kept = optimizer._format(param, hyper, name)
            gradient = self._looked_at[look] = engine.checked_gradient(param, name)
            entry = optimizer._entry(param, name)
            known_as = optimizer._known_as(hyper.seed, number, group, index)
            missing = kept.complete(param, entry, hyper.amsgrad, name, known_as)
            if missing:
                new.append(_NewState(param, gradient, entry, missing))
            whole: dict[str, Any] = entry | missing
            slots = {key: whole[key] for key in kept.slots_with(hyper.amsgrad)}
            numbering = engine.shards.numbering(param, name) if STREAM in slots else engine.shards.WHOLE
            row = engine.Row(
                look, group - self._first_group, name, param, gradient, entry, whole[STEP], slots, numbering
            )
            engine.check_memory(row)
            yield row

    def _judged(self, optimizer: Optimizer, plan: engine.Plan, scale: float, found_inf: bool) -> Judged:
        """Measure the gradients if anyone wants to know; decide what becomes of this step."""
        max_norm, nonfinite = optimizer.max_grad_norm, optimizer.nonfinite
        if not _is_judging(optimizer) or (max_norm is None and found_inf and not self._agreement):
            return Judged(None, 1.0 / scale, found_inf)
        plan.measure()
        square, finding = self._agreement.square_sum(plan, Finding.BAD if found_inf else Finding.NOTHING)
        _check_others(finding)
        found_inf = finding is Finding.BAD
        norm = math.sqrt(square) / scale
        factor = clip_factor(norm, max_norm) / scale
        if found_inf or nonfinite == "propagate" or square * factor * factor < 2.0**127:
            return Judged(norm, factor, found_inf)
        what = self._first_fault(optimizer, plan, factor)
        finding = self._agreement.worst(Finding.BAD if what else Finding.NOTHING)
        if finding is Finding.NOTHING and math.isfinite(norm):
            return Judged(norm, factor, False)
        if nonfinite == "skip":
            return Judged(norm, factor, True)
        if what is None and finding is Finding.NOTHING:
            what = "the norm of all gradients overflows float64"
        untouched = "nothing was updated" if self.only is None else "it was not updated"
        raise FloatingPointError(
            f"{what or 'a gradient on another process is not finite'}, so {untouched}; look for the cause "
            '(torch.autograd.detect_anomaly), or construct with nonfinite="skip" to leave such steps out'
        )

    def _first_fault(self, optimizer: Optimizer, plan: engine.Plan, factor: float) -> str | None:
        """What is wrong with the first gradient here that no step can use."""
        members = self._members(optimizer.param_groups)
        for row, square in plan.squares():
            param, name = members[row].param, optimizer._name(members[row].group, members[row].place)
            gradient = self._looked_at.get(row)
            if gradient is None:
                gradient = engine.checked_gradient(param, name)
            found = fault(gradient, square, factor, param.dtype)
            if found is not None:
                return f"the gradient of {name} has {found}"
        return None

    def _is_initialising(
        self, state: dict[Any, Any], new: list[_NewState], hyperparameters: list[Hyperparameters]
    ) -> bool:
        """Whether this is how torch's checkpoint tools make an optimizer create its state.

        They step a fresh optimizer with lr 0 and zero gradients, which must not count as a step.
        """
        if not all(hyper.lr == 0 for hyper in hyperparameters) or (not new and not self._agreement):
            return False
        counts = any(state.values()) or any(bool(item.gradient.any()) for item in new)
        if not self._agreement:
            return not counts
        finding = self._agreement.worst(Finding.BAD if counts else Finding.NOTHING)
        _check_others(finding)
        return finding is Finding.NOTHING

    def _observed(
        self,
        optimizer: Optimizer,
        params: list[list[Tensor]],
        state: dict[Any, Any],
        seen: Iterable[tuple[int, engine.Seen]] = (),
        *,
        skips: bool = False,
    ) -> dict[Tensor, engine.Seen]:
        """Return what the step was like on all processes together, each of which has to ask if it observes."""
        if not optimizer._observing:
            return {}
        every = _flat(params)
        rows = self._agreement.observed(seen, every, state, optimizer._skipped_steps + skips)
        return {every[row]: values for row, values in rows}

    def _tell_others(self, optimizer: Optimizer) -> None:
        """Let processes that wait for this one know that it cannot step."""
        with suppress(Exception):  # what made it fail is what is to be raised
            groups = [group for group in optimizer.param_groups if isinstance(group, dict)]
            params = [param for group in groups for param in group["params"]]
            agreement = Agreement(params, optimizer._shard_group)
            if _is_judging(optimizer) or all(group["lr"] == 0 for group in groups):
                agreement.worst(Finding.FAILED)
            elif optimizer._observing:  # the others have stepped
                agreement.observed([], params, {}, optimizer._skipped_steps)


def _flat(groups: list[list[Tensor]]) -> list[Tensor]:
    return [param for group in groups for param in group]


def _check_others(finding: Finding) -> None:
    if finding is Finding.FAILED:
        raise RuntimeError("another process could not step and has said why, so nothing was updated here either")


def _is_judging(optimizer: Optimizer) -> bool:
    """Whether what a step does depends on its gradients."""
    return optimizer.max_grad_norm is not None or optimizer.nonfinite != "propagate"


def _adopt(optimizer: Optimizer, state_box: list[Any], new: list[_NewState]) -> None:
    for item in new:
        item.entry.update(item.missing)
        for state in _states(optimizer, state_box):
            state[item.param] = item.entry


def _abandon(
    optimizer: Optimizer, state_box: list[Any], new: list[_NewState], had: list[tuple[bool, dict[str, Any]]]
) -> None:
    for item, (known, before) in zip(new, had, strict=True):
        item.entry.clear()
        item.entry.update(before)
        if not known:
            for state in _states(optimizer, state_box):
                state.pop(item.param, None)


def _states(optimizer: Optimizer, state_box: list[Any]) -> list[dict[Any, Any]]:
    """The part's state and, where that is only a piece of it, the optimizer's."""
    if state_box is optimizer._state_box:
        return [state_box[0]]
    return [state_box[0], optimizer._opened_state()]


def _checked_count(step: float, group: int) -> float:
    """Return a parameter's step count after this step; raise where float32 does not count so."""
    if not (1 <= step < MAX_STEP and step.is_integer()):
        raise ValueError(
            f"step count of a parameter in group {group}: expected a whole number from 1 to {MAX_STEP - 1} "
            f"(float32 counts no further than {MAX_STEP}), got {step}"
        )
    return step


def _recipe(group: int, hyper: Hyperparameters, step: float) -> engine.Recipe:
    lr, beta1, beta2, eps, weight_decay, _, maximize, *_ = hyper
    return engine.Recipe(group, lr, beta1, beta2, eps, weight_decay, maximize, step)

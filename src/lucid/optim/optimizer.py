"""The base of our optimizers: groups, the step that happens whole or not at all, state."""

from __future__ import annotations

import copy
import itertools
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from lucid import engine

from .formats import MAX_STEP, STEP, KnownAs, StateFormat, StateFormatName, decoded, format_for
from .groups import ParamGroup, check_ordered, checked_params
from .state_dict import loaded, plain

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class Hyperparameters(NamedTuple):
    """A group's hyperparameters as the step uses them, checked."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    state_format: StateFormatName
    master_weights: bool
    seed: int

    @property
    def kept(self) -> tuple[bool, StateFormatName, bool]:
        """What the slots of a parameter's state depend on."""
        return self.amsgrad, self.state_format, self.master_weights


class _NewState(NamedTuple):
    """State that a step has made and not yet shown to anyone."""

    param: Tensor
    gradient: Tensor
    entry: dict[str, Any]
    missing: dict[str, Tensor]


class Optimizer(torch.optim.Optimizer):
    """Base class of the optimizers of ``lucid.optim``.

    A subclass gives the defaults and reads a group's hyperparameters; the base gathers, checks, updates and saves.

    Parameters
    ----------
    params : iterable
        Parameters, (name, Parameter) pairs, or group dicts with ``"params"`` and any hyperparameter.
    defaults : ParamGroup
        The hyperparameters of a group that does not give its own.
    """

    param_groups: list[ParamGroup]  # type: ignore[assignment]
    defaults: ParamGroup

    def __init__(self, params: Params, defaults: ParamGroup) -> None:
        self._begin()
        check_ordered(params)
        super().__init__(params, defaults)

    def _begin(self) -> None:
        """Set what is never saved."""
        self._plan: engine.Plan | None = None
        self._planned: list[tuple[bool, StateFormatName, bool]] = []  # of each group
        self._state_box: list[Any] = [defaultdict(dict), True]
        self._unlock()

    def _unlock(self) -> None:
        self._lock = threading.RLock()
        self._stepping = False
        self._process = os.getpid()

    @property
    def state(self) -> defaultdict[Any, Any]:
        """The state of each parameter, a dict of tensors; created at its first gradient or by `init_state`."""
        state: defaultdict[Any, Any] = self._state_box[0]
        self._state_box[1] = True  # whoever has it may change it: the next step looks
        return state

    @state.setter
    def state(self, value: defaultdict[Any, Any]) -> None:
        self._state_box = [value, True]

    # Groups

    def _hyperparameters(self, group: ParamGroup) -> Hyperparameters:
        """Return the group's hyperparameters; raise where one is out of range."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, for example of a layer that is unfrozen later.

        Parameters
        ----------
        param_group : dict
            ``"params"`` (a Parameter, or a list of Parameters or (name, Parameter) pairs) and any hyperparameter;
            the rest comes from ``defaults``. The dict itself is not changed.

        Raises
        ------
        TypeError, ValueError
            Where a parameter or hyperparameter is not as it must be; the optimizer is unchanged then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group: expected a dict, got {type(param_group).__name__}")
        if "params" not in param_group:
            raise ValueError(f"param_group: expected a key 'params', got {sorted(map(str, param_group))}")
        group = ParamGroup(param_group)
        group["params"], names = checked_params(group["params"])
        if names is not None:
            group["param_names"] = names
        for name, default in self.defaults.items():
            group.setdefault(name, default)
        self._hyperparameters(group)
        super().add_param_group(group)

    def _checked_groups(self) -> list[ParamGroup]:
        """Return the groups, wrapped again where someone has put plain dicts in their place."""
        groups = self.param_groups
        for index, group in enumerate(groups):
            if type(group) is not ParamGroup:
                groups[index] = ParamGroup(group)
            if type(group["params"]) is not list:
                groups[index]["params"] = list(group["params"])
        return groups

    def _name(self, group: int, index: int) -> str:
        """How messages call parameter number `index` of a group."""
        names = self.param_groups[group].get("param_names") or ()
        return f"parameter {names[index]!r}" if index < len(names) else f"parameter {index} of group {group}"

    # The step

    @_disable_dynamo
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient, all of them or none.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients, run first with gradients enabled.

        Returns
        -------
        Tensor or None
            What the closure returned.

        Raises
        ------
        TypeError, ValueError
            Where a gradient, parameter, hyperparameter or state is not as it must be: the message names it, and
            parameters, state and step counts are bit for bit what they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._process != os.getpid():  # forked, perhaps while another thread held the lock
            self._unlock()
        with self._lock:
            if self._stepping:
                raise RuntimeError("step() was called from within itself, by an interrupt handler perhaps")
            self._stepping = True
            try:
                self._update()
            finally:
                self._stepping = False
        return loss

    def _update(self) -> None:
        groups = self._checked_groups()
        hyperparameters = [self._hyperparameters(group) for group in groups]
        kept = [hyper.kept for hyper in hyperparameters]
        params = [group["params"] for group in groups]
        looks = None
        if self._plan is not None and self._planned == kept:
            looks = self._plan.gather(params, self._state_box)
        if looks is None:
            checked_params([param for group in params for param in group])
            self._plan, self._planned = engine.Plan(params), kept
            looks = self._plan.gather(params, self._state_box)
        plan = self._plan
        assert plan is not None
        assert looks is not None
        new: list[_NewState] = []
        try:
            if looks:
                for row in self._rows(looks, hyperparameters, new):
                    plan.bind(row)
            scalars = [self._scalars(hyperparameters[group], step, group) for group, step in plan.steps()]
            if new and self._is_initialising(new, hyperparameters):
                self._adopt(new)
                return
            had = [(item.param in self._state_box[0], dict(item.entry)) for item in new]
            try:
                self._adopt(new)
                plan.run(scalars, self._state_box)
            except BaseException:
                if not plan.ran:
                    self._abandon(new, had)
                raise
        finally:
            plan.release()

    def _rows(
        self, looks: list[int], hyperparameters: list[Hyperparameters], new: list[_NewState]
    ) -> Iterator[engine.Row]:
        """Check the rows numbered `looks`, making state for those that have none; raise where one is not right."""
        numbered = [
            (group, index, param)
            for group, items in enumerate(self.param_groups)
            for index, param in enumerate(items["params"])
        ]
        for look in looks:
            group, index, param = numbered[look]
            hyper = hyperparameters[group]
            name = self._name(group, index)
            kept = self._format(param, hyper, name)
            gradient = engine.checked_gradient(param, name)
            entry = self._entry(param, name)
            known_as = self._known_as(hyper.seed, look, group, index)
            missing = kept.complete(param, entry, hyper.amsgrad, name, known_as)
            if missing:
                new.append(_NewState(param, gradient, entry, missing))
            whole: dict[str, Any] = entry | missing
            slots = {key: whole[key] for key in kept.slots_with(hyper.amsgrad)}
            row = engine.Row(look, group, name, param, gradient, entry, whole[STEP], slots)
            engine.check_memory(row)
            yield row

    def _known_as(self, seed: int, number: int, group: int, index: int) -> KnownAs:
        """What the draws of parameter number `index` of a group, `number` over all, are keyed with."""
        names = self.param_groups[group].get("param_names") or ()
        return seed, names[index] if index < len(names) else number

    def _all_known_as(self, groups: Sequence[ParamGroup]) -> Iterator[KnownAs]:
        number = itertools.count()
        for group, items in enumerate(groups):
            seed = self._hyperparameters(items).seed
            for index in range(len(items["params"])):
                yield self._known_as(seed, next(number), group, index)

    def _entry(self, param: Tensor, name: str) -> dict[str, Any]:
        """Return the parameter's state, or a dict that may become it."""
        entry = self._state_box[0].get(param, {})
        if not isinstance(entry, dict):
            raise TypeError(f"state of {name}: expected a dict, got {type(entry).__name__}")
        return entry

    def _format(self, param: Tensor, hyper: Hyperparameters, name: str) -> StateFormat:
        """Return what is kept for `param`; raise where it cannot be updated."""
        kept = format_for(param, hyper.state_format, hyper.master_weights, name)
        engine.check_param(param, name)
        return kept

    def _is_initialising(self, new: list[_NewState], hyperparameters: list[Hyperparameters]) -> bool:
        """Whether this is how torch's checkpoint tools make an optimizer create its state.

        They step a fresh optimizer with lr 0 and zero gradients, which must not count as a step.
        """
        return (
            all(hyper.lr == 0 for hyper in hyperparameters)
            and not any(self._state_box[0].values())
            and not any(bool(item.gradient.any()) for item in new)
        )

    def _adopt(self, new: list[_NewState]) -> None:
        for item in new:
            item.entry.update(item.missing)
            self._state_box[0][item.param] = item.entry

    def _abandon(self, new: list[_NewState], had: list[tuple[bool, dict[str, Any]]]) -> None:
        for item, (known, before) in zip(new, had, strict=True):
            item.entry.clear()
            item.entry.update(before)
            if not known:
                self._state_box[0].pop(item.param, None)

    def _scalars(self, hyper: Hyperparameters, step: float, group: int) -> engine.Scalars:
        if not (1 <= step < MAX_STEP and step.is_integer()):
            raise ValueError(
                f"step count of a parameter in group {group}: expected a whole number from 1 to {MAX_STEP - 1} "
                f"(float32 counts no further than {MAX_STEP}), got {step}"
            )
        return engine.Scalars.of(
            lr=hyper.lr,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            eps=hyper.eps,
            weight_decay=hyper.weight_decay,
            maximize=hyper.maximize,
            step=step,
        )

    # State

    def init_state(self) -> None:
        """Create the state of every parameter that requires a gradient and has none yet.

        Without it, state is created at a parameter's first gradient. The bits of training are the same; the
        memory is known before the first step.
        """
        new: list[_NewState] = []
        number = itertools.count()
        for position, group in enumerate(self._checked_groups()):
            hyper = self._hyperparameters(group)
            for index, param in enumerate(group["params"]):
                known_as = self._known_as(hyper.seed, next(number), position, index)
                if not param.requires_grad:
                    continue
                name = self._name(position, index)
                kept = self._format(param, hyper, name)
                entry = self._entry(param, name)
                new.append(_NewState(param, param, entry, kept.complete(param, entry, hyper.amsgrad, name, known_as)))
        self._adopt(new)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain dicts and tensors that share memory with the optimizer's.

        Returns
        -------
        dict
            ``"state"``: for each parameter's number its ``step`` and the tensors of its format (docs/formats.md), which
            under ``"fp32"`` are ``exp_avg``, ``exp_avg_sq`` and, with amsgrad, ``max_exp_avg_sq``;
            ``"param_groups"``: hyperparameters, with ``beta1``, ``beta2`` and ``betas``. ``torch.optim.AdamW`` loads an
            fp32 one, and `torch_state_dict` gives it one of any format; ``torch.load(weights_only=True)`` reads all.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        groups = self._checked_groups()
        number_of = {id(param): i for i, param in enumerate(param for group in groups for param in group["params"])}
        saved: dict[str, Any] = {
            "state": {
                number_of.get(id(key), key): entry
                for key, entry in self.state.items()
                if not isinstance(key, Tensor) or id(key) in number_of
            },
            "param_groups": [
                {key: plain(value) for key, value in group.items() if key != "params"}
                | {"betas": group["betas"], "params": [number_of[id(param)] for param in group["params"]]}
                for group in groups
            ],
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            saved = post_hook(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of ``torch.optim.AdamW`` returned.

        Parameters are matched by name where both sides have the same set of names, else by position. Values are
        copied, and converted, to the nearest, to the format that this optimizer keeps, whichever they were saved in;
        hyperparameters and the seed are those of the checkpoint, ``state_format`` and ``master_weights`` stay as they
        are, what is missing comes from ``defaults``, and keys that are not ours are kept.

        Parameters
        ----------
        state_dict : dict
            With ``"state"`` and ``"param_groups"``.

        Raises
        ------
        TypeError, ValueError
            Where anything does not fit: a count, a shape, a value out of range. Nothing is changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
        saved = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, saved)
            if result is not None:
                saved = result
        groups = self._checked_groups()
        names = [
            [self._name(number, index) for index in range(len(group["params"]))] for number, group in enumerate(groups)
        ]
        with torch.inference_mode(False):  # tensors made in that mode could not be updated outside of it
            state, new_groups = loaded(saved, groups, self.defaults, self._format_in, names, self._all_known_as)
        for group in new_groups:
            self._hyperparameters(group)
        self.state, self.param_groups = state, new_groups
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _format_in(self, param: Tensor, group: ParamGroup, name: str) -> StateFormat:
        return self._format(param, self._hyperparameters(group), name)

    def torch_state_dict(self) -> dict[str, Any]:
        """Return a copy of the state that ``torch.optim.AdamW.load_state_dict`` takes, whatever the format here.

        Returns
        -------
        dict
            As `state_dict`, with moments as float32 ``exp_avg`` and ``exp_avg_sq`` and without what torch has no
            place for: codes, and what 16-bit parameters lack of their master values.
        """
        saved = self.state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        saved["state"] = {
            number: decoded(params[number], entry, f"parameter {number}") if entry else {}
            for number, entry in saved["state"].items()
            if isinstance(number, int)
        }
        saved["param_groups"] = [
            {key: value for key, value in group.items() if key not in _NOT_TORCH} for group in saved["param_groups"]
        ]
        return saved

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_lock" not in self.__dict__:
            self._begin()
        super().__setstate__({key: value for key, value in state.items() if key != "state"})
        if "state" in state:
            self.state = state["state"]
        self.defaults.pop("differentiable", None)  # torch's base adds it
        self._checked_groups()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy, hooks included: they are called with the optimizer that steps."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with torch.inference_mode(False):
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        for hooks in _HOOKS:
            getattr(twin, hooks).update(getattr(self, hooks))
        return twin

    def engine_for(self, param: Tensor) -> str:
        """Return the name of the engine that updates `param`: ``"cpu"`` or ``"reference"``."""
        return engine.name_for(param.device)


_NOT_TORCH = ("beta1", "beta2", "state_format", "master_weights", "seed")

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

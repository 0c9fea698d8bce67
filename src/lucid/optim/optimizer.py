"""The base of our optimizers: groups, the step that happens whole or not at all, state."""

from __future__ import annotations

import copy
import itertools
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from lucid import engine

from .agreement import checked_group
from .backward import StepInBackward, no_norm_in_backward
from .formats import KnownAs, StateFormat, StateFormatName, decoded, format_for
from .gradients import NON_FINITE, NonFinite, checked_max_norm
from .groups import ParamGroup, check_ordered, checked_params
from .part import Outcome, Part
from .state_dict import as_saved, loaded, torch_group
from .statistics import summed_up
from .values import checked_flag, one_of, shown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class Hyperparameters(NamedTuple):
    """A group's hyperparameters as the step uses them, checked."""

    lr: float | Tensor  # a tensor only where it was not to be read yet
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


class Optimizer(torch.optim.Optimizer):
    """Base class of the optimizers of ``lucid.optim``.

    A subclass gives the defaults and reads a group's hyperparameters; the base checks, steps and saves.

    Parameters
    ----------
    params : iterable
        Parameters, (name, Parameter) pairs, or group dicts with ``"params"`` and any hyperparameter.
    defaults : ParamGroup
        The hyperparameters of a group that does not give its own.
    max_grad_norm : float, optional
        Bound of the norm of all gradients; this and the following as `AdamW` describes them.
    nonfinite : {"propagate", "skip", "error"}, default "propagate"
        What a step makes of gradients that are not finite.
    shard_group : ProcessGroup, optional
        With whom a step agrees on the norm, and on whether it is taken.
    state_device : "cpu" or None, default None
        Where state is kept.
    """

    _max_grad_norm: float | None = None
    _nonfinite: NonFinite = "propagate"
    _observing = False
    _skipped_steps = 0
    _amp_scaling: bool | None = None
    _shard_group: ProcessGroup | None = None
    _state_device: torch.device | None = None

    param_groups: list[ParamGroup]  # type: ignore[assignment]
    defaults: ParamGroup

    def __init__(
        self,
        params: Params,
        defaults: ParamGroup,
        *,
        max_grad_norm: float | None = None,
        nonfinite: NonFinite = "propagate",
        shard_group: ProcessGroup | None = None,
        state_device: Literal["cpu"] | None = None,
    ) -> None:
        self._begin()
        if state_device is not None:
            self._state_device = torch.device(one_of("state_device", state_device, ("cpu",)))
        self._shard_group = checked_group(shard_group)
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        check_ordered(params)
        super().__init__(params, defaults)

    def _begin(self) -> None:
        """Set what is never saved."""
        self._itself = weakref.ref(self)
        self._whole = Part()
        self._backward: StepInBackward | None = None
        self._accumulating = 0
        self._seen: dict[Tensor, engine.Seen] = {}
        self._scale = 1.0
        self._scale_there: Tensor | None = None  # where a device has decided the last step; 0 before the first it took
        self._skipped_in_backward = 0
        self._skipped_alone: dict[Tensor, int] = {}  # of these, by parameter
        self._grad_norm: float | Tensor | None = None
        self._guessing: dict[Part, None] = {}  # whose step counts a device has to confirm
        self._state_box: list[Any] = [defaultdict(dict), True]
        self._unlock()

    @property
    def _bare(self) -> Optimizer:
        """Return this optimizer; asked of a wrapper that takes our class for its own, as Lightning's, the one in it."""
        return self._itself() or self

    def _unlock(self) -> None:
        self._lock = threading.RLock()
        self._stepping = False
        self._process = os.getpid()

    @property
    def state(self) -> defaultdict[Any, Any]:
        """The state of each parameter, a dict of tensors; created at its first gradient or by `init_state`."""
        self._settle()
        return self._opened_state()

    @state.setter
    def state(self, value: defaultdict[Any, Any]) -> None:
        if not isinstance(value, dict):
            raise TypeError(f"state: expected a dict of each parameter's state, got {shown(value)}")
        self._settle()
        for part in self._guessing:
            part.forget_captured()
        self._guessing.clear()
        self._state_box = [value, True]

    def _opened_state(self) -> defaultdict[Any, Any]:
        state: defaultdict[Any, Any] = self._state_box[0]
        self._state_box[1] = True  # whoever has it may change it: the next step looks
        return state

    def _settle(self) -> None:
        """Wait for devices that decide by themselves which steps are taken, and count these."""
        bare = self._bare
        if not bare._guessing or engine.cuda.is_capturing():
            return
        with bare._lock:
            for part in list(bare._guessing):
                part.settle()
                bare._count_left_out(part)

    def _count_left_out(self, part: Part) -> None:
        """Count the steps that a device has left out; remember the part if there may be more."""
        bare = self._bare
        left_out, part.left_out = part.left_out, 0
        if part.param is None:
            bare._skipped_steps += left_out
        elif left_out:
            bare._left_out_in_backward(part.param, left_out)
        if part.guessing:
            bare._guessing[part] = None
        else:
            bare._guessing.pop(part, None)

    def _left_out_in_backward(self, param: Tensor, count: int) -> None:
        self._skipped_in_backward += count
        self._skipped_alone[param] = self._skipped_alone.get(param, 0) + count

    # Groups

    def _hyperparameters(self, group: ParamGroup, *, reads: bool = True) -> Hyperparameters:
        """Return the group's hyperparameters; raise where one is out of range.

        `reads`: also a learning rate in a tensor, which waits for the device that it is on.
        """
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, for example of a layer that is unfrozen later.

        Parameters
        ----------
        param_group : dict
            ``"params"`` (a Parameter, or a list of Parameters or (name, Parameter) pairs) and any hyperparameter;
            the rest comes from ``defaults``. The dict is copied: later changes belong into ``param_groups``.

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
        given = group.get("param_names", [])
        if not isinstance(given, list | tuple) or (given and len(given) != len(group["params"])):
            raise ValueError(
                f"param_names: expected a list of {len(group['params'])}, one for each parameter, got {shown(given)}"
            )
        for name, default in self.defaults.items():
            group.setdefault(name, default)
        self._hyperparameters(group)
        super().add_param_group(group)
        if self._backward is not None:
            self._backward.follow(self)

    def _checked_groups(self, only: int | None = None) -> list[ParamGroup]:
        """Return all groups, or one, wrapped again where someone has put plain dicts in their place."""
        groups = self.param_groups
        if not isinstance(groups, list):
            raise TypeError(f"param_groups: expected a list of dicts, got {shown(groups)}")
        for index in range(len(groups)) if only is None else (only,):
            group = groups[index]
            if type(group) is ParamGroup and type(group.get("params")) is list:
                continue
            if not isinstance(group, dict):
                raise TypeError(f"param_groups[{index}]: expected a dict, got {shown(group)}")
            wrapped = ParamGroup(group)
            wrapped["params"], _ = checked_params(group.get("params"))
            self._hyperparameters(wrapped)
            if type(group) is ParamGroup:
                group["params"] = wrapped["params"]
            else:
                groups[index] = wrapped
        return groups if only is None else [groups[only]]

    def _name(self, group: int, index: int) -> str:
        """How messages call parameter number `index` of a group."""
        name = self.param_groups[group].name_of(index)
        return f"parameter {index} of group {group}" if name is None else f"parameter {name!r}"

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
        FloatingPointError
            Where a gradient is not finite and ``nonfinite`` is ``"error"``; nothing is changed then either.
        """
        loss = None
        if closure is not None:
            if self._backward is not None:
                raise RuntimeError(
                    "step(closure) cannot be used after step_in_backward(): the closure's backward would update the "
                    "parameters that the closure is there to try; step_in_backward(False) switches back"
                )
            with torch.enable_grad():
                loss = closure()
        outcome = self._apart(self._whole, self._state_box)
        self._skipped_steps += outcome.skipped
        self._grad_norm = outcome.norm if self._backward is None else None
        if self._backward is not None:
            self._seen |= outcome.observed
            self._backward.after_step(self)
        elif outcome.observed:
            self._seen = outcome.observed
            if isinstance(outcome.scale, Tensor):
                self._scale_there = outcome.scale
            else:
                self._scale, self._scale_there = outcome.scale, None
        return loss

    def _apart(self, part: Part, state_box: list[Any]) -> Outcome:
        """Update a part while no other thread, and nothing within it, steps."""
        if self._process != os.getpid():  # forked, perhaps while another thread held the lock
            self._unlock()
        with self._lock:
            if self._stepping:
                raise RuntimeError("step() was called from within itself, by an interrupt handler perhaps")
            self._stepping = True
            try:
                for other in [other for other in self._guessing if other is not part]:
                    if other is self._whole or part is self._whole:  # they have parameters in common
                        other.settle()
                        self._count_left_out(other)
                try:
                    return part.update(self, state_box)
                finally:
                    if part.left_out or (part.plan is not None and part.plan.on_device) or part in self._guessing:
                        self._count_left_out(part)
            except BaseException:  # GradScaler removes them after a step that returns, else takes them for the user's
                vars(self).pop("grad_scale", None)
                vars(self).pop("found_inf", None)
                raise
            finally:
                self._stepping = False

    # What a step makes of its gradients

    @property
    def max_grad_norm(self) -> float | None:
        """The bound of the global gradient norm, above which steps scale the gradients down; None for no bound."""
        return self._bare._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        bound = checked_max_norm(value)
        if bound is not None and self._backward is not None:
            raise ValueError(no_norm_in_backward(bound))
        self._bare._max_grad_norm = bound

    @property
    def nonfinite(self) -> NonFinite:
        """What a step does with gradients that are not finite: ``"propagate"``, ``"skip"`` or ``"error"``."""
        return self._bare._nonfinite

    @nonfinite.setter
    def nonfinite(self, value: NonFinite) -> None:
        self._bare._nonfinite = one_of("nonfinite", value, NON_FINITE)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients of the last step, unscaled and before it was clipped: a 0-dim float64 tensor.

        It is on the GPU where that has used it by itself, so that nothing waits for it, and on the CPU otherwise.
        None where the last step did not measure it: it does under ``max_grad_norm``, of which infinity never clips, and
        under ``nonfinite="skip"`` and ``"error"``.
        """
        norm = self._grad_norm
        if isinstance(norm, Tensor):
            return norm.clone()
        return None if norm is None else torch.tensor(norm, dtype=torch.float64, device="cpu")

    @property
    def skipped_steps(self) -> int:
        """How many steps were not taken since gradients were not finite; in backward each parameter's counts."""
        self._settle()
        return self._bare._skipped_steps + self._skipped_in_backward

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves it to the step to unscale the gradients; to be set, None for the default.

        By default so only where every parameter is on an accelerator. Lightning refuses to clip where it is true, and
        Accelerate then counts a step that was skipped as taken.
        """
        if self._backward is not None:  # which has used the gradients before GradScaler could look: it says so then
            return False
        if self._bare._amp_scaling is not None:
            return self._bare._amp_scaling
        params = [param for group in self.param_groups for param in group["params"]]
        return bool(params) and all(param.device.type not in ("cpu", "meta") for param in params)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool | None) -> None:
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"_step_supports_amp_scaling: expected True, False or None, got {shown(value)}")
        self._bare._amp_scaling = value

    # Step in backward

    def step_in_backward(self, on: bool = True) -> None:
        """Update each parameter as soon as its gradient is complete, and let the gradient go; or no longer.

        The bits are those of ordinary steps, and the memory of all gradients but the largest few is saved. Everything
        else in a training loop may stay as it is: `step` updates what still has a gradient, which usually is nothing.
        Put micro-batches but the last into `accumulate`. While a ``torch.distributed`` process group is initialised
        gradients may have to be averaged first, so that everything is left to `step`, with a warning.

        Parameters
        ----------
        on : bool, default True
            False removes the hooks: all is as before.

        Raises
        ------
        ValueError
            Where ``max_grad_norm`` is set: the norm of all gradients is known only after the last of them.

        Notes
        -----
        Each parameter's update is all or nothing, and so is what ``nonfinite`` makes of it: ``"skip"`` leaves single
        parameters out, ``"error"`` leaves those updated that came before. ``docs/step_in_backward.md`` has the rest.

        Examples
        --------
        >>> import torch
        >>> import lucid.optim as optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = optim.AdamW(model.parameters())
        >>> optimizer.step_in_backward()
        >>> model(torch.ones(3, 2)).sum().backward()
        >>> model.weight.grad is None, int(optimizer.state[model.weight]["step"])
        (True, 1)
        """
        checked_flag("on", on)
        bare = self._bare
        if on and bare._max_grad_norm is not None:
            raise ValueError(no_norm_in_backward(bare._max_grad_norm))
        if on and bare._backward is None:
            bare._backward = StepInBackward(bare)
            bare._seen, bare._scale = {}, 1.0
        elif on and bare._backward is not None:
            bare._backward.follow(bare)
        elif bare._backward is not None:
            bare._backward.remove()
            bare._backward = None

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within it, backward only adds to the gradients: for all micro-batches of a step but the last.

        Without `step_in_backward` that is what backward does anyway, and this does nothing.
        """
        bare = self._bare
        bare._accumulating += 1
        try:
            yield
        finally:
            bare._accumulating -= 1

    # Statistics

    def observe(self, on: bool = True) -> None:
        """Let steps measure what `statistics` tells, in the same pass over the parameters; or no longer.

        Where parameters are sharded (DTensors), on all processes: they exchange what they have measured.
        """
        bare = self._bare
        bare._observing = checked_flag("on", on)
        if not on:
            bare._seen = {}

    def statistics(self) -> dict[str, float]:
        """Return what the last step was like, as plain numbers by name, ready for a logger.

        Returns
        -------
        dict of str to float
            For each group, as ``"group0/..."``, and each named parameter: ``grad_norm`` (unscaled, before clipping),
            ``update_rms`` and ``param_rms`` after it (both before they are rounded to 16 bits), ``update_ratio`` of the
            two, ``max_m_over_sqrt_v``, the largest of an element, ``step`` (of a group: the largest) and
            ``skipped_steps``. For the whole: ``grad_norm`` and ``skipped_steps``.

        Raises
        ------
        RuntimeError
            Where no step has been observed yet.
        """
        if not self._seen:
            raise RuntimeError("statistics: no step has been observed; call observe() before step()")
        self._settle()
        there = 0.0 if self._scale_there is None else float(self._scale_there)
        return summed_up(self._bare, self._seen, there or self._scale)

    def _known_as(self, seed: int, number: int, group: int, index: int) -> KnownAs:
        """What the draws of parameter number `index` of a group, `number` over all, are keyed with."""
        name = self.param_groups[group].name_of(index)
        return seed, number if name is None else name

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
        kept = format_for(param, hyper.state_format, hyper.master_weights, name, self._bare._state_device)
        engine.check_param(param, name)
        return kept

    # State

    def init_state(self) -> None:
        """Create the state of every parameter that requires a gradient and has none yet.

        Without it, state is created at a parameter's first gradient. The bits of training are the same; the
        memory is known before the first step.
        """
        new: list[tuple[Tensor, dict[str, Any], dict[str, Tensor]]] = []
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
                new.append((param, entry, kept.complete(param, entry, hyper.amsgrad, name, known_as)))
        for param, entry, missing in new:
            entry.update(missing)
            self.state[param] = entry

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain dicts and tensors that share memory with the optimizer's.

        Returns
        -------
        dict
            ``"state"``: for each parameter's number its ``step`` and the tensors of its format (docs/formats.md), which
            under ``"fp32"`` are ``exp_avg``, ``exp_avg_sq`` and, with amsgrad, ``max_exp_avg_sq``;
            ``"param_groups"``: hyperparameters, with ``beta1``, ``beta2`` and ``betas``, and the ``state_version`` of
            all that (docs/formats.md). ``torch.optim.AdamW`` loads an
            fp32 one, and `torch_state_dict` gives it one of any format. Numpy's numbers are saved as Python's and its
            arrays as lists, so that ``torch.load(weights_only=True)`` reads all. ``param_names`` are saved where there
            is one for each parameter.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        saved = as_saved(self._checked_groups(), self.state)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            saved = post_hook(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of ``torch.optim.AdamW`` returned.

        Parameters are matched by name where both sides have the same set of names, whatever their groups, else by
        position, where groups need the same sizes. State is copied, and converted, to the nearest, to the format that
        this optimizer keeps. Hyperparameters and the seed follow the parameters: each group takes those that its
        parameters were saved with. ``weight_decay`` alone stays as it is where parameters of one saved group are in
        groups that differ in it here, as those of `decay_groups`. ``state_format`` and ``master_weights`` always stay,
        what is missing comes from ``defaults``, and keys that are not ours are kept.

        Parameters
        ----------
        state_dict : dict
            With ``"state"`` and ``"param_groups"``.

        Raises
        ------
        TypeError, ValueError
            Where anything does not fit: a count, a shape, a value out of range, parameters of one group that were saved
            with different hyperparameters, state of no parameter. Nothing is changed then.

        Warns
        -----
        UserWarning
            Where names differ and position decides; where a step count was saved in 16 bits and is above 256; where
            groups here differ in more than ``weight_decay`` and were saved as one.
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
            if isinstance(number, int) and 0 <= number < len(params)  # tools may keep more there
        }
        saved["param_groups"] = [torch_group(group) for group in saved["param_groups"]]
        return saved

    def __getstate__(self) -> dict[str, Any]:
        saved = {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}
        options = {key: value for key, value in vars(self).items() if key in _OPTIONS}
        return saved | options | {"_skipped_steps": self.skipped_steps}

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
        twin._shard_group = self._shard_group
        for hooks in _HOOKS:
            getattr(twin, hooks).update(getattr(self, hooks))
        return twin

    def engine_for(self, param: Tensor) -> str:
        """Return the name of the engine that updates `param`: ``"cpu"``, ``"cuda"`` or ``"reference"``."""
        device = self._bare._state_device
        return engine.name_for(param.device if device is None or param.device.type == "meta" else device)


# What a copy and a pickle keep besides.
_OPTIONS = ("_max_grad_norm", "_nonfinite", "_observing", "_amp_scaling", "_state_device")

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

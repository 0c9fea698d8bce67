"""The groups and the state of an optimizer: how they are created, saved, loaded and copied."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from lucid.engine.conversion import decoded
from lucid.engine.values import checked_lr, shown

from .groups import OF_OPTIMIZER, ParamGroup, check_ordered, checked_params, tell_misplaced
from .hyperparameters import Hyperparameters, checked_groups, schedule_of
from .matching import alike
from .members import members, params_of
from .settings import Settings
from .spike_memory import shared_memory
from .state_box import State, StateBox
from .state_dict import as_saved, loaded, torch_group
from .stepper import Stepper

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class StatefulOptimizer(torch.optim.Optimizer):
    """The groups and the state of an optimizer. `Optimizer` adds the step and describes the constructor's arguments."""

    param_groups: list[ParamGroup]  # type: ignore[assignment]
    defaults: ParamGroup

    def __init__(self, params: Params, defaults: ParamGroup, settings: Settings) -> None:
        self._begin(settings)
        check_ordered(params)
        super().__init__(params, defaults)

    def _begin(self, settings: Settings) -> None:
        """Create the attributes that torch's base does not have.

        They are objects, so a wrapper that copies an optimizer's attributes shares them.
        """
        self._settings = settings
        self._box = StateBox()
        self._stepper = Stepper()

    @property
    def state(self) -> State:
        """The state of each parameter, a dict of tensors.

        It is created in the first step in which the parameter has a gradient, or by `init_state`. To read this property
        waits for a GPU that decides steps or updates state on the host. Within `averaged` it raises RuntimeError.
        """
        self._stepper.check_trains()
        self._stepper.settle()
        return self._box.open()

    @state.setter
    def state(self, value: State) -> None:
        if not isinstance(value, dict):
            raise TypeError(f"state: expected a dict of each parameter's state, got {shown(value)}")
        self._stepper.check_trains()
        self._stepper.stop_counting_captured()
        self._box.replace(value)

    # Groups

    def _hyperparameters(self, group: ParamGroup, *, reads: bool = True) -> Hyperparameters:
        """Return the group's hyperparameters; raise if one is out of range.

        `reads`: whether to read the value of a learning rate tensor, which waits for the tensor's device.
        """
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, for example of a layer that is unfrozen later.

        Parameters
        ----------
        param_group : dict
            ``"params"`` (a Parameter, or a list of Parameters or (name, Parameter) pairs) and any hyperparameter;
            the other hyperparameters come from ``defaults``. The dict is copied: to change the group later, change
            ``param_groups``.

        Raises
        ------
        TypeError, ValueError
            If a parameter or hyperparameter is invalid. The optimizer is unchanged.
        """
        self._stepper.check_trains()
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
        if schedule_of(group) == "independent" and group.get("reference_lr") is None:
            group["reference_lr"] = checked_lr(group["lr"]) or None
        self._hyperparameters(group)
        for key in OF_OPTIMIZER:
            if key in group and not alike(group[key], getattr(self._settings, key)):
                tell_misplaced(key)
        if self._settings.spike_threshold is not None:
            shared_memory([*self.param_groups, group])
        super().add_param_group(group)
        self._follow_hooks()

    def _follow_hooks(self) -> None:
        """If steps happen in backward, add hooks to new and unfrozen parameters, and remove those of removed ones."""
        if self._stepper.backward is None:
            return
        gone = self._stepper.backward.follow(self.param_groups)
        if gone:
            self._stepper.confirm()
        for param in gone:
            self._stepper.forget(param)

    # State

    def init_state(self) -> None:
        """Create the state of every parameter that requires a gradient and has none yet.

        Otherwise, state is created in the first step in which the parameter has a gradient. Training gives the same
        bits either way. With this method you see the memory use before the first step. An average of the weights starts
        from the weights as they are now, so load a model before you call it.
        """
        self._stepper.check_trains()
        new: list[tuple[Tensor, dict[str, Any], dict[str, Tensor]]] = []
        groups = checked_groups(self.param_groups, self._hyperparameters)
        hyperparameters = [self._hyperparameters(group) for group in groups]
        for member in members(groups):
            param, name = member.param, member.name
            if not param.requires_grad:
                continue
            hyper = hyperparameters[member.group]
            kept = hyper.format_of(param, name, self._settings.state_device)
            entry = self._box.entry(param, name)
            new.append(
                (param, entry, kept.complete(param, entry, hyper.amsgrad, name, member.rounding_key(hyper.seed)))
            )
        for param, entry, missing in new:
            entry.update(missing)
            self.state[param] = entry

    def state_dict(self) -> dict[str, Any]:
        """Return groups and state as plain dicts, with tensors that share memory with the optimizer's.

        Returns
        -------
        dict
            ``"state"``: for each parameter's number, its ``step`` and the tensors of its format (docs/formats.md).
            Under ``"fp32"`` these are ``exp_avg``, ``exp_avg_sq`` and, with amsgrad, ``max_exp_avg_sq``.
            ``"param_groups"``: the hyperparameters, with ``beta1``, ``beta2`` and ``betas``, and ``state_version``, the
            version of this layout (docs/formats.md). ``param_names`` are saved if every parameter has one.

        Notes
        -----
        ``torch.optim.AdamW`` loads an ``"fp32"`` state dict; for other formats give it `torch_state_dict`. Numbers of
        numpy are saved as Python's numbers and its arrays as lists, so ``torch.load(weights_only=True)`` reads
        everything.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        saved = as_saved(checked_groups(self.param_groups, self._hyperparameters), self.state)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            saved = post_hook(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state dict of an optimizer of this class or of ``torch.optim.AdamW``.

        If both sides have the same set of names, parameters are matched by name, whatever their groups. Otherwise they
        are matched by position, and the groups must have the same sizes. State is copied, and converted to the formats
        of this optimizer with rounding to nearest. Hyperparameters and the seed follow the parameters: each group takes
        the values with which its parameters were saved. There is one exception: if the parameters of one saved group
        are now in groups that differ in ``weight_decay``, as those of `decay_groups`, each group keeps its own
        ``weight_decay``. ``state_format`` and ``master_weights`` are always kept. Missing hyperparameters come from
        ``defaults``. Unknown keys are kept.

        Parameters
        ----------
        state_dict : dict
            With the keys ``"state"`` and ``"param_groups"``.

        Raises
        ------
        TypeError, ValueError
            If anything does not fit: a count, a shape, a value out of range, parameters of one group that were saved
            with different hyperparameters, state that belongs to no parameter. Nothing is changed.

        Warns
        -----
        UserWarning
            If names differ and parameters are matched by position; if a step count above 256 was saved in 16 bits; if
            parameters of one saved group are now in groups that differ in more than ``weight_decay``.
        """
        self._stepper.check_trains()
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
        saved = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, saved)
            if result is not None:
                saved = result
        groups = checked_groups(self.param_groups, self._hyperparameters)
        self._stepper.settle()  # what is loaded may be this optimizer's own state
        with torch.inference_mode(False):  # tensors made in that mode cannot be updated outside of it
            state, new_groups = loaded(saved, groups, self.defaults, self._hyperparameters, self._settings.state_device)
            if self._settings.spike_threshold is not None:
                shared_memory(new_groups)
        self.state, self.param_groups = state, new_groups
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def torch_state_dict(self) -> dict[str, Any]:
        """Return a copy of the state that ``torch.optim.AdamW.load_state_dict`` loads, from any format.

        Returns
        -------
        dict
            Like `state_dict`, but with float32 moments ``exp_avg`` and ``exp_avg_sq``, and without the tensors and keys
            that torch does not have: codes and scales, residuals and masters, and our own hyperparameters. If moments
            are on the host, so is the copy.
        """
        saved = self.state_dict()
        params = params_of(self.param_groups)
        saved["state"] = {
            number: decoded(params[number], entry, f"parameter {number}") if entry else {}
            for number, entry in saved["state"].items()
            if isinstance(number, int) and 0 <= number < len(params)  # other tools may store other keys there
        }
        saved["param_groups"] = [torch_group(group) for group in saved["param_groups"]]
        return saved

    def __getstate__(self) -> dict[str, Any]:
        saved = {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}
        skipped = self._stepper.skipped
        counts = {"_skipped_steps": skipped.total, "_skipped_spikes": skipped.spikes}
        return saved | self._settings.saved() | counts

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_stepper" not in vars(self):
            self._begin(Settings())
        own = ("state", "_skipped_steps", "_skipped_spikes")  # what else there is a subclass has saved
        super().__setstate__(
            {key: value for key, value in state.items() if key not in own and not Settings.has_saved(key)}
        )
        self._settings.restore(state)
        skipped = self._stepper.skipped
        skipped.whole = state.get("_skipped_steps", skipped.whole)
        skipped.spikes = state.get("_skipped_spikes", skipped.spikes)
        if "state" in state:
            self.state = state["state"]
        self.defaults.pop("differentiable", None)  # torch's base adds it
        checked_groups(self.param_groups, self._hyperparameters)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the optimizer with its hooks, which receive the optimizer that they are called on."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with torch.inference_mode(False):
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._settings.shard_group = self._settings.shard_group
        for hooks in _HOOKS:
            getattr(twin, hooks).update(getattr(self, hooks))
        return twin


_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

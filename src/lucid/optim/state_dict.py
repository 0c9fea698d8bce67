"""Loading: saved groups and state into a new state, or an exception."""

from __future__ import annotations

import numbers
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .formats import KnownAs, StateFormat, copied
from .groups import ParamGroup
from .values import shown

# Of what `state_dict` returns; one that a later release cannot read as this does gets another.
STATE_VERSION = 1
VERSION = "state_version"

OWN_OPTIONS = ("state_format", "master_weights")  # of how state is kept here, whatever was saved

State = defaultdict[Any, Any]


def loaded(
    saved: Mapping[str, Any],
    groups: Sequence[ParamGroup],
    defaults: ParamGroup,
    state_format: Callable[[Tensor, ParamGroup, str], StateFormat],
    names: Sequence[Sequence[str]],
    known_as: Callable[[Sequence[ParamGroup]], Iterator[KnownAs]],
) -> tuple[State, list[ParamGroup]]:
    """Return the state and groups that `saved` makes of an optimizer with `groups`; nothing given is changed.

    ``names`` is how messages call the parameters of each group; ``known_as`` gives what the draws of each parameter
    are keyed with where that was not saved.
    """
    saved_groups = _checked_groups(saved, groups)
    new_groups = [_group(old, own, defaults) for old, own in zip(saved_groups, groups, strict=True)]
    order = _matched(saved_groups, groups)
    state: State = defaultdict(dict)
    entries = dict(saved["state"])
    position = 0
    all_known_as = known_as(new_groups)
    for number, group in enumerate(new_groups):
        for index, param in enumerate(group["params"]):
            name = names[number][index]
            entry = entries.pop(order[position], {})
            own_known_as = next(all_known_as)
            position += 1
            if not isinstance(entry, Mapping):
                raise ValueError(f"state of {name}: expected a dict, got {type(entry).__name__}")
            if entry:
                own = state_format(param, group, name).converted(param, entry, name, own_known_as)
                state[param] = own
    for key, value in entries.items():  # of no parameter: torch keeps it too
        state[key] = copied(value)
    return state, new_groups


def _checked_groups(saved: Mapping[str, Any], groups: Sequence[ParamGroup]) -> list[Mapping[str, Any]]:
    if not isinstance(saved, Mapping) or "state" not in saved or "param_groups" not in saved:
        raise ValueError("state_dict: expected a dict with the keys 'state' and 'param_groups'")
    if not isinstance(saved["state"], Mapping):
        raise ValueError(f"state_dict['state']: expected a dict, got {type(saved['state']).__name__}")
    saved_groups = saved["param_groups"]
    if not isinstance(saved_groups, list | tuple) or not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in saved_groups
    ):
        raise ValueError("state_dict['param_groups']: expected a list of dicts, each with a list 'params'")
    keys = [key for group in saved_groups for key in group["params"]]
    if not all(isinstance(key, int | str) for key in keys) or len(set(keys)) != len(keys):
        raise ValueError("state_dict['param_groups']: expected each parameter's number or name once in 'params'")
    for group in saved_groups:
        check_version(group.get(VERSION, STATE_VERSION))
        names = group.get("param_names")
        if names is not None and (not isinstance(names, list | tuple) or len(names) != len(group["params"])):
            raise ValueError(
                f"state_dict['param_groups']: expected a list of {len(group['params'])} 'param_names', "
                f"got {shown(names)}"
            )
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict: expected groups of {sizes} parameters like the optimizer's, got {saved_sizes}; "
            "build the optimizer with the groups that it was saved with"
        )
    return list(saved_groups)


def check_version(version: Any) -> None:
    """Raise unless `version` is one of those that this release reads."""
    if type(version) is not int or version < 1:
        raise ValueError(f"state_dict: expected a whole number from 1 on as {VERSION}, got {shown(version)}")
    if version > STATE_VERSION:
        raise ValueError(
            f"state_dict: its state is of version {version}, and this lucid-optim knows those up to {STATE_VERSION}; "
            "load it with the release that saved it, or a later one"
        )


def _group(saved: Mapping[str, Any], own: ParamGroup, defaults: ParamGroup) -> ParamGroup:
    """The group's hyperparameters as saved, its parameters as they are."""
    group = ParamGroup({key: copied(value) for key, value in saved.items() if key not in ("params", VERSION)})
    group["params"] = own["params"]
    if "param_names" in own:
        group["param_names"] = own["param_names"]
    for key in OWN_OPTIONS:
        if key in own:
            group[key] = own[key]
    for key, value in defaults.items():
        group.setdefault(key, value)
    return group


def _matched(saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[ParamGroup]) -> list[Any]:
    """The saved key of each parameter's state, in the order of `groups`."""
    keys = [key for group in saved_groups for key in group["params"]]
    saved_names = [name for group in saved_groups for name in group.get("param_names") or ()]
    names = [name for group in groups for name in group.get("param_names") or ()]
    if len(names) != len(keys) or len(saved_names) != len(keys):
        return keys
    key_of = dict(zip(saved_names, keys, strict=True))
    if len(key_of) < len(keys) or len(set(names)) < len(names):  # names that do not tell parameters apart
        return keys
    if key_of.keys() == set(names):
        return [key_of[name] for name in names]
    warnings.warn(
        "load_state_dict: the saved parameters have other names than the optimizer's, so they are matched by position",
        UserWarning,
        stacklevel=4,
    )
    return keys


def plain(value: Any) -> Any:
    """Return a hyperparameter as ``torch.load(weights_only=True)`` reads it: numpy's numbers as floats."""
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return float(value)


# Of a group's keys, those that torch has no place for.
_NOT_TORCH = ("beta1", "beta2", "state_format", "master_weights", "seed", VERSION)


def torch_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved group as ``torch.optim.AdamW`` keeps it."""
    return {key: value for key, value in group.items() if key not in _NOT_TORCH}

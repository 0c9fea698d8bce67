"""Saving and loading: the optimizer's groups and state as plain values, and plain values as groups and state."""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .formats import STEP, KnownAs, StateFormat, copied, is_entry, step_is_uncertain
from .groups import ParamGroup
from .matching import OWN_OPTIONS, is_name, matched
from .matching import VERSION as VERSION
from .values import plain, shown

# Of what `state_dict` returns; one that a later release cannot read as this does gets another.
STATE_VERSION = 1

State = defaultdict[Any, Any]


def as_saved(groups: Sequence[ParamGroup], state: Mapping[Any, Any]) -> dict[str, Any]:
    """Return groups and state as `state_dict` gives them: plain values, and tensors that are those of the state.

    A parameter in several groups has the number of its first place, as with torch.
    """
    number_of: dict[int, int] = {}
    for number, param in enumerate(itertools.chain.from_iterable(group["params"] for group in groups)):
        number_of.setdefault(id(param), number)
    return {
        "state": {
            number_of.get(id(key), key): plain(entry)
            for key, entry in state.items()
            if not isinstance(key, Tensor) or id(key) in number_of
        },
        "param_groups": [
            plain({key: value for key, value in group.items() if _is_saved(key, group)})
            | {"betas": plain(group["betas"]), VERSION: STATE_VERSION}
            | {"params": [number_of[id(param)] for param in group["params"]]}
            for group in groups
        ],
    }


def _is_saved(key: str, group: ParamGroup) -> bool:
    """Whether `key` is saved as it is: names are not where someone has changed the list of parameters, and theirs may
    be others'.
    """
    if key != "param_names":
        return key != "params"
    names = group[key]
    return isinstance(names, list | tuple) and len(names) == len(group["params"])


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
    keys, taken = matched(_checked_groups(saved), groups, names)
    new_groups = [_group(old, own, defaults) for old, own in zip(taken, groups, strict=True)]
    state: State = defaultdict(dict)
    entries = _entries(saved["state"], [key for own in keys for key in own])
    all_known_as = known_as(new_groups)
    uncertain: list[tuple[str, Any]] = []
    for number, group in enumerate(new_groups):
        for param, key, name in zip(group["params"], keys[number], names[number], strict=True):
            own_known_as = next(all_known_as)
            if param in state:  # in several groups
                continue
            entry = entries.pop(key, {})
            if not isinstance(entry, Mapping):
                raise ValueError(f"state of {name}: expected a dict, got {type(entry).__name__}")
            if entry:
                own = state_format(param, group, name).converted(param, entry, name, own_known_as)
                state[param] = own
                if step_is_uncertain(entry[STEP]):
                    uncertain.append((name, entry[STEP]))
    _check_strays(entries, keys)
    for key, value in entries.items():  # of no parameter: torch keeps it too
        state[key] = copied(value)
    if uncertain:
        name, step = uncertain[0]
        more = f" and of {len(uncertain) - 1} more" if len(uncertain) > 1 else ""
        warnings.warn(
            f"load_state_dict: the step count {float(step):g} of {name}{more} was saved as {step.dtype}, which may "
            "have rounded it; save step counts as float32, and set the right one in optimizer.state if you know it",
            UserWarning,
            stacklevel=3,
        )
    return state, new_groups


def _checked_groups(saved: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if not isinstance(saved, Mapping) or "state" not in saved or "param_groups" not in saved:
        raise ValueError("state_dict: expected a dict with the keys 'state' and 'param_groups'")
    if not isinstance(saved["state"], Mapping):
        raise ValueError(f"state_dict['state']: expected a dict, got {type(saved['state']).__name__}")
    saved_groups = saved["param_groups"]
    if not isinstance(saved_groups, list | tuple) or not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in saved_groups
    ):
        raise ValueError("state_dict['param_groups']: expected a list of dicts, each with a list 'params'")
    if not all(isinstance(key, int | str) for group in saved_groups for key in group["params"]):
        raise ValueError("state_dict['param_groups']: expected each parameter's number or name once in 'params'")
    bare = [group.keys() <= {"params", VERSION} for group in saved_groups]
    for index, group in enumerate(saved_groups):
        check_version(group.get(VERSION, STATE_VERSION))
        keys, names = group["params"], group.get("param_names")
        if names is not None and not isinstance(names, list | tuple):
            raise ValueError(
                f"state_dict['param_groups']: expected a list of {len(keys)} 'param_names', got {shown(names)}"
            )
        unlike = names is not None and len(names) != len(keys)
        if any(map(is_name, keys)) and (unlike or (bare[index] and not all(bare))):
            raise ValueError(
                f"state_dict['param_groups'][{index}]: expected hyperparameters and names of its own, got those of "
                "other groups or none, as torch's set_optimizer_state_dict leaves it where parameters were saved in "
                "other groups; use lucid.optim.checkpoint.load_optimizer, or build the groups as they were saved"
            )
    return list(saved_groups)


def _entries(state: Mapping[Any, Any], keys: Sequence[int | str]) -> dict[Any, Any]:
    """The saved state by the keys that groups have: numbers may have become strings in a file, or the other way."""
    entries, known = dict(state), set(keys)
    for key in known:
        other: int | str = str(key)
        if isinstance(key, str):
            other = int(key) if key.isdecimal() and len(key) < 20 else key
        if other in known or other not in entries or str(other) != str(key):
            continue
        if key in entries:
            raise ValueError(
                f"state_dict['state']: expected state of parameter {key} once, got it as {key!r} and {other!r}"
            )
        entries[key] = entries.pop(other)
    return entries


def _check_strays(entries: Mapping[Any, Any], keys: Sequence[Sequence[int | str]]) -> None:
    """Raise where state is left that is a parameter's: it would be lost."""
    strays = [key for key, entry in entries.items() if not isinstance(key, Tensor) and is_entry(entry)]
    if strays:
        known = [key for own in keys for key in own]
        raise ValueError(
            f"state_dict['state']: expected the keys that groups have in 'params' ({shown(known)}), got state of "
            f"{shown(strays[0])}{f' and {len(strays) - 1} more' if len(strays) > 1 else ''}; give state and 'params' "
            "the same keys"
        )


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
    """The hyperparameters of the saved group that `own` takes over, its parameters and names as they are."""
    without = {"params", "param_names", VERSION}
    group = ParamGroup({key: copied(value) for key, value in saved.items() if key not in without})
    group["params"] = own["params"]
    if "param_names" in own:
        group["param_names"] = own["param_names"]
    elif len(names := saved.get("param_names") or ()) == len(own["params"]) and names:
        keys = saved["params"]
        group["param_names"] = list(keys) if set(keys) == set(map(str, names)) else copied(names)
    for key in OWN_OPTIONS:
        if key in own:
            group[key] = own[key]
    for key, value in defaults.items():
        group.setdefault(key, value)
    return group


# Of a group's keys, those that torch has no place for.
_NOT_TORCH = ("beta1", "beta2", "state_format", "master_weights", "seed", VERSION)


def torch_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved group as ``torch.optim.AdamW`` keeps it."""
    return {key: value for key, value in group.items() if key not in _NOT_TORCH}

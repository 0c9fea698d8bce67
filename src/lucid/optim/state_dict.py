"""Converts groups and state to the plain values of a state dict, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lucid.engine.conversion import converted_entry, copied
from lucid.engine.formats import EMA, STEP, StateDevice, is_entry, step_is_uncertain
from lucid.engine.told import warn
from lucid.engine.values import plain, shown

from .groups import ParamGroup
from .hyperparameters import Reading
from .matching import ADDED, OWN_OPTIONS, SPIKES, VERSION, is_name, matched, own_that_count
from .members import members, params_of
from .state_box import State

# The version of what `state_dict` returns. If the layout changes so that older releases cannot read it, increment this.
STATE_VERSION = 1


def as_saved(groups: Sequence[ParamGroup], state: Mapping[Any, Any]) -> dict[str, Any]:
    """Return groups and state as `Optimizer.state_dict` does: plain values, and the tensors of the state themselves.

    A parameter in several groups has the number of its first place, as in torch.
    """
    number_of: dict[int, int] = {}
    for number, param in enumerate(params_of(groups)):
        number_of.setdefault(id(param), number)
    return {
        "state": {
            number_of.get(id(key), plain(key)): plain(entry)
            for key, entry in state.items()
            if not isinstance(key, Tensor) or id(key) in number_of
        },
        "param_groups": [
            plain({key: value for key, value in group.items() if _is_saved(key, group)})
            | ({SPIKES: copied(group[SPIKES])} if SPIKES in group else {})  # steps change it in place
            | {"betas": plain(group["betas"]), VERSION: STATE_VERSION}
            | {"params": [number_of[id(param)] for param in group["params"]]}
            for group in groups
        ],
    }


def _is_saved(key: str, group: ParamGroup) -> bool:
    """Whether `key` is saved unchanged. Names are not saved if there are not as many as parameters: somebody has
    changed the list of parameters, and a name may belong to another one.
    """
    if key != "param_names":
        return key != "params"
    names = group[key]
    return isinstance(names, list | tuple) and len(names) == len(group["params"])


def loaded(
    saved: Mapping[str, Any],
    groups: Sequence[ParamGroup],
    defaults: ParamGroup,
    read: Reading,
    state_device: StateDevice | None,
) -> tuple[State, list[ParamGroup]]:
    """Return the new state and groups of an optimizer with `groups` that loads `saved`; no argument is changed.

    ``read``: reads a group.
    """
    own = list(members(groups))
    names = [[member.name for member in own if member.group == number] for number in range(len(groups))]
    keys, taken = matched(_checked_groups(saved), groups, names)
    new_groups = [_group(old, group, defaults) for old, group in zip(taken, groups, strict=True)]
    hyperparameters = [read(group) for group in new_groups]
    state: State = defaultdict(dict)
    entries = _entries(saved["state"], [key for group in keys for key in group])
    uncertain: list[tuple[str, Any]] = []
    for member in own:
        param, name = member.param, member.name
        if param in state:  # in several groups
            continue
        entry = entries.pop(keys[member.group][member.place], {})
        if not isinstance(entry, Mapping):
            raise ValueError(f"state of {name}: expected a dict, got {type(entry).__name__}")
        if entry:
            hyper = hyperparameters[member.group]
            kept = hyper.format_of(param, name, state_device, has_ema=entry.get(EMA) is not None)
            state[param] = converted_entry(kept, param, entry, name, member.rounding_key(hyper.seed))
            if step_is_uncertain(entry[STEP]):
                uncertain.append((name, entry[STEP]))
    _check_strays(entries, keys)
    for key, value in entries.items():  # values that belong to no parameter; torch keeps them too
        state[key] = copied(value)
    if uncertain:
        name, step = uncertain[0]
        more = f" and of {len(uncertain) - 1} more" if len(uncertain) > 1 else ""
        warn(
            f"load_state_dict: the step count {float(step):g} of {name}{more} was saved as {step.dtype}, which may "
            "have rounded it; save step counts as float32, and set the right count in optimizer.state if you know it",
            UserWarning,
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
        raise ValueError("state_dict['param_groups']: expected numbers or names of parameters in 'params'")
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
                f"state_dict['param_groups'][{index}]: expected the group's own hyperparameters and names, got those "
                "of other groups or none; torch's set_optimizer_state_dict does this if parameters were saved in other "
                "groups; use lucid.optim.checkpoint.load_optimizer, or build the groups as they were saved"
            )
    return list(saved_groups)


def _entries(state: Mapping[Any, Any], keys: Sequence[int | str]) -> dict[Any, Any]:
    """Return the saved state by the keys of the groups. A file may have turned numbers into strings, or strings into
    numbers.
    """
    entries, known = dict(state), set(keys)
    for key in known:
        other: int | str = str(key)
        if isinstance(key, str):
            other = int(key) if key.isdecimal() and len(key) < 20 else key
        if other in known or other not in entries or str(other) != str(key):
            continue
        if key in entries:
            raise ValueError(
                f"state_dict['state']: expected the state of parameter {key} once, got it as {key!r} and {other!r}"
            )
        entries[key] = entries.pop(other)
    return entries


def _check_strays(entries: Mapping[Any, Any], keys: Sequence[Sequence[int | str]]) -> None:
    """Raise if a parameter's state is left over, because it would be lost."""
    strays = [key for key, entry in entries.items() if not isinstance(key, Tensor) and is_entry(entry)]
    if strays:
        known = [key for own in keys for key in own]
        raise ValueError(
            f"state_dict['state']: expected the keys that groups have in 'params' ({shown(known)}), got state of "
            f"{shown(strays[0])}{f' and {len(strays) - 1} more' if len(strays) > 1 else ''}; use the same keys in "
            "'state' and in 'params'"
        )


def check_version(version: Any) -> None:
    """Raise unless this release can read `version`."""
    if type(version) is not int or version < 1:
        raise ValueError(f"state_dict: expected a whole number of at least 1 as {VERSION}, got {shown(version)}")
    if version > STATE_VERSION:
        raise ValueError(
            f"state_dict: its state has version {version}, but this lucid-optim reads versions up to {STATE_VERSION}; "
            "load it with the release that saved it, or a later one"
        )


def _group(saved: Mapping[str, Any], own: ParamGroup, defaults: ParamGroup) -> ParamGroup:
    """Return a group with the hyperparameters of the saved group, and with the parameters and names of `own`."""
    without = {"params", "param_names", VERSION}
    group = ParamGroup.saved({key: copied(value) for key, value in saved.items() if key not in without})
    group["params"] = own["params"]
    if "param_names" in own:
        group["param_names"] = own["param_names"]
    elif len(names := saved.get("param_names") or ()) == len(own["params"]) and names:
        keys = saved["params"]
        group["param_names"] = list(keys) if set(keys) == set(map(str, names)) else copied(names)
    for key in OWN_OPTIONS:
        if key in own:
            group[key] = own[key]
    kept = own_that_count(own, saved)
    for key in ADDED:
        if key in own and key in kept:
            group[key] = own[key]
    for key, value in defaults.items():
        group.setdefault(key, value)
    return group


# The keys of a group that torch's AdamW does not have.
_NOT_TORCH = {"beta1", "beta2", "state_format", "master_weights", "seed", VERSION, SPIKES, *ADDED}


def torch_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved group with only the keys of ``torch.optim.AdamW``."""
    return {key: value for key, value in group.items() if key not in _NOT_TORCH}

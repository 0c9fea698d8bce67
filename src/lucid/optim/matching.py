"""Matches saved parameters with the optimizer's, and decides which hyperparameters each group takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lucid.engine.told import warn

from .groups import ParamGroup

Group = Mapping[str, Any]
Keys = list[list[Any]]  # the key of each parameter's saved state, for each group

VERSION = "state_version"
SPIKES = "spike_memory"
OWN_OPTIONS = ("state_format", "master_weights")  # the optimizer keeps its own values of these
# Hyperparameters that checkpoints of torch and of earlier releases lack: then each group keeps its own.
ADDED = ("weight_decay_schedule", "reference_lr", "cautious_decay", "ema_decay")
DECAY = "weight_decay"

# The keys of a group that are not hyperparameters, or are not taken from a checkpoint.
_NOT_TAKEN = {"params", "param_names", VERSION, SPIKES, *OWN_OPTIONS}


def matched(
    saved_groups: Sequence[Group], groups: Sequence[ParamGroup], called: Sequence[Sequence[str]]
) -> tuple[Keys, list[Group]]:
    """Return, for each of `groups`, the saved keys of its parameters and the saved group that it takes over.

    Parameters match by name if both sides have the same names, else by position; raise if neither fits. ``called``: the
    names of the parameters of each group in messages.
    """
    keys = _by_name(saved_groups, groups)
    if keys is None:
        _check_positions(saved_groups, groups)
        keys = [list(group["params"]) for group in saved_groups]
        taken = list(saved_groups)
    else:
        taken = taken_over(saved_groups, keys, groups, called)
    pairs = {
        (key, id(param))
        for group, own in zip(groups, keys, strict=True)
        for key, param in zip(own, group["params"], strict=True)
    }
    if not len(pairs) == len({key for key, _ in pairs}) == len({param for _, param in pairs}):
        raise ValueError(
            "state_dict['param_groups']: expected each parameter's number or name exactly once in 'params'"
        )
    return keys, taken


def taken_over(
    saved_groups: Sequence[Group], keys: Keys, groups: Sequence[ParamGroup], called: Sequence[Sequence[str]]
) -> list[Group]:
    """Return the saved group that each of `groups` takes over; ``keys`` has the saved keys of its parameters.

    If a group's parameters were saved in several groups, these must have the same hyperparameters. A parameter may be
    in several saved groups: a group takes over one that has all its parameters, if there is one. If the parameters of
    one saved group are now in groups that differ in ``weight_decay``, as `decay_groups` makes them, each keeps its own.
    """
    numbers_of: dict[Any, set[int]] = {}
    for number, group in enumerate(saved_groups):
        for key in group["params"]:
            numbers_of.setdefault(key, set()).add(number)
    empty = iter([group for group in saved_groups if not group["params"]])
    taken: list[Group] = []
    spread: dict[int, list[int]] = {}  # for each saved group, the groups that have its parameters now
    for place, (group, own) in enumerate(zip(groups, keys, strict=True)):
        if not own:
            taken.append(next(empty, group))
            continue
        shared = set.intersection(*(numbers_of[key] for key in own))
        best = place if place in shared else min(shared, default=None)
        number_of = {key: min(numbers_of[key]) if best is None else best for key in own}
        first = saved_groups[number_of[own[0]]]
        for key, name in zip(own, called[place], strict=True):
            differing = _differing(first, saved_groups[number_of[key]])
            if differing:
                raise ValueError(
                    f"{called[place][0]} and {name} are in one group here, but were saved with different "
                    f"{', '.join(sorted(differing))}; put them into separate groups, as they were saved"
                )
        for number in set(number_of.values()):
            spread.setdefault(number, []).append(place)
        taken.append(first)
    lost: set[str] = set()
    for number, places in spread.items():
        differing = set().union(*(_differing(groups[places[0]], groups[place]) for place in places))
        kept = set.intersection(*(own_that_count(groups[place], saved_groups[number]) for place in places))
        lost |= differing - {DECAY} - kept
        for place in places:
            if DECAY in differing and DECAY in groups[place]:
                taken[place] = {**taken[place], DECAY: groups[place][DECAY]}
    if lost:
        warn(
            f"load_state_dict: groups that differ in {', '.join(sorted(lost))} here were saved as one group, so all of "
            f"them take the saved value and keep only their own {DECAY}; set the other values in param_groups after "
            "loading",
            UserWarning,
        )
    return taken


def own_that_count(own: Group, saved: Group) -> set[str]:
    """Return which of a group's `ADDED` values count, and not the saved ones."""
    keeps_average = own.get("ema_decay") is not None or saved.get("ema_decay") is None
    return {key for key in ADDED if key not in saved or (key == "ema_decay" and keeps_average)}


def names_of(group: Group) -> list[str | None]:
    """Return the name of each parameter of a group, None for a parameter without a name.

    If there are not as many names as parameters, all are None: somebody has changed the list of parameters, and a name
    may belong to another one.
    """
    params, names = group["params"], group.get("param_names")
    if not isinstance(names, list | tuple) or len(names) != len(params):
        return [None for _ in params]
    return [name if isinstance(name, str) else None for name in names]


def is_name(key: Any) -> bool:
    """Whether a parameter's saved key is a name, as in the dicts of torch.distributed.checkpoint, and not a number."""
    return isinstance(key, str) and not key.isdecimal()


def _differing(one: Group, other: Group) -> set[str]:
    """Return the names of the hyperparameters in which two groups differ."""
    if one is other:
        return set()
    keys = (one.keys() | other.keys()) - _NOT_TAKEN
    return {key for key in keys if (key in one) != (key in other) or not alike(one.get(key), other.get(key))}


def alike(one: Any, other: Any) -> bool:
    """Whether two values are known to be equal."""
    try:
        same = one == other
        return one is other or bool(same.all() if isinstance(same, Tensor) or hasattr(same, "all") else same)
    except Exception:  # values that cannot be compared, such as lists with tensors, or tensors on several devices
        return False


def _flat(lists: Sequence[Sequence[Any]]) -> list[Any]:
    return [each for part in lists for each in part]


def _by_name(saved_groups: Sequence[Group], groups: Sequence[ParamGroup]) -> Keys | None:
    """Return the saved keys by name, or None if the two sides do not have the same names.

    A parameter in several groups has its name in each of them.
    """
    own_names = [names_of(group) for group in groups]
    names, keys = _flat(own_names), _flat([group["params"] for group in saved_groups])
    params = [id(param) for group in groups for param in group["params"]]
    if not names or None in names or not _is_one_to_one(names, params):
        return None
    # If keys are names, try them before 'param_names': torch's set_optimizer_state_dict puts the keys in the order of
    # the optimizer that loads them, and leaves 'param_names' in the order in which they were saved.
    for saved_names in (keys, _flat([names_of(group) for group in saved_groups])):
        if Counter(saved_names) == Counter(names) and _is_one_to_one(saved_names, keys):
            key_of = dict(zip(saved_names, keys, strict=True))
            found = [[key_of[name] for name in part] for part in own_names]
            if _flat(found) != keys and saved_names is not keys and any(map(is_name, keys)):
                raise ValueError(
                    f"state_dict: 'params' calls a parameter {keys[0]!r}, 'param_names' calls it {saved_names[0]!r}, "
                    "and the optimizer has them in another order, so its state cannot be matched; build the optimizer "
                    "with the parameters in the order in which they were saved"
                )
            return found
    return None


def _is_one_to_one(names: Sequence[Any], things: Sequence[Any]) -> bool:
    """Whether each name always stands for the same thing, and each thing has one name."""
    return len(set(zip(names, things, strict=True))) == len(set(names)) == len(set(things))


def _check_positions(saved_groups: Sequence[Group], groups: Sequence[ParamGroup]) -> None:
    """Raise if parameters cannot be matched by position; warn if both sides have names that differ."""
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict: expected groups of {sizes} parameters like the optimizer's, got {saved_sizes}; "
            "build the optimizer with the groups that it was saved with, or with the same names for all parameters"
        )
    names = _flat([names_of(group) for group in groups])
    saved_names = _flat([names_of(group) for group in saved_groups])
    place_of = {name: place for place, name in enumerate(names) if name is not None}
    saved_place_of = {name: place for place, name in enumerate(saved_names) if name is not None}
    known, saved_known = sum(name is not None for name in names), sum(name is not None for name in saved_names)
    if len(place_of) < known or len(saved_place_of) < saved_known:  # names that occur twice identify no parameter
        return
    for name, place in saved_place_of.items():
        if place_of.get(name, place) != place:
            raise ValueError(
                f"state_dict: parameter {name!r} is number {place_of[name]} in the optimizer and was saved as number "
                f"{place}, and other names differ, so parameters match neither by name nor by position; give "
                "both the same names, or the same order"
            )
    if any(None not in (name, saved) and name != saved for name, saved in zip(names, saved_names, strict=True)):
        warn(
            "load_state_dict: the saved parameters and the optimizer's have different names, so they are matched by "
            "position",
            UserWarning,
        )

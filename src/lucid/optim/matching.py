"""Matching: which saved parameter is which parameter here, and what a group here takes from the saved groups."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .groups import ParamGroup

Group = Mapping[str, Any]
Keys = list[list[Any]]  # the key of each parameter's saved state, for each group

VERSION = "state_version"
OWN_OPTIONS = ("state_format", "master_weights")  # of how state is kept here, whatever was saved
DECAY = "weight_decay"

# Of a group's keys, those that are no hyperparameters, or are not taken from a checkpoint.
_NOT_TAKEN = {"params", "param_names", VERSION, *OWN_OPTIONS}


def matched(
    saved_groups: Sequence[Group], groups: Sequence[ParamGroup], called: Sequence[Sequence[str]]
) -> tuple[Keys, list[Group]]:
    """Return the saved keys of the parameters of each of `groups`, and the saved group that it takes over.

    By name where both sides have the same names, else by position; raise where neither fits. ``called`` is how messages
    call the parameters of each group.
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
        raise ValueError("state_dict['param_groups']: expected each parameter's number or name once in 'params'")
    return keys, taken


def taken_over(
    saved_groups: Sequence[Group], keys: Keys, groups: Sequence[ParamGroup], called: Sequence[Sequence[str]]
) -> list[Group]:
    """Return the saved group that each of `groups` takes over; ``keys`` has the saved keys of its parameters.

    Where its parameters were saved in several groups, these have to agree. Where one saved group is spread over groups
    that differ in ``weight_decay``, as `decay_groups` makes them, each keeps its own.
    """
    number_of = {key: number for number, group in enumerate(saved_groups) for key in group["params"]}
    empty = iter([group for group in saved_groups if not group["params"]])
    taken: list[Group] = []
    spread: dict[int, list[int]] = {}  # over which groups each saved one is
    for place, (group, own) in enumerate(zip(groups, keys, strict=True)):
        if not own:
            taken.append(next(empty, group))
            continue
        first = saved_groups[number_of[own[0]]]
        for key, name in zip(own, called[place], strict=True):
            differing = _differing(first, saved_groups[number_of[key]])
            if differing:
                raise ValueError(
                    f"{called[place][0]} and {name} are in one group here and were saved with different "
                    f"{', '.join(sorted(differing))}; put them into groups as they were saved"
                )
        for number in {number_of[key] for key in own}:
            spread.setdefault(number, []).append(place)
        taken.append(first)
    lost: set[str] = set()
    for places in spread.values():
        differing = set().union(*(_differing(groups[places[0]], groups[place]) for place in places))
        lost |= differing - {DECAY}
        for place in places:
            if DECAY in differing and DECAY in groups[place]:
                taken[place] = {**taken[place], DECAY: groups[place][DECAY]}
    if lost:
        warnings.warn(
            f"load_state_dict: groups that differ in {', '.join(sorted(lost))} here were saved as one, so all of them "
            f"take the saved value; they keep only their own {DECAY}. Set the rest in param_groups after loading",
            UserWarning,
            stacklevel=5,
        )
    return taken


def names_of(group: Group) -> list[str | None]:
    """Return the name of each parameter of a group, or None for all of them where names and parameters differ in
    number: someone has changed the list of parameters, and a name may be another's.
    """
    params, names = group["params"], group.get("param_names")
    if not isinstance(names, list | tuple) or len(names) != len(params):
        return [None for _ in params]
    return [name if isinstance(name, str) else None for name in names]


def is_name(key: Any) -> bool:
    """Whether a parameter's saved key is a name, as in the dicts of torch.distributed.checkpoint, and no number."""
    return isinstance(key, str) and not key.isdecimal()


def _differing(one: Group, other: Group) -> set[str]:
    """The keys of the hyperparameters in which two groups differ."""
    if one is other:
        return set()
    keys = (one.keys() | other.keys()) - _NOT_TAKEN
    return {key for key in keys if (key in one) != (key in other) or not _alike(one.get(key), other.get(key))}


def _alike(one: Any, other: Any) -> bool:
    try:
        same = one == other
        return one is other or bool(same.all() if isinstance(same, Tensor) or hasattr(same, "all") else same)
    except Exception:  # tensors within lists, of no numbers, on several devices
        return False


def _flat(lists: Sequence[Sequence[Any]]) -> list[Any]:
    return [each for part in lists for each in part]


def _by_name(saved_groups: Sequence[Group], groups: Sequence[ParamGroup]) -> Keys | None:
    """The saved keys by name, or None where the names on both sides are not the same."""
    own_names = [names_of(group) for group in groups]
    names, keys = _flat(own_names), _flat([group["params"] for group in saved_groups])
    if not names or None in names or len(set(names)) < len(names):
        return None
    # Where keys are names, they come first: torch's set_optimizer_state_dict puts them in the order of the optimizer
    # that is to load them, and leaves 'param_names' in the order in which they were saved.
    for saved_names in (keys, _flat([names_of(group) for group in saved_groups])):
        if len(saved_names) == len(names) and set(saved_names) == set(names):
            key_of = dict(zip(saved_names, keys, strict=True))
            found = [[key_of[name] for name in part] for part in own_names]
            if _flat(found) != keys and saved_names is not keys and any(map(is_name, keys)):
                raise ValueError(
                    f"state_dict: its 'params' and 'param_names' call a parameter {keys[0]!r} and {saved_names[0]!r}, "
                    "and the optimizer has them in another order, so that whose state is whose is not known; build "
                    "the optimizer with the parameters in the order in which they were saved"
                )
            return found
    return None


def _check_positions(saved_groups: Sequence[Group], groups: Sequence[ParamGroup]) -> None:
    """Raise where parameters cannot be matched by position; warn where both sides have names, and others."""
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
    if len(place_of) < known or len(saved_place_of) < saved_known:  # names that do not tell parameters apart
        return
    for name, place in saved_place_of.items():
        if place_of.get(name, place) != place:
            raise ValueError(
                f"state_dict: parameter {name!r} is number {place_of[name]} of the optimizer's and was saved as number "
                f"{place}, and other names differ, so that parameters match neither by name nor by position; give "
                "both the same names, or the same order"
            )
    if any(None not in (name, saved) and name != saved for name, saved in zip(names, saved_names, strict=True)):
        warnings.warn(
            "load_state_dict: the saved parameters have other names than the optimizer's, so they are matched by "
            "position",
            UserWarning,
            stacklevel=5,
        )

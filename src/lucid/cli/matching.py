"""Matching a model's weights to the parameters of an optimizer's state."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lucid.optim.matching import is_name

from .checkpoints import Checkpoint, Parameter, Saved, trained

_SAVE_NAMES = "save the optimizer with names: AdamW(model.named_parameters(), ...)"


@dataclass(frozen=True, slots=True)
class Match:
    """A parameter's weight, or the reason why there is none."""

    weight: Tensor | None
    reason: str | None = None


def matched(saved: Saved, source: Checkpoint, models: Sequence[Mapping[str, Tensor]]) -> list[Match]:
    """Return the match of each parameter, in the best fitting one of the `models` of `source`."""
    if not models:
        return [Match(None, f"{source.name} holds no weights; give them as --weights")] * len(saved.parameters)
    fitting: dict[int, list[list[Match]]] = {}
    for model in models:
        matches = _in_model(saved.parameters, model, source)
        pairs = zip(saved.parameters, matches, strict=True)
        good = sum(each.weight is not None and _shape(of) in (None, each.weight.shape) for of, each in pairs)
        fitting.setdefault(good, []).append(matches)
    most = max(fitting)
    if len(fitting[most]) == 1:
        return fitting[most][0]
    fit = (
        f"{len(fitting[most])} models in {source.name} fit equally well" if most else f"no model in {source.name} fits"
    )
    return [Match(None, f"{fit}; give the right one as --weights")] * len(saved.parameters)


def _in_model(parameters: Sequence[Parameter], model: Mapping[str, Tensor], source: Checkpoint) -> list[Match]:
    """By name where there are names, else by place or shape among the weights that no name has taken."""
    names = {each.key: each.name for each in parameters if each.name is not None}
    if not any(name in model for name in names.values()):  # numbers, which a format of text keys made to names
        names = {key: name for key, name in names.items() if is_name(name)}
    taken = set(names.values())
    unnamed = [each for each in parameters if each.key not in names]
    others = {name: weight for name, weight in model.items() if name not in taken}
    rest = iter(_without_names(unnamed, others, source))
    return [_by_name(names[each.key], model, source) if each.key in names else next(rest) for each in parameters]


def _by_name(name: str, model: Mapping[str, Tensor], source: Checkpoint) -> Match:
    weight = model.get(name)
    return Match(weight, f"{source.name} has no weight of this name" if weight is None else None)


def _without_names(parameters: Sequence[Parameter], model: Mapping[str, Tensor], source: Checkpoint) -> list[Match]:
    """Match by position if the order is the model's, otherwise by shapes that occur once."""
    weights = trained(model)
    shapes = [_shape(parameter) for parameter in parameters]
    there = Counter(weight.shape for weight in weights)
    if len(weights) != len(parameters) or not Counter(shape for shape in shapes if shape is not None) <= there:
        reason = (
            f"the state was saved without names, and the {len(weights):,} weights in {source.name} are not those of "
            f"its {len(parameters):,} parameters"
        )
        return [Match(None, f"{reason}; {_SAVE_NAMES}")] * len(parameters)
    ordered = _is_ordered(model, source)
    if not ordered:
        why = f"the order of the weights in {source.name} need not be the model's"
    elif any(shape not in (None, weight.shape) for shape, weight in zip(shapes, weights, strict=True)):
        why = "the optimizer has its parameters in another order than the model"
    elif _groups_mix(parameters, weights):
        why = "its groups may have put the parameters into another order than the model's"
    else:
        return [Match(weight) for weight in weights]
    of_shape = {weight.shape: weight for weight in weights if there[weight.shape] == 1}
    reason = f"the state was saved without names, {why}, and several weights have the same shape; {_SAVE_NAMES}"
    return [Match(of_shape[shape]) if shape in of_shape else Match(None, reason) for shape in shapes]


def _shape(parameter: Parameter) -> torch.Size | None:
    moment = parameter.entry.get("exp_avg_code", parameter.entry.get("exp_avg"))
    return moment.shape if isinstance(moment, Tensor) else None


def _groups_mix(parameters: Sequence[Parameter], weights: Sequence[Tensor]) -> bool:
    """Whether parameters of one shape are in several groups, whose order may differ from the model's."""
    groups: dict[torch.Size, set[int]] = {}
    for parameter, weight in zip(parameters, weights, strict=True):
        groups.setdefault(weight.shape, set()).add(id(parameter.group))
    return any(len(each) > 1 for each in groups.values())


def _is_ordered(model: Mapping[str, Tensor], source: Checkpoint) -> bool:
    """Whether the order is the model's.

    safetensors sorts its tensors by name, and a folder has the order of its writers. A file whose names are sorted, all
    together or per dtype as safetensors' `load_file` sorts them, may come from one of these.
    """
    if source.kind != "file":
        return False
    names = list(model)
    runs = [(dtype, list(run)) for dtype, run in itertools.groupby(names, key=lambda name: model[name].dtype)]
    by_dtype = len({dtype for dtype, _ in runs}) == len(runs) and all(run == sorted(run) for _, run in runs)
    return len(names) < 2 or not (by_dtype or names == sorted(names))

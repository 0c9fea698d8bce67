"""The contents of checkpoints in files and folders: optimizer states and models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lucid.engine.formats import is_entry
from lucid.engine.shards import is_sharded
from lucid.engine.values import shown
from lucid.optim.matching import VERSION, is_name, names_of
from lucid.optim.state_dict import STATE_VERSION, check_version

from . import reading
from .error import CommandError
from .reading import Kind

Tree = dict[str, Any]
States = Mapping[str | int, Mapping[str, Any]]  # by a parameter's key
Place = tuple[str | int, ...]  # keys from the root of the checkpoint

_MOST_NODES, _DEEPEST = 5_000_000, 500  # number of dicts and lists in a checkpoint, and depth of nesting


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter in an optimizer's saved state.

    `name`: its saved name, if any. `number`: its first position over all groups.
    """

    key: str | int
    name: str | None
    number: int
    entry: Mapping[str, Any]
    group: Mapping[str, Any]

    @property
    def called(self) -> str:
        return self.name if self.name is not None and is_name(self.name) else f"parameter {self.key}"


@dataclass(frozen=True, slots=True)
class Saved:
    """An optimizer's state dict in a checkpoint.

    `flat`: whether each value has its own key, as DCP can save it. `strays`: keys of state of no parameter.
    """

    place: Place
    parameters: list[Parameter]
    flat: bool
    strays: tuple[Any, ...] = ()

    @property
    def called(self) -> str:
        return _called(self.place)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The contents of a file or folder."""

    path: Path
    kind: Kind
    tree: Tree

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    def optimizers(self) -> list[Saved]:
        """Return the optimizer states in the checkpoint; raise if there is none."""
        try:
            states = [each for each in _nodes(self.tree) if _is_state(each[1]) or _is_flat_state(each[1])]
            found = [_saved(place, node) for place, node in states]
            if not found:
                raise ValueError(f"expected an optimizer's state dict in it, {self._instead_of_optimizer()}")
            return found
        except ValueError as error:
            raise CommandError(f"{self.path}: {error}") from error

    def _instead_of_optimizer(self) -> str:
        """Return what the checkpoint holds instead of optimizer state, and what to do."""
        if self.kind == "safetensors":
            return (
                "got safetensors, which hold tensors alone; give the file with optimizer.state_dict(), and this one as "
                "--weights"
            )
        for place, node in _nodes(self.tree):
            if {"state", "param_groups"} <= set(node):
                return (
                    f"got one that cannot be used (in {_called(place)}): 'state' has to be a dict, and 'param_groups' "
                    "a list of dicts, each with a list 'params'; save optimizer.state_dict() as it is"
                )
        if self.models():
            return "got a model's weights alone; give the file with optimizer.state_dict(), and this one as --weights"
        keys = ", ".join(sorted(str(key)[:40] for key in self.tree)[:8]) or "nothing"
        return f"found none (it holds {keys}); save optimizer.state_dict() in it"

    def weights(self) -> dict[str, Tensor]:
        """Return parameters and buffers by name of the largest dict that could be a model, or an empty dict."""
        return max(self.models(), key=lambda model: sum(each.numel() for each in model.values()), default={})

    def models(self) -> list[dict[str, Tensor]]:
        """Return every dict that could be a model: parameters and buffers by name."""
        states: list[Place] = []
        models = []
        try:
            for place, node in _nodes(self.tree):
                if _is_state(node) or _is_flat_state(node):
                    states.append(place)
                elif _is_model(node) and not any(place[: len(state)] == state for state in states):
                    models.append(dict(node))
        except ValueError as error:
            raise CommandError(f"{self.path}: {error}") from error
        return models


def read(path: Path, *, mapped: bool = True) -> Checkpoint:
    """Read a file that ``torch.save`` or safetensors wrote, or a folder of ``torch.distributed.checkpoint``.

    No code in it is run: anything but tensors and plain values is an error. `mapped`: tensors stay in the file until
    they are used.
    """
    kind = reading.kind_of(path)
    if kind == "folder":
        tree = reading.read_folder(path)
    elif kind == "safetensors":
        parts = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        tree = _together(path, parts)
    else:
        tree = reading.read_file(path, mapped)
    if not isinstance(tree, Mapping):
        raise CommandError(
            f"{path}: expected a dict of state dicts or tensors in it, got {type(tree).__name__}; save one, like "
            '{"model": model.state_dict(), "optimizer": optimizer.state_dict()}'
        )
    return Checkpoint(path, kind, dict(tree))


def _together(path: Path, parts: Sequence[Path]) -> Tree:
    """Return the tensors of all files; raise if a name is in two of them, because either could be meant."""
    tree: Tree = {}
    part_of: dict[str, Path] = {}
    for part in parts:
        for name, tensor in reading.read_safetensors(part):
            if name in tree:
                raise CommandError(
                    f"{path}: {shown(name)} is both in {part_of[name].name} and in {part.name}; give one of the files, "
                    "or a folder with the files of one model"
                )
            tree[name], part_of[name] = tensor, part
    return tree


# Contents


def _called(place: Place) -> str:
    return ".".join(map(str, place)) or "the optimizer"


def _nodes(tree: Any) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Yield every dict, the outer ones first; raise if there is no end, as with a dict within itself."""
    waiting: list[tuple[Place, Any]] = [((), tree)]
    for _ in range(_MOST_NODES):
        if not waiting:
            return
        place, node = waiting.pop()
        if len(place) > _DEEPEST:
            break
        if isinstance(node, Mapping):
            yield place, node
        within = list(node.items() if isinstance(node, Mapping) else enumerate(node))
        waiting += [((*place, key), each) for key, each in reversed(within) if isinstance(each, Mapping | list | tuple)]
    raise ValueError("expected a checkpoint in it, got dicts and lists within each other almost without end")


def _is_state(node: Mapping[str, Any]) -> bool:
    groups = node.get("param_groups")
    return (
        isinstance(node.get("state"), Mapping | list)
        and isinstance(groups, list | tuple)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups)
    )


def _is_flat_state(node: Mapping[str, Any]) -> bool:
    if _is_state(node) or not all(isinstance(key, str) and "." in key for key in node):
        return False
    return {"state", "param_groups"} <= {key.partition(".")[0] for key in node}


def _is_model(node: Mapping[str, Any]) -> bool:
    return bool(node) and all(isinstance(key, str) and isinstance(each, Tensor) for key, each in node.items())


def trained(model: Mapping[str, Tensor]) -> list[Tensor]:
    """Return a model's weights in its order: tied weights count once, running statistics do not count."""
    floating = [
        each
        for name, each in model.items()
        if (each.is_floating_point() or each.is_complex()) and not name.endswith(("running_mean", "running_var"))
    ]
    unique: dict[tuple[object, ...], Tensor] = {}
    for each in floating:
        unique.setdefault(_identity(each), each)
    return list(unique.values())


def _identity(tensor: Tensor) -> tuple[object, ...]:
    if not tensor.numel() or tensor.is_meta or tensor.layout is not torch.strided:
        return (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def _saved(place: Place, node: Mapping[str, Any]) -> Saved:
    """The parameters of a state dict; raise if loading could not match state and parameters, or not read it."""
    if _is_flat_state(node):
        parameters = _flat_parameters(node)
        for parameter in parameters:
            check_version(parameter.group.get(VERSION, STATE_VERSION))
        return Saved(place, parameters, flat=True)
    for group in node["param_groups"]:
        check_version(group.get(VERSION, STATE_VERSION))
    _check_keys(node["param_groups"])
    entries = _entries(node)
    found: dict[str | int, Parameter] = {}
    numbers = itertools.count()
    for group in node["param_groups"]:
        for key, name in zip(group["params"], names_of(group), strict=True):
            position = next(numbers)
            if key in found:  # in several groups
                continue
            entry = entries.pop(key, {})
            if not isinstance(entry, Mapping):
                raise ValueError(f"state of parameter {key}: expected a dict, got {type(entry).__name__}")
            if any(isinstance(value, Tensor) and is_sharded(value) for value in entry.values()):
                raise ValueError(
                    f"state of parameter {key} is one process's part of tensors that are sharded over several; save a "
                    "folder with torch.distributed.checkpoint, or full tensors"
                )
            called = key if name is None and isinstance(key, str) else name
            found[key] = Parameter(key, called, position, entry, group)
    strays = tuple(key for key, entry in entries.items() if is_entry(entry))
    return Saved(place, list(found.values()), flat=False, strays=strays)


def _check_keys(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless each parameter has a number or a name, once in each of its groups."""
    wanted = "param_groups: expected each parameter's number or name once in 'params'"
    by_text: dict[str, int | str] = {}
    for group in groups:
        own = set()
        for key in group["params"]:
            if not isinstance(key, int | str):
                raise ValueError(
                    f"{wanted}, got {shown(key)} of type {type(key).__name__}; save optimizer.state_dict() as it is"
                )
            if key in own or by_text.setdefault(str(key), key) != key:
                raise ValueError(f"{wanted}, got {shown(key)} twice")
            own.add(key)


def _entries(node: Mapping[str, Any]) -> dict[Any, Any]:
    """The state of each parameter, by its key in the groups; folders turn numbers into strings or lists."""
    state = node["state"]
    keys = {key for group in node["param_groups"] for key in group["params"]}
    as_text = {str(key): key for key in keys}
    items = dict(state) if isinstance(state, Mapping) else dict(enumerate(state))
    entries = {}
    for key, entry in items.items():
        own = key if key in keys else as_text.get(str(key), key)
        if entry is not None:
            entries[key if own in items else own] = entry  # if both are there, the group's own key counts
    return entries


def _flat_parameters(node: Mapping[str, Any]) -> list[Parameter]:
    """Return parameters from keys like "state.layer.weight.exp_avg" and "param_groups.layer.weight.lr"."""
    parts: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for path, value in node.items():
        part, _, rest = path.partition(".")
        name, _, key = rest.rpartition(".")
        parts.setdefault(part, {}).setdefault(name, {})[key] = value
    names = parts["param_groups"] | parts["state"]
    return [
        Parameter(name, name, number, parts["state"].get(name, {}), parts["param_groups"].get(name, {}))
        for number, name in enumerate(names)
    ]


def replaced(
    checkpoint: Checkpoint, saved: Saved, entries: States, group_of: Callable[[Mapping[str, Any]], Tree]
) -> Checkpoint:
    """Return the checkpoint with `saved` replaced.

    `entries`: the new state by parameter key. `group_of`: returns the new group for an old one.
    """
    node: Any = checkpoint.tree
    for key in saved.place:
        node = node[key]
    if saved.flat:
        new = {f"state.{name}.{key}": each for name, entry in entries.items() for key, each in entry.items()}
        groups = {parameter.key: group_of(parameter.group) for parameter in saved.parameters}
        new |= {f"param_groups.{name}.{key}": each for name, group in groups.items() for key, each in group.items()}
    else:
        keys = {parameter.key for parameter in saved.parameters}
        kept = {key: each for key, each in _entries(node).items() if key not in keys}
        regrouped = [group_of(group) | {"params": group["params"]} for group in node["param_groups"]]
        new = dict(node) | {"state": kept | dict(entries), "param_groups": regrouped}
    return replace(checkpoint, tree=_with(checkpoint.tree, saved.place, new))


def _with(tree: Any, place: Place, new: Any) -> Any:
    """Return a copy of the dicts and lists on the path to `place`, with `new` at that place."""
    if not place:
        return new
    copy: Any = dict(tree) if isinstance(tree, Mapping) else list(tree)
    copy[place[0]] = _with(tree[place[0]], place[1:], new)
    return tuple(copy) if isinstance(tree, tuple) else copy

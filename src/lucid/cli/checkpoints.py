"""Checkpoints in files and folders, read without running what is in them, and what they are made of."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from lucid.engine.shards import is_sharded
from lucid.optim.state_dict import STATE_VERSION, VERSION, check_version

from . import CommandError

Kind = Literal["file", "safetensors", "folder"]
Tree = dict[str, Any]
States = Mapping[str | int, Mapping[str, Any]]  # by a parameter's key
Place = tuple[str | int, ...]  # keys from the root of a checkpoint on

SINGLE_FILE = (".pt", ".pth", ".bin", ".ckpt", ".tar")

_MOST_NODES, _DEEPEST = 5_000_000, 500  # dicts and lists of a checkpoint, and within each other


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter in an optimizer's saved state; `name` where names were saved."""

    key: str | int
    name: str | None
    entry: Mapping[str, Any]
    group: Mapping[str, Any]

    @property
    def called(self) -> str:
        return self.name if self.name is not None else f"parameter {self.key}"


@dataclass(frozen=True, slots=True)
class Saved:
    """An optimizer's state dict in a checkpoint.

    `flat`: with one key for each value, as DCP can have it. `strays`: numbers of parameters that are in no group.
    """

    place: Place
    parameters: list[Parameter]
    flat: bool
    strays: tuple[str | int, ...] = ()

    @property
    def called(self) -> str:
        return ".".join(map(str, self.place)) or "the optimizer"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a file or folder holds."""

    path: Path
    kind: Kind
    tree: Tree

    def optimizers(self) -> list[Saved]:
        """Return the optimizer states in it; refuse where there is none."""
        try:
            states = [each for each in _nodes(self.tree) if _is_state(each[1]) or _is_flat_state(each[1])]
            found = [_saved(place, node) for place, node in states]
        except ValueError as error:
            raise CommandError(f"{self.path}: {error}") from error
        if not found:
            keys = ", ".join(sorted(map(str, self.tree))[:8]) or "nothing"
            raise CommandError(f"{self.path}: expected an optimizer's state dict in it, found none; it holds {keys}")
        return found

    def weights(self) -> dict[str, Tensor]:
        """Return the model's parameters and buffers by name: of all that could be a model, the largest; else none."""
        return max(self.models(), key=lambda model: sum(each.numel() for each in model.values()), default={})

    def models(self) -> list[dict[str, Tensor]]:
        """Return all that could be a model: its parameters and buffers by name."""
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

    Nothing in it is run: what is neither a tensor nor a plain value is refused. `mapped`: tensors stay in the file
    until they are used.
    """
    try:
        is_there = path.exists()
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error
    if not is_there:
        raise CommandError(f"{path}: no such file or folder")
    if path.is_dir():
        if (path / ".metadata").exists():
            return Checkpoint(path, "folder", _read_folder(path))
        parts = sorted(path.glob("*.safetensors"))
        if parts:
            return Checkpoint(path, "safetensors", {name: each for part in parts for name, each in _tensors(part)})
        raise CommandError(
            f"{path}: expected a checkpoint's folder, but there is neither .metadata nor *.safetensors in it"
        )
    if path.suffix == ".safetensors":
        return Checkpoint(path, "safetensors", dict(_tensors(path)))
    tree = _read_file(path, mapped)
    if not isinstance(tree, Mapping):
        raise CommandError(f"{path}: expected a dict of state dicts or tensors in it, got {type(tree).__name__}")
    return Checkpoint(path, "file", dict(tree))


def _read_file(path: Path, mapped: bool) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        except RuntimeError:
            if not mapped:
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # of before torch 1.6
    except pickle.UnpicklingError as error:
        raise _more_than_values(path, error) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CommandError(f"{path}: this cannot be read as a checkpoint: {first_line(error)}") from error


def _more_than_values(path: Path, error: Exception) -> CommandError:
    if str(error).startswith("its list of contents"):  # which says all
        return CommandError(f"{path}: {error}")
    named = re.search(r"GLOBAL (\S+)", str(error))
    return CommandError(
        f"{path}: it holds more than tensors and plain values, and to load that could run any code "
        f"({first_line(error) if named is None else f'it names {named[1]}'}); save state dicts alone"
    )


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("WeightsUnpickler error:", "Unsupported"))]
    return (telling or lines or [type(error).__name__])[0].rstrip(".")


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CommandError(f"{path}: this cannot be read as safetensors: {first_line(error)}") from error


def _read_folder(path: Path) -> Tree:
    from lucid.optim.distributed_files import read_whole

    try:
        with tqdm(desc=f"read {path.name}", leave=False, disable=None) as bar:

            def tell(there: int, of: int) -> None:
                bar.total = of
                bar.update(there - bar.n)

            return read_whole(path, tell)
    except pickle.UnpicklingError as error:
        raise _more_than_values(path, error) from error
    except Exception as error:  # of whatever torch's readers make of what is missing or cut short
        raise CommandError(f"{path}: this cannot be read as a checkpoint's folder: {first_line(error)}") from error


# What is in them


def _nodes(tree: Any) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Every dict, from the outside inwards; raise where they have no end, as a dict within itself has none."""
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
    starts = {str(key).partition(".")[0] for key in node}
    return {"state", "param_groups"} <= starts and not _is_state(node) and all("." in str(key) for key in node)


def _is_model(node: Mapping[str, Any]) -> bool:
    return bool(node) and all(isinstance(key, str) and isinstance(each, Tensor) for key, each in node.items())


def trained(model: Mapping[str, Tensor]) -> list[Tensor]:
    """Return a model's weights, in its order: what is tied counts once, and running statistics do not."""
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
    """The parameters of a state dict; raise where loading would not know whose state is whose, or how to read it."""
    if _is_flat_state(node):
        parameters = _flat_parameters(node)
        for parameter in parameters:
            check_version(parameter.group.get(VERSION, STATE_VERSION))
        return Saved(place, parameters, flat=True)
    for group in node["param_groups"]:
        check_version(group.get(VERSION, STATE_VERSION))
    keys = [key for group in node["param_groups"] for key in group["params"]]
    if not all(isinstance(key, int | str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError("param_groups: expected each parameter's number or name once in 'params'")
    entries = _entries(node)
    parameters = []
    for group in node["param_groups"]:
        names = group.get("param_names")
        for index, key in enumerate(group["params"]):
            name = names[index] if isinstance(names, list | tuple) and len(names) == len(group["params"]) else None
            if name is None and isinstance(key, str):
                name = key
            entry = entries.pop(key, {})
            if not isinstance(entry, Mapping):
                raise ValueError(f"state of parameter {key}: expected a dict, got {type(entry).__name__}")
            if any(isinstance(value, Tensor) and is_sharded(value) for value in entry.values()):
                raise ValueError(
                    f"state of parameter {key} is one process's part of tensors that are spread over several; save a "
                    "folder with torch.distributed.checkpoint, or full tensors"
                )
            parameters.append(Parameter(key, name, entry, group))
    return Saved(place, parameters, flat=False, strays=tuple(key for key in entries if str(key).isdecimal()))


def _entries(node: Mapping[str, Any]) -> dict[Any, Any]:
    """The state of each parameter, by its key in the groups; folders turn numbers into strings, or lists."""
    state = node["state"]
    numbers = {str(key): key for group in node["param_groups"] for key in group["params"]}
    items = state.items() if isinstance(state, Mapping) else enumerate(state)
    return {numbers.get(str(key), key): entry for key, entry in items if entry is not None}


def _flat_parameters(node: Mapping[str, Any]) -> list[Parameter]:
    """Of keys like "state.layer.weight.exp_avg" and "param_groups.layer.weight.lr"."""
    parts: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for path, value in node.items():
        part, _, rest = path.partition(".")
        name, _, key = rest.rpartition(".")
        parts.setdefault(part, {}).setdefault(name, {})[key] = value
    names = parts["param_groups"] | parts["state"]
    return [Parameter(name, name, parts["state"].get(name, {}), parts["param_groups"].get(name, {})) for name in names]


def replaced(
    checkpoint: Checkpoint, saved: Saved, entries: States, group_of: Callable[[Mapping[str, Any]], Tree]
) -> Checkpoint:
    """Return the checkpoint with another state in the place of `saved`.

    `entries`: by parameter's key. `group_of`: what a group becomes.
    """
    node: Any = checkpoint.tree
    for key in saved.place:
        node = node[key]
    if saved.flat:
        new = {f"state.{name}.{key}": each for name, entry in entries.items() for key, each in entry.items()}
        groups = {parameter.key: group_of(parameter.group) for parameter in saved.parameters}
        new |= {f"param_groups.{name}.{key}": each for name, group in groups.items() for key, each in group.items()}
    else:
        keys = [parameter.key for parameter in saved.parameters]
        kept = {key: each for key, each in _entries(node).items() if key not in keys}
        regrouped = [group_of(group) | {"params": group["params"]} for group in node["param_groups"]]
        new = dict(node) | {"state": kept | dict(entries), "param_groups": regrouped}
    return replace(checkpoint, tree=_with(checkpoint.tree, saved.place, new))


def _with(tree: Any, place: Place, new: Any) -> Any:
    """A copy of the dicts and lists on the way to `place`, with `new` there."""
    if not place:
        return new
    copy: Any = dict(tree) if isinstance(tree, Mapping) else list(tree)
    copy[place[0]] = _with(tree[place[0]], place[1:], new)
    return tuple(copy) if isinstance(tree, tuple) else copy

"""Optimizer state in distributed checkpoints (``torch.distributed.checkpoint``) of another optimizer or state format.

torch's own ``get_optimizer_state_dict`` and ``set_optimizer_state_dict`` save and load this optimizer on any number of
processes, as long as the state format is the same. They read only the keys that the live optimizer has. For a
checkpoint in another format, or from or for ``torch.optim.AdamW``, use the two functions of this module.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import _get_fqns
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader

from lucid import engine

from .distributed_files import Planner, Reader
from .groups import ParamGroup
from .matching import taken_over
from .members import params_of
from .optimizer import Optimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_STATE, _GROUPS, _PARAMS = "state", "param_groups", "params"


def load_optimizer(
    model: nn.Module,
    optimizer: Optimizer,
    checkpoint_id: str | os.PathLike[str] | None = None,
    *,
    storage_reader: StorageReader | None = None,
    prefix: str = "optimizer",
    process_group: ProcessGroup | None = None,
) -> None:
    """Load optimizer state from a distributed checkpoint in any state format, or of ``torch.optim.AdamW``.

    The function reads the keys that the checkpoint has, flattened or not, then loads and converts as
    `Optimizer.load_state_dict` does. Every process of the group has to call it.

    Parameters
    ----------
    model : Module
        The model whose parameters the optimizer updates, sharded or not. Its parameter names identify the state.
    optimizer : Optimizer
        An optimizer of ``lucid.optim``.
    checkpoint_id : path, optional
        The checkpoint's folder.
    storage_reader : StorageReader, optional
        Reads the checkpoint. The default reader reads files and never runs code from them; torch's own readers unpickle
        the ``.metadata`` file, which can run code.
    prefix : str, default "optimizer"
        The key under which the optimizer's state dict was saved; keys within dicts are joined by dots.
    process_group : ProcessGroup, optional
        The processes that load; by default all.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint, or an incomplete one.
    UnpicklingError
        If it holds anything but tensors and plain values.
    TypeError, ValueError
        If the checkpoint does not fit the optimizer: it lacks a parameter, has another shape or a value out of range,
        or saved the parameters of one group with different hyperparameters. Nothing is changed then.
    """
    if storage_reader is None:
        if checkpoint_id is None:
            raise TypeError("load_optimizer: expected a checkpoint_id or a storage_reader, got neither")
        storage_reader = Reader(checkpoint_id)
    elif checkpoint_id is not None:
        storage_reader.reset(checkpoint_id)
    names = _names(model, optimizer)
    params = params_of(optimizer.param_groups)
    param_of = dict(zip((name for group in names for name in group), params, strict=True))
    try:
        metadata = storage_reader.read_metadata().state_dict_metadata
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no complete checkpoint there ({error}): .metadata is written last, after all other files"
        ) from error
    places = {key: _Place.of(key.removeprefix(f"{prefix}.")) for key in metadata if key.startswith(f"{prefix}.")}
    if not places:
        known = ", ".join(sorted({key.split(".")[0] for key in metadata}))
        raise ValueError(f"prefix: expected one of the checkpoint's keys ({known}), got {prefix!r}")
    values: dict[str, Any] = {}
    on_host = optimizer._settings.state_device is not None
    for key, place in places.items():
        if place.part == _STATE and place.name in param_of:
            what = f"state {place.key!r} of {place.name!r}"
            values[key] = _room(param_of[place.name], metadata[key], what, on_host)
        elif place.part == _GROUPS:
            values[key] = _room(None, metadata[key])
    load(values, storage_reader=storage_reader, planner=Planner(), process_group=process_group)
    found = [(places[key], value) for key, value in values.items()]
    optimizer.load_state_dict(_assembled(names, found, optimizer.param_groups))


def torch_optimizer_state_dict(model: nn.Module, optimizer: Optimizer, *, flatten: bool = False) -> dict[str, Any]:
    """Return a state dict like that of ``get_optimizer_state_dict`` for ``torch.optim.AdamW``.

    Save it to continue training with ``torch.optim.AdamW``. Moments are float32, and keys that torch's AdamW does not
    have are left out.

    Parameters
    ----------
    model : Module
        The model whose parameters the optimizer updates, sharded or not.
    optimizer : Optimizer
        An optimizer of ``lucid.optim``, in any state format.
    flatten : bool, default False
        Must equal ``StateDictOptions(flatten_optimizer_state_dict=...)`` at loading.

    Returns
    -------
    dict
        State by parameter name, with tensors sharded as the parameters are.
    """
    names = [name for group in _names(model, optimizer) for name in group]
    saved = optimizer.torch_state_dict()
    state = {names[number]: entry for number, entry in saved[_STATE].items() if entry}
    own = torch.optim.AdamW([torch.empty(0, device="cpu")]).defaults  # torch expects these keys when it loads
    groups = [own | group | {_PARAMS: [names[number] for number in group[_PARAMS]]} for group in saved[_GROUPS]]
    if not flatten:
        return {_STATE: state, _GROUPS: groups}
    flat = {f"{_STATE}.{name}.{key}": value for name, entry in state.items() for key, value in entry.items()}
    for group in groups:
        for name in group[_PARAMS]:
            flat |= {f"{_GROUPS}.{name}.{key}": value for key, value in group.items() if key != _PARAMS}
    return flat


class _Place(NamedTuple):
    """Where a value of a checkpoint belongs: to a parameter's state or group, or to a group by its number."""

    part: str
    name: str
    key: str

    @classmethod
    def of(cls, path: str) -> _Place:
        part, _, rest = path.partition(".")
        name, _, key = rest.rpartition(".")
        return cls(part, name, key)


def _names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of each group's parameters, as in torch's checkpoints."""
    name_of = {param: next(iter(_get_fqns(model, name))) for name, param in model.named_parameters()}
    for group in optimizer.param_groups:
        for param in group[_PARAMS]:
            if param not in name_of:
                raise ValueError(
                    f"model: expected the one whose parameters the optimizer updates, but it has no parameter of shape "
                    f"{tuple(param.shape)} that is in a group; was it wrapped after the optimizer was made?"
                )
    return [[name_of[param] for param in group[_PARAMS]] for group in optimizer.param_groups]


def _room(param: Tensor | None, saved: Any, what: str = "", on_host: bool = False) -> Tensor | None:
    """An empty tensor to read a `saved` tensor into, sharded as the parameter is; None for other values."""
    if not isinstance(saved, TensorStorageMetadata):
        return None
    dtype = saved.properties.dtype
    if param is None or not saved.size:
        return torch.empty(saved.size, dtype=dtype, device="cpu")
    if len(saved.size) not in (param.dim(), 2) or saved.size[:1] != param.shape[:1]:
        raise ValueError(f"{what} has shape {tuple(saved.size)} in the checkpoint, the parameter {tuple(param.shape)}")
    if not engine.shards.is_sharded(param):
        return torch.empty(saved.size, dtype=dtype, device="cpu" if on_host else param.device)
    from torch.distributed import tensor

    placements: Sequence[tensor.Placement] = param.placements
    if engine.shards.cuts_blocks(param) and (saved.size != param.shape or dtype == torch.uint8):
        placements = [tensor.Replicate()] * param.device_mesh.ndim  # codes and scales need whole blocks
    return engine.shards.empty(param, saved.size, dtype, placements, "cpu" if on_host else param.device)


def _assembled(
    names: list[list[str]], values: list[tuple[_Place, Any]], groups: Sequence[ParamGroup]
) -> dict[str, Any]:
    """A state dict for an optimizer with these `groups`, whose parameters have these `names`."""
    state: dict[str, dict[str, Any]] = {}
    parts: dict[str, dict[str, Any]] = {}  # groups by number or, where flattened, by parameter
    for place, value in values:
        into = state if place.part == _STATE else parts
        into.setdefault(place.name, {})[place.key] = value
    saved_groups = [part for part in parts.values() if _PARAMS in part] or _as_groups(parts)
    known = {name for group in saved_groups for name in group[_PARAMS]}
    unknown = [name for group_names in names for name in group_names if name not in known]
    if unknown:
        raise ValueError(f"the checkpoint has no parameter {unknown[0]!r} ({len(unknown)} of them are missing)")
    called = [[f"parameter {name!r}" for name in group_names] for group_names in names]
    taken = taken_over(saved_groups, names, groups, called)
    number_of = {name: number for number, name in enumerate(dict.fromkeys(itertools.chain.from_iterable(names)))}
    return {
        _STATE: {number: state[name] for name, number in number_of.items() if name in state},
        _GROUPS: [
            {key: value for key, value in group.items() if key != "param_names"}
            | {_PARAMS: [number_of[name] for name in group_names]}
            for group, group_names in zip(taken, names, strict=True)
        ],
    }


def _as_groups(parts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of the parameters that were saved with the same hyperparameters."""
    groups: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        options = {key: value for key, value in part.items() if key != "param_names"}
        alike = repr(sorted((key, v.tolist() if isinstance(v, Tensor) else v) for key, v in options.items()))
        groups.setdefault(alike, options | {_PARAMS: []})[_PARAMS].append(name)
    return list(groups.values())

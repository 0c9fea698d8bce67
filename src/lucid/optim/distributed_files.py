"""Folders of ``torch.distributed.checkpoint``, read without running code from them.

The ``.metadata`` file is a pickle, and so is every value that is not a tensor. torch's own reader unpickles both and
runs any code that they name. The readers here load only the classes of which a checkpoint consists, and raise for
anything else.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from . import weights_only

_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_KNOWN = {
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "collections": {"OrderedDict"},
}
_PATHS = {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}

_MOST_PLACES = 10_000  # elements of a list beyond the number of values: .metadata could name any length

_InPython: Any = pickle._Unpickler


class _Contents(_InPython):  # type: ignore[misc]
    """Unpickles a checkpoint's ``.metadata``.

    It is Python's unpickler, because the one in C can be told to set attributes of any class or function.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_InPython.dispatch)

    def load_build(self) -> None:
        built = self.stack[-2]
        if isinstance(built, type) or not dataclasses.is_dataclass(built):
            raise pickle.UnpicklingError(f"its .metadata changes {built!r}, which does not belong in a checkpoint")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return PurePosixPath if "Posix" in name else PureWindowsPath  # of the machine that saved it
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"its .metadata names {module}.{name}, which does not belong in a checkpoint")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """Reads a checkpoint's folder. Raises UnpicklingError if ``.metadata`` names code or files elsewhere."""

    _read: dict[str, Metadata] | None = None  # by path: a long .metadata takes seconds, and torch reads it twice

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        super().reset(checkpoint_id)
        self._read = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = str(self._get_metadata_path(kwargs.get("rank")))
        self._read = self._read or {}
        if path not in self._read:
            self._read[path] = self._checked_metadata(path)
        return self._read[path]

    def _checked_metadata(self, path: str) -> Metadata:
        with self.fs.create_stream(path, "rb") as stream:
            metadata = _Contents(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"its .metadata is {type(metadata).__name__}, expected Metadata")
        for info in (metadata.storage_data or {}).values():
            if not isinstance(info, _StorageInfo):
                raise pickle.UnpicklingError(f"its .metadata has {type(info).__name__} for a place in a file")
            path = str(info.relative_path)
            if path != Path(path).name or path in ("", ".", ".."):
                raise pickle.UnpicklingError(f"its .metadata names a file elsewhere: {path!r}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """Loads into a state dict. Reads values that are not tensors as ``torch.load(weights_only=True)`` does, and also
    numpy's numbers.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(weights_only.load(value), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _WholePlanner(Planner, _EmptyStateDictLoadPlanner):
    """Loads everything into an empty dict, and reports how many values it has read."""

    def __init__(self, tell: Callable[[int, int], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tell, self._there, self._all = tell, 0, 0

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        self._all = len(plan.items)
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        super().load_bytes(read_item, value)
        self._count()

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        self._count()

    def _count(self) -> None:
        self._there += 1
        self._tell(self._there, self._all)


def read_whole(
    path: str | os.PathLike[str], tell: Callable[[int, int], object] = lambda there, of: None
) -> dict[str, Any]:
    """Return everything that a checkpoint's folder holds, in one process.

    Parameters
    ----------
    path : path
        The folder.
    tell : callable, optional
        Called after each value with the number of values read and the number of all values.

    Raises
    ------
    FileNotFoundError
        If ``.metadata``, which is written last, or another file is missing.
    UnpicklingError
        If the folder holds anything but tensors and plain values.
    """
    values: dict[str, Any] = {}
    reader = Reader(path)
    metadata = reader.read_metadata()  # read it here: the loader would hide its error behind another
    most = _MOST_PLACES + len(metadata.state_dict_metadata)
    for place in (metadata.planner_data or {}).values():
        if any(isinstance(part, int) and part >= most for part in place):
            raise pickle.UnpicklingError(f"its .metadata has a list of more than {most:,} values")
    try:
        _load_state_dict(values, storage_reader=reader, planner=_WholePlanner(tell), no_dist=True)
    except CheckpointException as error:
        ((failure, _),) = error.failures.values()
        raise failure from error
    return values

"""Folders of ``torch.distributed.checkpoint``, read without running anything that is in them.

Their list of contents is a pickle, and so is every value that is no tensor. Torch's own reader loads both in a way that
runs whatever code they name; these load what a checkpoint is made of, and raise for anything else.
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

_MOST_PLACES = 10_000  # of a list beyond the number of values: a number in the list of contents makes it that long

_InPython: Any = pickle._Unpickler


class _Contents(_InPython):  # type: ignore[misc]
    """Reads what a checkpoint's list of contents is made of.

    In Python: the unpickler in C sets attributes of classes and functions too, in the whole process, if told so.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_InPython.dispatch)

    def load_build(self) -> None:
        built = self.stack[-2]
        if isinstance(built, type) or not dataclasses.is_dataclass(built):
            raise pickle.UnpicklingError(f"its list of contents changes {built!r}, which is no part of one")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return PurePosixPath if "Posix" in name else PureWindowsPath  # of the machine that saved
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"its list of contents names {module}.{name}, which is no part of one")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """Reads a checkpoint's folder. A list of contents that names code, or files elsewhere, raises UnpicklingError."""

    _read: dict[str, Metadata] | None = None  # by path: a long list takes seconds, and is asked for twice

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
            raise pickle.UnpicklingError(f"its list of contents is {type(metadata).__name__}, expected Metadata")
        for info in (metadata.storage_data or {}).values():
            if not isinstance(info, _StorageInfo):
                raise pickle.UnpicklingError(f"its list of contents has {type(info).__name__} for a place in a file")
            path = str(info.relative_path)
            if path != Path(path).name or path in ("", ".", ".."):
                raise pickle.UnpicklingError(f"its list of contents names a file elsewhere: {path!r}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """Loads into a state dict; reads values that are no tensors as ``torch.load(weights_only=True)`` does,
    and numpy's numbers.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(weights_only.load(value), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _WholePlanner(Planner, _EmptyStateDictLoadPlanner):
    """Loads all that there is, into an empty dict; tells how many values of how many it has."""

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
    """Return all that a checkpoint's folder holds, as one process sees it.

    Parameters
    ----------
    path : path
        The folder.
    tell : callable, optional
        Called with the number of values that are there and of all, as they are read.

    Raises
    ------
    FileNotFoundError
        Where its list of contents, which is written last, or another of its files is missing.
    UnpicklingError
        Where it holds anything but tensors and plain values.
    """
    values: dict[str, Any] = {}
    reader = Reader(path)
    metadata = reader.read_metadata()  # what it raises, the loader would hide behind another error
    most = _MOST_PLACES + len(metadata.state_dict_metadata)
    for place in (metadata.planner_data or {}).values():
        if any(isinstance(part, int) and part >= most for part in place):
            raise pickle.UnpicklingError(f"its list of contents has a list of more than {most:,} values")
    try:
        _load_state_dict(values, storage_reader=reader, planner=_WholePlanner(tell), no_dist=True)
    except CheckpointException as error:
        ((failure, _),) = error.failures.values()
        raise failure from error
    return values

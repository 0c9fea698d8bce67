"""Writing checkpoints completely or not at all."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from tqdm import tqdm

from .checkpoints import Tree
from .error import CommandError
from .reading import Kind, first_line


def check_target(path: Path, kind: Kind) -> None:
    """Raise, before the work, if the target cannot be written."""
    parent = (path if kind == "folder" else _meant(path)).parent
    if not parent.is_dir():
        raise CommandError(f"{path}: expected a folder {parent} to write it into, there is none")
    if kind == "folder" and path.exists():
        raise CommandError(
            f"{path}: a folder can only be written to a path that does not exist yet; remove it or name another"
        )
    if kind == "file" and path.is_dir():
        raise CommandError(f"{path}: expected a file's name, this is a folder")
    if kind == "file" and path.exists() and not path.is_file():
        raise CommandError(f"{path}: expected a file's name, this is a device or pipe")


def _meant(path: Path) -> Path:
    """Return the path that a link points to, so that the link itself is kept."""
    return Path(os.path.realpath(path))


def write(tree: Tree, path: Path, kind: Kind) -> None:
    """Write a file or folder completely or not at all: under another name, renamed once it is on disk."""
    check_target(path, kind)
    try:
        if kind == "folder":
            _write_folder(tree, path)
        else:
            _write_file(tree, _meant(path))
    except (OSError, RuntimeError, pickle.PicklingError, CheckpointException) as error:
        causes = [each for each, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        cause = next(iter(causes), error.__context__ if isinstance(error.__context__, OSError) else error)
        raise CommandError(f"{path}: it could not be written, and nothing was changed: {first_line(cause)}") from error


def _write_file(tree: Tree, path: Path) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            with tqdm.wrapattr(
                file, "write", total=_bytes(tree), desc=f"write {path.name}", leave=False, disable=None
            ) as counted:
                torch.save(tree, counted)
            file.flush()
            os.fsync(file.fileno())
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        part.chmod(mode)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _write_folder(tree: Tree, path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended here
            with tqdm(desc=f"write {path.name}", leave=False, disable=None) as bar:
                save(tree, checkpoint_id=part, planner=_TellingPlanner(bar), no_dist=True)
        part.chmod(0o777 & ~_umask())
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync_folder(path.parent)


class _TellingPlanner(DefaultSavePlanner):
    """Advances a progress bar for each value that is written."""

    def __init__(self, bar: Any) -> None:
        super().__init__()
        self._bar = bar

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self._bar.reset(len(plan.items))
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        self._bar.update()
        return super().resolve_data(write_item)


def _bytes(tree: Any) -> int:
    """The bytes of all dense tensors in dicts and lists."""
    if isinstance(tree, Mapping | list | tuple):
        return sum(_bytes(each) for each in (tree.values() if isinstance(tree, Mapping) else tree))
    return tree.nbytes if isinstance(tree, Tensor) and tree.layout is torch.strided else 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(path: Path) -> None:
    """Make a rename survive a power cut; Windows cannot do this."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

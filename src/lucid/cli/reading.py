"""Reading files and folders without running code from them, and errors for what cannot be read."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from tqdm import tqdm

from lucid.optim import weights_only

from .error import CommandError

Kind = Literal["file", "safetensors", "folder"]

SINGLE_FILE = (".pt", ".pth", ".bin", ".ckpt", ".tar")

_SAVED_BY_TORCH = "a file that torch.save wrote"
_COPY = "copy or save it again"
_NAME_IT = "give it a name that ends in .pt"
_CHECK = "check the path"
_TRUSTED = (
    "if you trust whoever made it, load it with torch.load(..., weights_only=False) and save its state dicts alone"
)

_TORCH_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # of a file from before torch 1.6, in its first bytes
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def kind_of(path: Path) -> Kind:
    """Return how to read `path`; raise if it cannot be read."""
    try:
        if not path.exists():
            raise CommandError(f"{path}: no such file or folder")
        if path.is_dir():
            return _kind_of_folder(path)
        if not path.is_file():
            raise CommandError(f"{path}: expected a file or folder, got a device or pipe; copy it into a file first")
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error
    return "safetensors" if path.suffix == ".safetensors" else "file"


def _kind_of_folder(path: Path) -> Kind:
    if (path / ".metadata").exists():
        return "folder"
    if any(path.glob("*.safetensors")):
        return "safetensors"
    files = sorted(each.name for each in path.iterdir() if each.suffix in SINGLE_FILE)
    advice = f"; give one of its files, like {path / files[0]}" if files else ""
    parts = any(path.glob("*.distcp"))
    advice = "; its saving did not end, so take an earlier checkpoint" if parts else advice
    raise CommandError(
        f"{path}: expected a folder of torch.distributed.checkpoint, which has .metadata in it, or of *.safetensors, "
        f"got one with neither{advice}"
    )


def read_file(path: Path, mapped: bool) -> Any:
    """Return the contents of a file of ``torch.save``; `mapped`: tensors stay in the file until they are used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings either come with an error or do not matter here
            try:
                return weights_only.load(path, map_location="cpu", mmap=mapped)
            except RuntimeError:
                if not mapped:
                    raise
                return weights_only.load(path, map_location="cpu")  # a file from before torch 1.6
    except MemoryError:
        raise
    except Exception as error:  # torch's reader raises many kinds of errors for arbitrary bytes
        raise _refusal(path, _SAVED_BY_TORCH, error) from error


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file with their names."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                yield name, file.get_tensor(name)
    except MemoryError:
        raise
    except Exception as error:  # its own errors, and torch's
        raise _refusal(path, "a file of safetensors", error) from error


def read_folder(path: Path) -> Any:
    """Return everything in a folder of ``torch.distributed.checkpoint``."""
    from lucid.optim.distributed_files import read_whole

    try:
        with tqdm(desc=f"read {path.name}", leave=False, disable=None) as bar:

            def tell(there: int, of: int) -> None:
                bar.total = of
                bar.update(there - bar.n)

            return read_whole(path, tell)
    except MemoryError:
        raise
    except Exception as error:  # torch's readers raise many kinds of errors for damaged files
        if isinstance(error, pickle.UnpicklingError) and (sentence := _more_than_values(error)):
            raise CommandError(f"{path}: {sentence}") from error
        raise CommandError(
            f"{path}: this cannot be read as a checkpoint's folder: {_said(error)}; one of its files is damaged, cut "
            f"short or missing, so {_COPY}"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the most useful line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("WeightsUnpickler error:", "Unsupported"))]
    return (telling or lines or [type(error).__name__])[0].rstrip(".")


def _said(error: BaseException) -> str:
    """Return an error's text if it is a sentence, otherwise its class."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({Path(str(error.filename)).name})" if error.filename else "")
    line = first_line(error).partition(". This is an internal")[0]
    return line[:200] if " " in line else f"{type(error).__name__} {line[:50]}".strip()


def _more_than_values(error: pickle.UnpicklingError) -> str:
    """Return a sentence if the file names possible code, or nothing if its bytes are no pickle of torch's."""
    text = str(error)
    if text.startswith("its .metadata"):  # a whole sentence
        return text
    named = re.search(r"GLOBAL (\S{1,100})", text)
    if named is not None and named[1].startswith("numpy."):
        return (
            f"it holds arrays or other values of numpy ({named[1]}), and to load those could run code; if you trust "
            "whoever made it, load it with torch.load(..., weights_only=False), make tensors of them and save it again"
        )
    known = re.search(r"(Trying to (?:call|load|instantiate)|Can only build|it holds a) .*", text)
    if named is None and known is None:
        return ""
    reason = f"it names {named[1]}" if named is not None else known[0][:200].rstrip(".") if known else ""
    return f"it holds more than tensors and plain values, and to load that could run any code ({reason}); {_TRUSTED}"


def _refusal(path: Path, expected: str, error: Exception) -> CommandError:
    """Return why a file could not be read, what it is, and what to do."""
    try:
        got, advice = _instead(path)
    except OSError as refused:
        return CommandError(f"{path}: it cannot be read: {refused.strerror}")
    if got != expected:
        return CommandError(f"{path}: expected {expected}, got {got}; {advice}")
    if "allocate memory" in str(error):
        return CommandError(f"{path}: it asks for more memory than there is ({_said(error)})")
    if isinstance(error, pickle.UnpicklingError):
        if sentence := _more_than_values(error):
            return CommandError(f"{path}: {sentence}")
        if "Unsupported operand" in str(error):
            return CommandError(
                f"{path}: expected what torch.save pickles by default, got what torch.load(weights_only=True) does not "
                f"read ({first_line(error)}), as with another pickle_protocol; {_TRUSTED}"
            )
    return CommandError(
        f"{path}: this is {got}, but it cannot be read ({_said(error)}): it is damaged or cut short; {_COPY}"
    )


def _instead(path: Path) -> tuple[str, str]:
    """Return what a file is, judged by its bytes, and what to do with it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if not size:
        return "an empty file", _COPY
    if not head.strip(b"\0"):
        return "zeros, as a crash leaves where nothing was written yet", "take an earlier checkpoint"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, which stands for the file", "fetch the file itself with git lfs pull"
    for magic, packer in _PACKED.items():
        if head.startswith(magic):
            return f"a file packed by {packer}", "unpack it first"
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _archive(path)
    if _TORCH_MAGIC in head[:32]:
        return _SAVED_BY_TORCH, _NAME_IT
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it and give the file that is in it"
    if head.startswith(b"\x93NUMPY"):
        return "an array of numpy", _CHECK
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:  # which is their limit
        return "a file of safetensors", "give it a name that ends in .safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a pickle that torch.save did not write", (
            "if you trust whoever made it, load it with pickle.load and save it again with torch.save"
        )
    if path.name.endswith(".index.json"):
        return "the index of a checkpoint's files", "give the folder that they are in"
    if (text := _text(head)) is not None:
        return f"text ({text[:40]!r}{'...' if len(text) > 40 else ''})", _CHECK
    return (
        f"unknown bytes ({head[:8].hex(' ')}{' ...' if size > 8 else ''})",
        _CHECK,
    )


def _archive(path: Path) -> tuple[str, str]:
    """Return what a zip archive is: torch.save, TorchScript, numpy and others write such files."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises many kinds of errors for a damaged archive
        return "a zip archive, as torch.save writes, that is damaged or cut short", _COPY
    if any(name.endswith("/constants.pkl") for name in names):
        return "a program of TorchScript", "save state dicts: torch.save(model.state_dict(), path)"
    if any(name.endswith("/data.pkl") for name in names):
        return _SAVED_BY_TORCH, _NAME_IT
    listed = ", ".join(each[:40] for each in names[:3]) + ("..." if len(names) > 3 else "")
    kind = "arrays of numpy" if names and all(name.endswith(".npy") for name in names) else "a zip archive"
    return f"{kind} ({listed or 'with nothing in it'})", _CHECK


def _text(head: bytes) -> str | None:
    """Return the first bytes as text, or None if they are not text."""
    for encoding in ("utf-16",) if head.startswith((b"\xff\xfe", b"\xfe\xff")) else ("utf-8-sig",):
        text = head.decode(encoding, errors="ignore").strip()
        whole = len(text.encode(encoding)) > 0.9 * len(head.strip())
        if text and whole and all(each.isprintable() or each.isspace() for each in text):
            return text
    return None

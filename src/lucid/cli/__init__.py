"""The command ``lucid``: which engines run, how fast, in how much memory, and what a checkpoint holds.

Exit status: 0 if everything is fine, 1 if the answer is no (problems in a checkpoint, nothing fits, an engine is
missing), 2 if the command could not answer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .error import CommandError

_EXTRA = {"typer", "rich", "tqdm", "matplotlib", "safetensors"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    try:
        from .app import app

        app(args=None if arguments is None else list(arguments), prog_name="lucid")
    except SystemExit as end:  # typer ends this way
        return end.code if isinstance(end.code, int) else 0
    except CommandError as refusal:
        from .output import printable

        print(f"lucid: {printable(str(refusal))}", file=sys.stderr)
        return 2
    except (OSError, MemoryError, RecursionError) as error:  # of a disk, a pipe or a terminal; of too much data
        print(f"lucid: {type(error).__name__}{f': {error}' if str(error) else ''}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _EXTRA:
            raise
        print(f"lucid: the command needs {name}: pip install 'lucid-optim[cli]'", file=sys.stderr)
        return 2
    return 0

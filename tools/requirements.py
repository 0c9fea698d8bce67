"""Print the requirements of a dependency group of pyproject.toml, of the package itself and its extras, for pip.

pip 23, which Debian and pyenv ship with Python 3.11, does not know ``--group`` yet. Standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent


def group(groups: dict[str, list[str | dict[str, str]]], name: str) -> list[str]:
    found: list[str] = []
    for item in groups[name]:
        found += [item] if isinstance(item, str) else group(groups, item["include-group"])
    return found


def missing() -> str | None:
    """What this machine lacks to build the package, and how to get it."""
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers are missing: apt-get install python3-dev"
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "a C++ compiler is missing: apt-get install g++"
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        return "Python's venv module is missing: apt-get install python3-venv"
    return None


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever runs this may have an older one
        print(
            f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.11",
            file=sys.stderr,
        )
        return 1
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", nargs="?")
    parser.add_argument("--check", action="store_true", help="say what the machine lacks")
    arguments = parser.parse_args()
    if arguments.check and (lack := missing()):
        print(lack, file=sys.stderr)
        return 1
    if arguments.group:
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        wanted = project["project"]["dependencies"]
        extras = [item for extra in project["project"]["optional-dependencies"].values() for item in extra]
        print("\n".join(wanted + extras + group(project["dependency-groups"], arguments.group)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Write src/lucid/engine/_cpu.pyi, the types of the CPU engine's extension, from the installed extension itself."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

from nanobind.stubgen import StubGen

ROOT = Path(__file__).parent.parent
STUB = ROOT / "src" / "lucid" / "engine" / "_cpu.pyi"


def generated() -> str:
    """Return what nanobind makes of the bindings, formatted as everything else is."""
    module = importlib.import_module("lucid.engine._cpu")
    stub = StubGen(module, quiet=True)
    stub.put(module)
    text = stub.get()
    for command in (["check", "--fix-only", "--quiet"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(STUB), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the file is another")
    if parser.parse_args().check:
        if STUB.read_text() == generated():
            return 0
        print(f"{STUB.relative_to(ROOT)} is not what the bindings say; `make stubs` writes it anew", file=sys.stderr)
        return 1
    STUB.write_text(generated())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Run the tests in two tiers: first, on two workers, what one thread runs; then, alone, what needs both cores.

Options that this does not know go to pytest, in both tiers. Both run, whatever the first finds; the last lines are the
closing lines of both, and the exit status is 0 where both passed. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

ALONE = "serial or distributed"  # the marks of the second tier
NOTHING_COLLECTED = 5  # pytest's exit status; no failure where the other tier has the tests that were asked for


def run(arguments: list[str]) -> tuple[int, str]:
    """Return pytest's exit status and its closing line; pass on what it says."""
    color = ["--color=yes"] if sys.stdout.isatty() else []
    said = b""
    with subprocess.Popen([sys.executable, "-m", "pytest", *color, *arguments], stdout=subprocess.PIPE) as pytest:
        assert pytest.stdout is not None
        while chunk := os.read(pytest.stdout.fileno(), 1 << 16):
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
            said = (said + chunk)[-4096:]
    return pytest.returncode, (said.decode(errors="replace").splitlines() or [""])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--workers", type=int, default=2, help="processes of the first tier (2)")
    options, others = parser.parse_known_args()
    parallel = ["-n", str(options.workers), "--dist", "worksteal", "-m", f"not ({ALONE})"]
    tiers = {"in parallel": run([*others, *parallel]), "serially": run([*others, "-m", ALONE])}
    print()
    for name, (status, closing) in tiers.items():
        print(f"{name}: {closing}" + (f" (exit status {status})" if status else ""))
    statuses = {status for status, _ in tiers.values()}
    if statuses == {0, NOTHING_COLLECTED}:
        return 0
    return max(statuses)


if __name__ == "__main__":
    raise SystemExit(main())

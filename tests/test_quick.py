"""Guards that a quick run (`make check`) leaves out cases, not kinds: every value of every parameter is in it."""

import json
import subprocess
import sys
import typing
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from lucid.cli.app import app
from lucid.engine.formats import StateFormatName

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LEFT_OUT = {Path(__file__).name, "test_cuda_compiled.py"}  # this one collects all tests, that one compiles all kernels
COLLECT = """
import json, sys
import pytest

class Recorder:
    def __init__(self):
        self.items = {"left out": [], "chosen": []}

    def pytest_deselected(self, items):
        self.items["left out"] += items

    def pytest_collection_finish(self, session):
        self.items["chosen"] += session.items

def told(item):
    values = item.callspec.params if hasattr(item, "callspec") else {}
    slow = item.get_closest_marker("slow") is not None
    return item.nodeid, slow, {name: repr(value) for name, value in values.items()}

recorder = Recorder()
status = pytest.main(["--quick", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"], plugins=[recorder])
with open(sys.argv[1], "w") as file:
    json.dump({name: [told(item) for item in items] for name, items in recorder.items.items()}, file)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """The cases that a quick run leaves out and those that it chooses: [node id, whether it is slow, its values]."""
    path = tmp_path_factory.mktemp("collected") / "items.json"
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, path], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(path.read_text())


def by_function(cases):
    """The values that occur of each function's parameters: {(function, parameter): values}."""
    found = defaultdict(set)
    for node, _, values in cases:
        function = node.partition("[")[0]
        found[function, ""].add("")
        for name, value in values.items():
            found[function, name].add(value)
    return found


def test_every_value_of_every_parameter_is_there(collected):
    chosen = by_function(collected["chosen"])
    ordinary = by_function(case for case in collected["left out"] if not case[1])
    assert len(collected["left out"]) > len(collected["chosen"])
    assert not [(*key, missing) for key, values in ordinary.items() if (missing := values - chosen[key])]


def test_nothing_that_is_slow_is_in_it(collected):
    assert not [node for node, slow, _ in collected["chosen"] if slow]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("engine_name", ["cpu", "cuda", "reference"]),
        ("state_format", typing.get_args(StateFormatName)),
        ("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128]),
        ("world", [1, 2, 3, 4]),
    ],
)
def test_every_engine_format_type_and_number_of_processes_is_in_it(name, wanted, collected):
    found = {values[name] for _, _, values in collected["chosen"] if name in values}
    assert {repr(value) for value in wanted} <= found


@pytest.mark.parametrize(
    ("function", "parameter", "at_least"),
    [
        ("test_atomic.py::test_a_bad_gradient_or_parameter", "kind", 10),
        ("test_atomic.py::test_bad_state", "kind", 20),
        ("test_interface.py::test_bad_hyperparameters_are_named_and_change_nothing", None, 20),
        ("test_cli.py::test_a_bad_question_is_answered_with_a_sentence", None, 20),
        ("test_cli_checkpoints.py::test_what_cannot_be_read_is_refused_with_a_sentence", None, 20),
        ("test_pages.py::test_the_code_of_a_page_runs", "page", 8),
    ],
)
def test_every_bad_kind_and_page_is_in_it(function, parameter, at_least, collected):
    """By the test above if these functions are in it at all, with what they are for."""
    cases = [values for node, _, values in collected["chosen"] if node.partition("[")[0] == f"tests/{function}"]
    assert len({case[parameter] for case in cases} if parameter else cases) >= at_least


def test_every_file_and_command_is_in_it(collected):
    chosen = [node.lower() for node, _, _ in collected["chosen"]]
    files = {path.name for path in (ROOT / "tests").glob("test_*.py")} - LEFT_OUT
    assert files <= {Path(node.partition("::")[0]).name for node in chosen}
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert any("test_cli" in node and name in node for node in chosen), name

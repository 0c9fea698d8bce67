"""What every test has: one thread, torch's settings as they were, kernels of Triton interpreted; markers of tiers."""

import gc
import os
import signal
from pathlib import Path

# Read when Triton is imported, here and in children: its kernels run on the CPU. tests/gpu has them compiled.
os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # others share the cores; read when torch is imported, here and in children
    os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

# Modules that several test files share: their assertions tell as much as a test's own.
SHARED = [path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith(("conftest", "test_"))]
pytest.register_assert_rewrite(*SHARED)

import quick  # noqa: E402
from capturing import capturing  # noqa: E402, F401
from interpreter import quicken  # noqa: E402
from launchers import device  # noqa: E402, F401
from ranks import ranks  # noqa: E402, F401

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background, whose Ctrl-C is not meant for it
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = [] if torch.cuda.is_available() else ["gpu"]  # make test-gpu


SLOW = {"compiled", "wheel"}  # fixtures that compile all kernels, the extension


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="few cases of each test, and none of the slow ones")


def pytest_configure(config):
    if config.getoption("quick"):
        hypothesis.settings.load_profile("quick")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "ranks" in fixtures:
            item.add_marker(pytest.mark.distributed)
        if not SLOW.isdisjoint(fixtures):
            item.add_marker(pytest.mark.slow)
    if config.getoption("quick"):
        chosen = quick.select(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen


def pytest_collection_finish():
    """Spare the garbage collector what imports have made: it takes longer than most tests, above all in forked ones."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True)
def torch_settings(request):
    """One thread, since several wait for each other where the machine is busy; tests of threads set their number."""
    threads = torch.get_num_threads()
    if not request.node.get_closest_marker("serial"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(params=["cpu", "cuda", "reference"])
def engine_name(request):
    return request.param


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    if os.environ["TRITON_INTERPRET"] == "1":
        quicken()

"""Guards the processes that other tests run in: what the crash of one says, and when a function runs again."""

import ctypes
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from ranks import crashed_in_torch, stack_of_crash


def crash_in_torch(marks, times):
    """Run a function of gloo's with null for its object, in a thread that Python does not know."""
    made = len(list(marks.iterdir()))
    distributed.barrier()
    if distributed.get_rank() == 1 and made < times:
        (marks / str(made)).touch()
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
        run = ctypes.cast(library._ZN4gloo9transport3tcp4Loop3runEv, ctypes.c_void_p)
        ctypes.CDLL(None).pthread_create(ctypes.byref(ctypes.c_ulong()), None, run, None)
        time.sleep(60)
    distributed.barrier()
    return distributed.get_rank()


def crash_in_python(marks):
    if distributed.get_rank() == 1:
        (marks / str(len(list(marks.iterdir())))).touch()
        ctypes.string_at(0)
    distributed.barrier()


def hang():
    signal.alarm(1)  # as the limit of each function, but sooner
    threading.Event().wait()


def test_torchs_own_crash_runs_again(ranks, tmp_path):
    with pytest.warns(UserWarning, match=r"(?s)ran again: rank .*gloo::transport::tcp::Loop::run.*Segmentation fault"):
        assert ranks.run(2, crash_in_torch, tmp_path, 1) == [0, 1]


def test_but_once(ranks, tmp_path):
    with pytest.warns(UserWarning, match="ran again"), pytest.raises(AssertionError, match="Segmentation fault"):
        ranks.run(2, crash_in_torch, tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 2


def test_any_other_crash_fails(ranks, tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)Segmentation fault.*in string_at.*in crash_in_python"):
        ranks.run(2, crash_in_python, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_hangs_says_where(ranks):
    with pytest.raises(AssertionError, match=r"(?s)rank 0 ended or hangs:.*in hang.*rank 1 ended or hangs:.*in hang"):
        ranks.run(2, hang)


@pytest.mark.parametrize("ours", ["lucid/engine/_cpu.cpython-311-x86_64-linux-gnu.so", "triton/_C/libtriton.so"])
def test_our_engines_crash_fails(ours):
    said = (
        "others, {}\n\nframe #1: c10::FatalSignalHandler::fatalSignalHandler()\nframe #3: libtorch_cpu.so\n{}\n\nothers"
    )
    assert crashed_in_torch(stack_of_crash(said.format(ours, "")))
    assert not crashed_in_torch(stack_of_crash(said.format("", ours)))
    assert not crashed_in_torch(stack_of_crash(ours))

"""Processes to test with: started once, each test's function run in as many of them as it wants."""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest

from interpreter import quicken

MOST = 4
LIMIT = 90  # seconds that one function may take


def _serve(rank, connection, log):
    """Run what comes, until nothing does."""
    sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    quicken()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of views, which nobody here writes to
    while True:
        task = connection.recv()
        if task is None:
            return
        function, arguments, world, store = task
        _watch()
        signal.alarm(LIMIT)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=LIMIT // 3),
            )
            try:
                answer = (True, function(*arguments))
                dist.barrier()  # a group that ends here may still be connecting there
            finally:
                dist.destroy_process_group()
        except BaseException:
            answer = (False, traceback.format_exc())
        signal.alarm(0)
        connection.send_bytes(pickle.dumps(answer))  # torch's own pickling starts a thread that blocks signals


def stack_of_crash(said):
    """Return the stack of C++ of the thread that ended a process, out of all that the process has said."""
    _, found, stack = said.partition("FatalSignalHandler::fatalSignalHandler")
    return found + stack.partition("\n\n")[0]


def crashed_in_torch(stack):
    """Whether a thread of C++ alone ended its process, with torch in its stack, and neither our engine nor Triton."""
    return "libtorch" in stack and not any(part in stack for part in ("/_cpu.", "triton", "python frames"))


def _watch():
    """Let this process say where its threads are when it crashes or an alarm ends it, those of C++ alone included.

    Frameworks leave signals as they were to Python, without these handlers, so each function has them set anew.
    """
    from torch._C import _set_print_stack_traces_on_fatal_signal as print_stacks_of_all_threads

    print_stacks_of_all_threads(False)
    faulthandler.disable()
    faulthandler.unregister(signal.SIGALRM)
    faulthandler.enable(sys.stderr)
    faulthandler.register(signal.SIGALRM, sys.stderr, chain=True)
    print_stacks_of_all_threads(True)


class Ranks:
    """Processes of a group, to run functions of test modules in."""

    def __init__(self, folder):
        self._folder = folder
        self._tasks = 0
        self._context = multiprocessing.get_context("spawn")
        self._processes = {}

    def _start(self, rank):
        ours, theirs = self._context.Pipe()
        log = self._folder / f"rank{rank}.log"
        process = self._context.Process(target=_serve, args=(rank, theirs, log), daemon=True)
        process.start()
        theirs.close()
        self._processes[rank] = (process, ours, log)

    def run(self, world, function, *arguments):
        """Return what `function(*arguments)` returns on each of `world` ranks; raise where one raises or hangs.

        Where a thread of torch's own crashes, it runs again, once, and a warning shows the stack. One did in CI, in one
        of some thousand functions; neither sanitizers nor valgrind find a fault of ours behind it.
        """
        try:
            return self._run(world, function, arguments)
        except AssertionError as failure:
            if not crashed_in_torch(stack_of_crash(str(failure))):
                raise
            warnings.warn(f"a thread of torch's own crashed, so it ran again: {failure}", stacklevel=2)
        return self._run(world, function, arguments)

    def _run(self, world, function, arguments):
        for rank in range(world):
            if rank not in self._processes:
                self._start(rank)
        self._tasks += 1
        store = self._folder / f"store{self._tasks}"
        for rank in range(world):
            self._processes[rank][1].send((function, arguments, world, store))
        answers, failures = [], []
        until = time.monotonic() + 1.5 * LIMIT
        for rank in range(world):
            _, connection, log = self._processes[rank]
            try:
                if not connection.poll(max(0.0, until - time.monotonic())):
                    raise EOFError
                done, answer = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionError):
                said = Path(log).read_text()
                failures.append(f"rank {rank} ended or hangs:\n{stack_of_crash(said)}\n\n{said[-6000:]}")
                continue
            answers.append(answer)
            if not done:
                failures.append(f"rank {rank}:\n{answer}")
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return answers

    def stop(self):
        """End all processes."""
        for process, connection, _ in self._processes.values():
            with contextlib.suppress(OSError):
                connection.send(None)
            process.join(0.1 if process.exitcode is None else 0)
            if process.exitcode is None:
                process.terminate()
                process.join()
        self._processes = {}


@pytest.fixture(scope="session")
def ranks():
    """The processes of this session."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        all_ranks = Ranks(Path(folder))
        yield all_ranks
        all_ranks.stop()

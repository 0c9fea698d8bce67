"""Guards which threads run a step: torch's OpenMP team where that is safe, our own pool everywhere else.

Always the same bits, and no process hangs: after a fork, with more threads than cores, in teams that are smaller than
asked for, inside parallel regions, beside other OpenMP runtimes. Nothing here is timed. What may hang runs in a child
that is killed and shows its stack.
"""

import os
import subprocess
import sys
import sysconfig
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bits import World, assert_same, in_child, on, results
from lucid import engine
from lucid.engine import native, threads

pytestmark = pytest.mark.serial  # threads want cores of their own, and torch's own number of them

LARGE = [(300_001,), (3,), (100_000, 2)]  # some batches of the usual size
LINUX = sys.platform == "linux"
FORMATS = {"float32": {}, "8-bit": {"state_format": "8bit"}}


@pytest.fixture(scope="module")
def wanted():
    """What the reference engine makes of four steps, by format."""
    with on("reference"):
        return {name: results(World(shapes=LARGE, **kinds).run(4).optimizer) for name, kinds in FORMATS.items()}


def run_python(script, seconds=90, **environment):
    """Run `script` in a new Python, with `wanted(steps)` and what it needs at hand; return what it printed."""
    beginning = f"""
        import faulthandler, os, sys
        faulthandler.dump_traceback_later({seconds * 0.8})
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        LARGE = {LARGE!r}
        def tasks():
            return len(os.listdir("/proc/self/task"))
        def right(world):
            from bits import World, assert_same, on, results
            with on("reference"):
                assert_same(results(world.optimizer), results(World(shapes=LARGE).run(world.done).optimizer))
    """
    code = textwrap.dedent(beginning) + textwrap.dedent(script)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_", "LOCAL_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# Which threads


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="/proc is Linux's")
def test_a_step_after_torchs_kernels_starts_no_threads():
    script = """
        import torch
        from bits import World
        from lucid.engine import cpu
        torch.set_num_threads(3)
        torch.ones(1 << 20).add_(1)
        world = World(shapes=LARGE)
        world.set_gradients()
        before = tasks()
        world.step()
        print(cpu.team()[0], tasks() - before)
        with cpu.forced_team("pool"):
            world.step()
            print(cpu.team()[0], tasks() - before)
        world.run(2)
        right(world)
    """
    assert run_python(script) == ["torch", "0", "pool", "2"]


def test_the_team_is_found_and_told():
    assert engine.cpu.teams() == ["pool", "torch"]
    name, library = engine.cpu.team()
    assert name == "torch"
    assert Path(library).exists()
    with engine.cpu.forced_team("pool"):
        assert engine.cpu.team() == ("pool", "it was asked for")
    assert engine.cpu.team()[0] == "torch"
    with pytest.raises(ValueError, match="team 'tbb': expected 'torch' or 'pool'"), engine.cpu.forced_team("tbb"):
        pass


def test_a_thread_other_than_the_main_one_uses_the_pool():
    """Its team would spin beside the main thread's and slow torch's kernels there."""
    with ThreadPoolExecutor(1) as executor:
        name, why = executor.submit(engine.cpu.team).result()
    assert name == "pool"
    assert "main thread" in why


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torch's", "none"])
def test_a_library_that_torchs_number_does_not_follow_is_not_used(library):
    """As with an OpenMP linked statically or under other names: another one may be found, and is not torch's."""
    path = "torch._C.__file__" if library == "torch's" else "'/nowhere'"
    script = f"""
        import torch
        from bits import World
        from lucid.engine import cpu, native
        before = torch.get_num_threads()
        native._cpu.find_team({path}, lambda: before, False)
        assert torch.get_num_threads() == before
        assert cpu.teams() == ["pool"], cpu.teams()
        print(cpu.team()[1])
        torch.set_num_threads(2)
        right(World(shapes=LARGE).run(4))
    """
    assert "follows" in run_python(script)


# The same bits


@pytest.mark.parametrize("batch", [1000, 1 << 16])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("team", ["pool", "torch"])
@pytest.mark.parametrize("kind", FORMATS)
def test_teams_and_numbers_of_threads_give_the_references_bits(kind, team, count, batch, wanted):
    torch.set_num_threads(count)
    with engine.cpu.forced_team(team), engine.cpu.forced_batch_elements(batch):
        assert_same(results(World(shapes=LARGE, **FORMATS[kind]).run(4).optimizer), wanted[kind])


@pytest.mark.parametrize("team", ["pool", "torch"])
def test_the_number_of_threads_changes_between_steps(team, wanted):
    world = World(shapes=LARGE)
    with engine.cpu.forced_team(team):
        for count in (2, 1, 8, 3):
            torch.set_num_threads(count)
            torch.ones(1 << 18).add_(1)
            world.step()
    assert_same(results(world.optimizer), wanted["float32"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "8"},
        {"OMP_THREAD_LIMIT": "1"},
        {"OMP_THREAD_LIMIT": "2", "OMP_NUM_THREADS": "4"},
        {"OMP_DYNAMIC": "true", "OMP_NUM_THREADS": "8"},
        {"OMP_MAX_ACTIVE_LEVELS": "3"},
        {"OMP_PROC_BIND": "true"},
        {"OMP_WAIT_POLICY": "passive"},
    ],
    ids=lambda environment: " ".join(f"{key}={value}" for key, value in environment.items()),
)
def test_openmps_own_settings(environment):
    """Teams that are smaller than asked for, among others."""
    script = """
        import torch
        from bits import World
        from lucid.engine import cpu
        print(cpu.team()[0])
        world = World(shapes=LARGE).run(2)
        torch.ones(1 << 20).add_(1)
        right(world.run(2))
    """
    assert run_python(script, **environment) == ["torch"]


def test_batches_keep_subnormals_in_threads_that_flush_them_and_still_do_afterwards():
    script = """
        import torch
        import lucid.optim as optim
        torch.set_num_threads(4)
        assert torch.set_flush_denormal(True)
        tiny = torch.full((1 << 18,), torch.finfo(torch.float32).tiny)  # a team whose threads flush: it inherits that
        assert (tiny.mul(0.5) == 0).all()
        param = torch.nn.Parameter(torch.zeros(1 << 18))
        param.grad = tiny
        optimizer = optim.AdamW([param], betas=(0.5, 0.5))
        for _ in range(3):
            optimizer.step()
        assert (tiny.mul(0.5) == 0).all()
        average = optimizer.state[param]["exp_avg"].view(torch.int32)  # halves and quarters of a smallest normal number
        print(bool((average > 0).all()), bool((average == average[0]).all()))
    """
    assert run_python(script) == ["True", "True"]


# Forks


def step_on(count, world, steps):
    """Step on `count` threads; all else on one, since torch's own kernels would hang in a forked child."""
    for _ in range(steps):
        torch.set_num_threads(1)
        world.set_gradients()
        torch.set_num_threads(count)
        world.optimizer.step()
        torch.set_num_threads(1)
        world.done += 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("before", [0, 2])
def test_a_forked_child_uses_the_pool(before, count, wanted):
    """Before the parent's first step and after; torch's kernels have run in the team."""
    torch.set_num_threads(count)
    torch.ones(1 << 20).add_(1)
    world = World(shapes=LARGE)
    step_on(count, world, before)

    def act():
        name, why = engine.cpu.team()
        assert name == "pool"
        assert "forked" in why
        step_on(count, world, 4 - before)
        assert_same(results(world.optimizer), wanted["float32"])

    in_child(act)
    assert engine.cpu.team()[0] == "torch"
    step_on(count, world, 4 - before)
    assert_same(results(world.optimizer), wanted["float32"])


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="/proc is Linux's")
@pytest.mark.parametrize("team_has_run", [True, False])
def test_a_child_that_imports_lucid_itself(team_has_run):
    """Its parent's team hangs as well, and the extension has not seen the fork."""
    script = f"""
        import torch
        torch.set_num_threads(2)
        if {team_has_run}:
            torch.ones(1 << 20).add_(1)
        faulthandler.cancel_dump_traceback_later()  # a fork would inherit its lock and not its thread
        child = os.fork()
        faulthandler.dump_traceback_later(30, exit=True)
        if child == 0:
            torch.set_num_threads(1)
            from bits import World
            from lucid.engine import cpu
            world = World(shapes=LARGE)
            for _ in range(2):
                world.set_gradients()
                torch.set_num_threads(2)
                world.optimizer.step()
                torch.set_num_threads(1)
                world.done += 1
            right(world)
            print(*cpu.team(), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    """
    assert run_python(script)[0] == "pool"


# Other threads and regions


def test_a_step_in_a_hook_of_backward(wanted):
    torch.set_num_threads(2)
    world = World(shapes=LARGE)

    def loss():
        gradients = [world.draw(1000 + 100 * world.done + k, p.shape) for k, p in enumerate(world.params)]
        return sum((p * g).sum() for p, g in zip(world.params, gradients, strict=True))

    for _ in range(4):
        world.optimizer.zero_grad()
        arrived = []

        def hook(param, arrived=arrived):
            arrived.append(param)
            if len(arrived) == len(world.params):
                world.optimizer.step()

        handles = [param.register_post_accumulate_grad_hook(hook) for param in world.params]
        loss().backward()
        for handle in handles:
            handle.remove()
        world.done += 1
    assert_same(results(world.optimizer), wanted["float32"])


@pytest.mark.parametrize("count", [2, 4])
def test_two_optimizers_in_two_threads_one_of_them_the_main_one(count, wanted):
    torch.set_num_threads(count)
    worlds = [World(shapes=LARGE) for _ in range(2)]
    other = threading.Thread(target=worlds[1].run, args=(4,))
    other.start()
    worlds[0].run(4)
    other.join(60)
    assert not other.is_alive()
    for world in worlds:
        assert_same(results(world.optimizer), wanted["float32"])


@pytest.mark.slow
@pytest.mark.parametrize("levels", [1, 2])
def test_steps_inside_a_parallel_region(levels):
    """Each thread of a team steps an optimizer of its own; with two levels each has a team of its own inside."""
    script = f"""
        import ctypes, torch
        from bits import World
        from lucid.engine import cpu
        torch.set_num_threads(2)
        gomp = ctypes.CDLL(cpu.team()[1])
        gomp.omp_set_max_active_levels({levels})
        worlds = [World(shapes=LARGE) for _ in range(2)]
        done = []
        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def region(_):
            world = worlds[gomp.omp_get_thread_num()]
            world.run(3)
            done.append(world)
        gomp.GOMP_parallel(region, None, 2, 0)
        assert len(done) == 2
        for world in worlds:
            right(world.run(1))
        print("done")
    """
    assert run_python(script) == ["done"]


# Other OpenMP runtimes


def other_libgomp():
    found = sorted(Path(sysconfig.get_paths()["purelib"]).glob("scikit_learn.libs/libgomp*"))
    assert found, "scikit-learn brings an OpenMP library of its own"
    return str(found[0])


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="the other library is Linux's")
@pytest.mark.parametrize("how", ["before", "after", "before, global", "after, global", "preloaded"])
def test_another_openmp_runtime_in_the_process(how):
    """It is torch's where it was preloaded, or loaded first for all to see; else it is let alone."""
    other = other_libgomp()
    mode = "RTLD_GLOBAL" if "global" in how else "RTLD_LOCAL"
    load = f"import ctypes; other = ctypes.CDLL({other!r}, ctypes.{mode})"
    script = f"""
        {load if how.startswith("before") else ""}
        import torch
        {load if not how.startswith("before") else ""}
        torch.set_num_threads(3)
        from bits import World
        from lucid.engine import cpu
        torch.ones(1 << 20).add_(1)
        world = World(shapes=LARGE)
        world.set_gradients()
        before = tasks()
        world.step()
        assert tasks() == before
        right(world.run(3))
        is_torchs = other.omp_get_max_threads() == 3
        print(cpu.team()[0], is_torchs == (cpu.team()[1] == {other!r}))
    """
    assert run_python(script, **({"LD_PRELOAD": other} if how == "preloaded" else {})) == ["torch", "True"]


# The budget


def system(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def cgroups(folder, files):
    threads.cpus.cache_clear()
    return threads.cpus(system(folder, files))[1:]


def test_limits_of_cgroups(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    group = "sys/fs/cgroup/pods/one/"
    assert cgroups(tmp_path / "none", {}) == (64, float("inf"))
    two = {"proc/self/cgroup": "0::/pods/one\n"}
    assert cgroups(tmp_path / "a", two | {group + "cpu.max": "max 100000\n"}) == (64, float("inf"))
    assert cgroups(tmp_path / "b", two | {group + "cpu.max": "250000 100000\n"}) == (64, 2.5)
    outer = {"sys/fs/cgroup/pods/cpu.max": "100000 100000", group + "cpu.max": "400000 100000"}
    assert cgroups(tmp_path / "c", two | outer) == (64, 1)
    assert cgroups(tmp_path / "d", two | {group + "cpuset.cpus.effective": "0-3,8,10-11\n"}) == (7, float("inf"))
    one = {"proc/self/cgroup": "4:cpu,cpuacct:/job\n3:cpuset:/job\n1:name=systemd:/job\n"}
    one["sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us"] = "600000"
    one["sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us"] = "100000"
    one["sys/fs/cgroup/cpuset/job/cpuset.effective_cpus"] = "4-11"
    assert cgroups(tmp_path / "e", one) == (8, 6)
    one["sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us"] = "-1"
    assert cgroups(tmp_path / "f", one) == (8, float("inf"))
    threads.cpus.cache_clear()


@pytest.mark.parametrize(
    ("cpus", "ranks", "budget"),
    [
        ((8, 8, float("inf")), None, 8),
        ((8, 8, float("inf")), "8", 1),
        ((8, 8, float("inf")), "3", 2),
        ((8, 8, float("inf")), "16", 1),
        ((8, 64, float("inf")), "8", 8),  # each bound to eight of its own
        ((64, 64, 2.5), None, 2),
        ((64, 64, 0.5), None, 1),
        ((64, 64, 16.0), "4", 4),
        ((8, 8, float("inf")), "eight", 8),
    ],
)
def test_the_share_of_a_process(cpus, ranks, budget, monkeypatch):
    monkeypatch.setattr(threads, "cpus", lambda: cpus)
    for name in list(os.environ):
        if name.startswith(("OMP_", "MKL_", "LOCAL_")):
            monkeypatch.delenv(name)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert threads.budget() == budget
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert threads.budget() is None


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="/proc is Linux's")
@pytest.mark.parametrize(
    ("environment", "number", "helpers"),
    [
        ({}, None, 1),
        ({"LOCAL_WORLD_SIZE": "2"}, None, 0),
        ({"LOCAL_WORLD_SIZE": "2"}, 3, 2),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "2"}, None, 1),
    ],
)
def test_ranks_that_share_the_cores_use_their_share(environment, number, helpers):
    """What you set, in the environment or by torch.set_num_threads, holds."""
    script = f"""
        import torch
        from bits import World
        from lucid.engine import cpu, threads
        usable, in_group, quota = threads.cpus()
        threads.cpus = lambda: (2, 2, quota)
        torch_number = torch.get_num_threads()
        if {number} is not None:
            torch.set_num_threads({number})
        world = World(shapes=LARGE)
        world.set_gradients()
        with cpu.forced_team("pool"):
            before = tasks()
            world.step()
            assert cpu.step_threads() == tasks() - before + 1
            print(tasks() - before)
        right(world.run(3))
    """
    assert run_python(script, **environment) == [str(helpers)]


@pytest.mark.parametrize("team", ["pool", "torch"])
def test_a_share_smaller_than_the_team_gives_the_same_bits(team, wanted, monkeypatch):
    """Some threads of the team take no batches."""
    monkeypatch.setattr(threads, "budget", lambda: 2)
    monkeypatch.setattr(native, "_OWN_THREADS", 4)
    torch.set_num_threads(4)
    assert engine.cpu.step_threads() == 2
    try:
        with engine.cpu.forced_team(team), engine.cpu.forced_batch_elements(1000):
            assert_same(results(World(shapes=LARGE).run(4).optimizer), wanted["float32"])
    finally:
        monkeypatch.undo()
        native.set_thread_budget()

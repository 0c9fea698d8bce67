"""Guards benchmarks/offload.py, which is run on a GPU that is lent for minutes: it must work at the first try.

There is no GPU here. The whole script runs on tiny tensors of the CPU, and what it asks of a GPU is asked of a
pretended one, whose work is done when somebody waits for it.
"""

import contextlib
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from benchmarks import gpu, offload, report
from benchmarks.offload import BUS, IN_PLACE, LLAMA, OFFLOADED, PAGED, STAGED, Bench, Host, Result

from lucid.bench.contenders import EIGHT_BIT, LUCID, bus_copies
from lucid.engine import choice, only
from pinning import Pages, pretend_pinned

PAGE = Path(__file__).parents[1] / "benchmarks" / "RESULTS-gpu.md"
CPU = torch.device("cpu")


@pytest.fixture
def both_ways(monkeypatch):
    """What was chosen, in order; on the CPU both ways are the CPU engine."""
    chosen = []
    monkeypatch.setattr(offload, "choose", chosen.append)
    return chosen


@pytest.fixture
def without_libraries(monkeypatch):
    monkeypatch.setattr(offload, "is_installed", lambda library: False)


def bench(**changes):
    bus = (lambda: None, 4096)
    return Bench(**{"device": CPU, "dry": True, "count": 2, "until": time.perf_counter() + 60, "bus": bus} | changes)


def test_the_whole_script_runs(both_ways, without_libraries, capsys):
    assert offload.main(["--dry", "--rounds", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for case, name, names in offload.CASES:
        assert f"{case}, {name}: the bus" in said
        for each in names:
            assert (f"{case}, {name}: {each} " in said) == (each in offload.OWN)
    assert "A dry run on the CPU" in said
    assert f"{OFFLOADED} was not measured (llama-1b, lucid;" in said
    assert "torchao is not installed" in said
    assert "bitsandbytes is not installed" in said
    assert set(offload.OWN) == set(both_ways)


def test_what_has_no_time_or_fails_is_named(both_ways, without_libraries, monkeypatch):
    late = offload.measure(bench(until=0), LLAMA, offload.KINDS[LUCID], [IN_PLACE, STAGED])
    assert late.failures == dict.fromkeys([IN_PLACE, STAGED], "no time was left")
    assert late.samples == {}

    def refuse(way):
        if way == STAGED:
            raise RuntimeError("no pinned memory\nmore of it")

    monkeypatch.setattr(offload, "choose", refuse)
    found = offload.measure(bench(), LLAMA, offload.KINDS[LUCID], [STAGED, IN_PLACE, PAGED])
    assert list(found.samples) == [BUS, IN_PLACE]
    assert found.failures[STAGED] == "RuntimeError: no pinned memory"
    assert list(found.host) == [IN_PLACE]


def test_the_bytes_over_the_bus_are_those_of_the_state(both_ways):
    found = offload.measure(bench(), LLAMA, offload.KINDS[EIGHT_BIT], [IN_PLACE])
    shapes = bench().shapes(LLAMA)
    codes = sum(2 * 64 * 64 + 8 * 64 for shape in shapes if len(shape) == 2)  # a block is at most 128 elements of a row
    assert found.moved == {BUS: 4096, IN_PLACE: codes + sum(8 * 64 for shape in shapes if len(shape) == 1)}


def result(name, seconds, *, bus=1.0, waited=False, moved=0):
    samples = {BUS: [bus, bus], IN_PLACE: [seconds, seconds]}
    return Result(LLAMA, name, samples, {BUS: 100, IN_PLACE: moved}, host={IN_PLACE: Host(0.001, waited)})


@pytest.mark.parametrize(("seconds", "moved", "met"), [(0.079, 8, True), (0.081, 8, False), (0.079, 6, False)])
def test_targets_of_the_8_bit_step(seconds, moved, met):
    """With a bus that moves 100 bytes in a second, 0.85 of it are 6.715 bytes in 0.079 seconds."""
    times, part, host = offload.targets([result(EIGHT_BIT, seconds, moved=moved)])
    assert (times.met and part.met) == met
    assert host.met
    assert times.wanted == "≤ 80 ms"
    assert part.measured == f"{moved / 100 / seconds:.3g}"


def test_a_host_that_waits_and_a_step_that_is_not_there_miss_the_target():
    assert [target.met for target in offload.targets([result(LUCID, 0.25, moved=99, waited=True)])] == [
        True,
        True,
        False,
    ]
    assert [target.met for target in offload.targets([Result(LLAMA, LUCID)])] == [False]
    assert list(offload.targets([Result("gpt2-small", LUCID)])) == []


def test_torchaos_hooks_get_the_gradients_of_each_step(monkeypatch):
    """They copy in backward, which a step alone would not have."""
    got = []

    class CPUOffloadOptimizer:
        def __init__(self, params, **options):
            assert options == {"lr": offload.LR, "weight_decay": offload.WEIGHT_DECAY}
            for param in params:
                param.register_post_accumulate_grad_hook(lambda param: got.append(float(param.grad.sum())))

        def step(self):
            got.append("step")

    module = types.SimpleNamespace(CPUOffloadOptimizer=CPUOffloadOptimizer)
    monkeypatch.setitem(sys.modules, "torchao", types.SimpleNamespace(optim=module))
    monkeypatch.setitem(sys.modules, "torchao.optim", module)
    params = [torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
    for param in params:
        param.grad = torch.full_like(param, 7.0)
    step = offload._offloaded(params)
    for _ in range(2):
        step()
    assert got[2::3] == ["step", "step"]
    assert sorted(each for each in got if each != "step") == [21.0, 21.0, 28.0, 28.0]


def test_a_step_in_place_is_measured(monkeypatch):
    """By the CUDA engine, interpreted, in pretended pinned memory."""
    pages = Pages()
    pretend_pinned(monkeypatch, pages)
    monkeypatch.setattr(choice, "IN_PLACE", False)
    monkeypatch.setattr(offload, "SIZES", {LLAMA: [(64, 64), (7,)]})
    with only("cuda"):
        found = offload.measure(bench(), LLAMA, offload.KINDS[EIGHT_BIT], [IN_PLACE])
    assert found.failures == {}
    assert len(found.samples[IN_PLACE]) >= 1
    assert found.moved[IN_PLACE] == 2 * 64 * 64 + 8 * 64 + 8 * 7
    assert choice.IN_PLACE
    assert sum(pages.asked) >= found.moved[IN_PLACE]


# A pretended GPU


class Pretended:
    """Streams whose work is done when somebody waits for them, and a device that sleeps until then."""

    def __init__(self):
        self.log, self.asleep = [], False

    def new_stream(self, device):
        name = f"stream {len([each for each in self.log if each[0] == 'made'])}"
        self.log.append(("made", name))
        return types.SimpleNamespace(
            name=name, wait_stream=lambda other: self.log.append((name, "waits for", other.name))
        )

    def current_stream(self, device):
        return types.SimpleNamespace(
            name="current", wait_stream=lambda other: self.log.append(("current", "waits for", other.name))
        )

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append(("enter", stream.name))
        yield
        self.log.append(("leave", stream.name))

    def _sleep(self, cycles):
        self.asleep = True

    def synchronize(self, device=None):
        self.asleep = False

    def new_event(self):
        return types.SimpleNamespace(record=lambda: None, query=lambda: not self.asleep)


@pytest.fixture
def pretended(monkeypatch):
    found = Pretended()
    for name in ("current_stream", "stream", "_sleep", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    monkeypatch.setattr(torch.cuda, "Stream", found.new_stream)
    monkeypatch.setattr(torch.cuda, "Event", found.new_event)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return found


def test_a_host_that_waits_is_found(pretended):
    on_gpu = bench(dry=False)
    assert not on_gpu.host(lambda: None).waited
    assert on_gpu.host(pretended.synchronize).waited
    assert not pretended.asleep


def test_a_case_is_measured_on_a_gpu(pretended, both_ways, monkeypatch):
    monkeypatch.setattr(offload, "SIZES", {LLAMA: [(64, 64), (7,)]})
    found = offload.measure(bench(dry=False), LLAMA, offload.KINDS[EIGHT_BIT], [IN_PLACE, STAGED])
    assert {name: len(taken) for name, taken in found.samples.items()} == {BUS: 2, IN_PLACE: 2, STAGED: 2}
    assert not any(host.waited for host in found.host.values())
    assert list(offload.tables([found]))[1].rows[0][0] == f"{LLAMA}, {EIGHT_BIT}: {BUS}"


def test_the_bus_is_used_in_both_directions_at_once(pretended, monkeypatch):
    """Two streams, each after the work before it, and before the work after it."""
    empty, pinned = torch.empty, []

    def make(*size, pin_memory=False, **options):
        made = empty(*size, **options).fill_(pin_memory)
        if pin_memory:
            pinned.append(made)
        return made

    monkeypatch.setattr(torch, "empty", make)
    step = bus_copies(16, CPU)
    step()
    assert [int(each.sum()) for each in pinned] == [16, 0]  # the first was read, the second written
    entered = [each for each in pretended.log if each[0] in ("enter", "leave")]
    assert entered == [(what, f"stream {number}") for number in range(2) for what in ("enter", "leave")]
    waits = [each for each in pretended.log if "waits for" in each]
    assert waits == [(f"stream {number}", "waits for", "current") for number in range(2)] + [
        ("current", "waits for", f"stream {number}") for number in range(2)
    ]


# The page


def test_the_page_takes_both_reports():
    text = PAGE.read_text()
    once = report.spliced(text, "first", gpu.BEGIN)
    both = report.spliced(once, "second", offload.BEGIN)
    assert f"{gpu.BEGIN}\n\nfirst\n\n{report.END}" in both
    assert f"{offload.BEGIN}\n\nsecond\n\n{report.END}" in both
    assert both.count(report.END) == text.count(report.END) == 2


def test_a_dry_run_writes_no_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"{offload.BEGIN}\n{report.END}")
    with pytest.raises(SystemExit):
        offload.main(["--dry", "--markdown", str(page)])
    assert "--dry measures nothing" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="finds none here"):
            offload.main(["--markdown", str(page)])
    assert page.read_text() == f"{offload.BEGIN}\n{report.END}"

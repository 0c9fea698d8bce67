"""Guards the state that is kept on the host (`state_device="cpu"`): an ordinary step's bits, whatever is cut.

There is no GPU here: parameters that are on the CPU are taken for offloaded, and the copies to the host and back are
ones that happen as late as they may, so that whoever does not wait for them computes with what was there before.
tests/gpu has the real ones.
"""

import copy
import math

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, draw, on, results, same, snapshot, through_a_file
from lucid import engine
from lucid.engine import formats, offload
from lucid.engine.numbers import MomentFormat, ParamFormat
from offloading import LateCopies, offload_all


@pytest.fixture
def log(monkeypatch):
    """What the copies did, with every row taken for one whose state is on the host; a chunk is 64 bytes."""
    found = []
    offload_all(monkeypatch, found)
    return found


SHAPES = ((64, 128), (40, 200), (33,), (1, 5000), (), (0, 3), (6, 5, 4))
KINDS = [
    {"dtype": dtype} | options
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)
    for options in ({}, {"state_format": "bf16"}, {"state_format": "8bit"}, {"amsgrad": True, "maximize": True})
    if not (dtype.is_complex and "state_format" in options)
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_bits_of_an_ordinary_step(kind, log, monkeypatch):
    ours = World(shapes=SHAPES, **kind).run(4)
    assert log.count("begin") == log.count("end") == 4
    with monkeypatch.context() as patch:
        patch.setattr(offload, "is_offloaded", lambda row: False)
        theirs = World(shapes=SHAPES, **kind).run(4)
    assert_same(results(ours.optimizer), results(theirs.optimizer))


@pytest.mark.parametrize("chunk", [1, 128, 1000, 1 << 20])
def test_the_bits_do_not_depend_on_chunks(chunk, log, monkeypatch):
    wanted = World(torch.bfloat16, SHAPES, state_format="8bit").run(3)
    monkeypatch.setattr(offload, "PIECE_BYTES", chunk)
    got = World(torch.bfloat16, SHAPES, state_format="8bit").run(3)
    assert_same(results(got.optimizer), results(wanted.optimizer))


def test_copies_and_updates_overlap(log):
    """The next chunk is on its way before one is waited for; the copies back are waited for by the slot's next use."""
    param = Parameter(draw(1, (80,)))
    param.grad = draw(2, (80,))
    optim.AdamW([param]).step()
    order = [("fetch", 0)]
    for number in range(5):
        order += [("fetch", (number + 1) % 3)] * (number < 4) + [("wait", number % 3), ("send", number % 3)]
    assert log == ["begin", *order, "end"]


def layouts(seed):
    base = draw(seed, (30, 40))
    yield base, base[:, ::2]
    yield None, draw(seed + 1, (16, 8, 3, 3)).to(memory_format=torch.channels_last)
    yield None, draw(seed + 2, (64, 96)).t()


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "8bit"])
def test_layouts(state_format, log, monkeypatch):
    runs = []
    for offloaded in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(offload, "is_offloaded", lambda row, offloaded=offloaded: offloaded)
            bases, views = zip(*layouts(1), strict=True)
            between = bases[0][:, 1::2].clone()
            params = [Parameter(view) for view in views]
            optimizer = optim.AdamW(params, 0.01, state_format=state_format, max_grad_norm=1.0)
            for step in range(3):
                for number, param in enumerate(params):
                    param.grad = draw(100 * step + number, param.shape)
                optimizer.step()
            assert torch.equal(bases[0][:, 1::2], between)
            runs.append((results(optimizer), optimizer.grad_norm))
    assert_same(runs[0][0], runs[1][0])
    assert same(runs[0][1], runs[1][1])


def test_clipping_skipping_and_statistics(log, monkeypatch):
    runs = []
    for offloaded in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(offload, "is_offloaded", lambda row, offloaded=offloaded: offloaded)
            world = World(max_grad_norm=0.5, nonfinite="skip")
            world.optimizer.observe()
            for number in range(6):
                world.set_gradients()
                if number in (2, 4):
                    world.params[1].grad[3] = math.nan
                world.optimizer.step()
                world.done += 1
            runs.append(world.optimizer)
    ours, theirs = runs
    assert ours.skipped_steps == theirs.skipped_steps == 2
    assert same(ours.grad_norm, theirs.grad_norm)
    assert_same(results(ours), results(theirs))
    for name, value in theirs.statistics().items():
        assert ours.statistics()[name] == pytest.approx(value, rel=1e-5), name


def test_with_other_rows_and_in_backward(log, monkeypatch):
    """Some parameters on the CPU with their state, some not; stepping in backward; a parameter without a gradient."""
    runs = []
    for offloaded in ({0, 2}, set()):
        with monkeypatch.context() as patch:
            patch.setattr(offload, "is_offloaded", lambda row, rows=offloaded: row.param.dim() in rows)
            model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
            for number, param in enumerate(model.parameters()):
                param.data = draw(number, param.shape)
            optimizer = optim.AdamW(model.parameters(), 0.01, state_format="bf16")
            for step in range(6):
                optimizer.step_in_backward(step >= 4)
                optimizer.zero_grad()
                model(draw(step, (5, 8))).square().mean().backward()
                if step == 2:
                    model[0].weight.grad = None
                optimizer.step()
            runs.append(results(optimizer))
    assert_same(*runs)


def test_a_device_decides_a_step_in_which_no_state_is_on_the_host(log, monkeypatch):
    """The parameter whose state is there has no gradient in this step."""

    def run(name):
        with on(name), monkeypatch.context() as patch:
            patch.setattr(offload, "is_offloaded", lambda row: name == "cuda" and row.param.dim() == 2)
            world = World(nonfinite="skip", shapes=((3, 5), (7,))).run(2)
            world.set_gradients()
            world.params[0].grad = None
            world.optimizer.step()
            assert world.optimizer.skipped_steps == 0
            return results(world.run(2).optimizer)

    assert_same(run("cuda"), run("cpu"))


@pytest.mark.parametrize("stage", ["staging", "bind"])
def test_nothing_is_changed_where_something_goes_wrong(stage, log, monkeypatch):
    world = World(shapes=((8, 8), (7,))).run(2)
    world.set_gradients()
    before = snapshot(world.optimizer)
    with monkeypatch.context() as patch:
        if stage == "staging":

            def fail(self, size):
                raise MemoryError("no pinned memory")

            patch.setattr(LateCopies, "staging", fail)
            patch.setattr(offload, "PIECE_BYTES", 1 << 20)  # larger than the stages that are there
        else:
            world.params[1].grad = torch.ones(7).to_sparse()
            before = snapshot(world.optimizer)
        with pytest.raises((MemoryError, TypeError)):
            world.optimizer.step()
    assert snapshot(world.optimizer) == before
    world.run(1)


# state_device


def test_where_state_is_made():
    """On a parameter elsewhere state_device says where state lies; the meta device stands in for a GPU's."""
    slot = formats.Slot(torch.float32)
    param = torch.empty(3, 4, device="meta")
    assert slot.new(param, torch.device("cpu"), contiguous=False).device.type == "cpu"
    kept = formats.format_for(param, "fp32", True, "p", "cpu")
    made = kept.complete(param, {}, False, "p", (0, 0))
    assert {value.device.type for value in made.values()} == {"cpu"}
    assert kept.complete(param, made, False, "p", (0, 0)) == {}
    elsewhere = made | {"exp_avg": made["exp_avg"].to("meta")}
    with pytest.raises(ValueError, match="meta"):
        kept.complete(param, elsewhere, False, "p", (0, 0))


def test_on_the_cpu_it_changes_nothing():
    ours, theirs = World(state_device="cpu"), World()
    assert_same(results(ours.run(3).optimizer), results(theirs.run(3).optimizer))
    assert ours.optimizer.engine_for(ours.params[0]) == "cpu"


def test_it_stays_with_copies_and_is_not_saved():
    world = World(state_device="cpu").run(2)
    for twin in (copy.deepcopy(world.optimizer),):
        assert twin._settings.state_device == "cpu"
    other = World()
    other.optimizer.load_state_dict(through_a_file(world.optimizer.state_dict()))
    assert other.optimizer._settings.state_device is None


@pytest.mark.parametrize("value", ["cuda", "CPU", 0, True, torch.device("cpu")])
def test_other_devices_are_refused(value):
    with pytest.raises(ValueError, match="state_device: expected one of 'cpu', 'cpu:moments'"):
        optim.AdamW([Parameter(torch.ones(2))], state_device=value)


def test_the_engines_own_word():
    """What decides is where parameter and state lie."""
    param = torch.empty(3, device="meta")
    form = engine.RowFormat(ParamFormat.PLAIN, MomentFormat.PLAIN)
    row = engine.Row(
        0, 0, "p", param, param, {}, torch.zeros(()), {"exp_avg": torch.zeros(3)}, form, engine.shards.WHOLE
    )
    assert offload.is_offloaded(row)
    stream = {"exp_avg": torch.empty(3, device="meta"), "stream": torch.zeros((), dtype=torch.int64)}
    there = engine.Row(0, 0, "p", param, param, {}, torch.zeros(()), stream, form, engine.shards.WHOLE)
    assert not offload.is_offloaded(there)

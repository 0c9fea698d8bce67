"""Guards steps of parameters that lie on several CUDA devices: rows that are said to be on another one.

Each device updates its rows and decides what only they take part in; all is compared to the bit with the CPU engine.
"""

import collections

import pytest
import torch

from bits import World, assert_same, on, results, snapshot
from launchers import OPTIONS, Device, settled
from lucid import engine
from lucid.engine.cuda import device_tables, launch
from lucid.engine.numbers import SET


class TwoDevices:
    """Native rows of whose parameters every second one is on another device."""

    def __init__(self, groups):
        self.rows = NEW_ROWS(groups)
        self.params = [param for group in groups for param in group]

    def __getattr__(self, name):
        return getattr(self.rows, name)

    def device_rows(self):
        return [(row, kind, index + row % 2, *rest) for row, kind, index, *rest in self.rows.device_rows()]

    def only_device(self):
        devices = {number % 2 for number, param in enumerate(self.params) if param.grad is not None}
        return (1, devices.pop()) if len(devices) == 1 else (0, 0)


NEW_ROWS = engine.cpu.new_rows


@pytest.fixture
def two_devices(monkeypatch):
    found = [Device(), Device()]
    for index, each in enumerate(found):
        monkeypatch.setitem(launch._launchers, (1, index), each)
    monkeypatch.setattr(engine.cpu, "new_rows", TwoDevices)
    yield found
    device_tables._powers.cache_clear()


SHAPES = ((3, 5), (70, 64), (4, 2, 3), (), (0, 4), (9,), (5000,))


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"max_grad_norm": 0.5, "state_format": "8bit"}], ids=str)
def test_each_device_updates_its_rows(options, two_devices, monkeypatch):
    """The host decides, who alone sees all gradients."""
    with on("cuda"):
        world = World(shapes=SHAPES, **options)
        for step in range(4):
            if step == 3 and options.get("nonfinite") == "skip":
                world.set_gradients()
                world.params[5].grad[3] = torch.nan
                world.optimizer.step()
                assert world.optimizer.skipped_steps == 1
            for each in two_devices:
                each.forget()
            world.run(1)
            counts = [collections.Counter(name for name, _ in each.launched) for each in two_devices]
            assert [names["update"] for names in counts] == [1, 1 + (options.get("state_format") == "8bit")]
            assert [names["decide"] for names in counts] == [0, 0]
            assert [each.uploads[-1] for each in two_devices] == [3 * SET] * 2
        found, norm = settled(world.optimizer), world.optimizer.grad_norm
    monkeypatch.setattr(engine.cpu, "new_rows", NEW_ROWS)
    wanted = World(shapes=SHAPES, **options).run(4)
    assert_same(found, results(wanted.optimizer))
    assert str(norm) == str(wanted.optimizer.grad_norm)


def test_each_device_decides_what_only_its_rows_take_part_in(two_devices, monkeypatch):
    """And the counts of the one are settled before the other guesses."""
    sequence = [None, None, 0, 0, 1, 0, 1, 1, None, 0, 1, 1, None, 0]
    bad = {3, 6, 9}

    def run(name):
        with on(name):
            world = World(shapes=((3, 5), (7,), (4, 2), ()), nonfinite="skip", max_grad_norm=1.0)
            for step, only in enumerate(sequence):
                world.set_gradients()
                for index, param in enumerate(world.params):
                    if only not in (None, index % 2):
                        param.grad = None
                    elif step in bad and index in (2, 3):
                        param.grad.view(-1)[0] = torch.inf
                world.optimizer.step()
                world.done += 1
            return settled(world.optimizer), world.optimizer.skipped_steps, world.optimizer.grad_norm

    found = run("cuda")
    names = [collections.Counter(name for name, _ in each.launched)["decide"] for each in two_devices]
    monkeypatch.setattr(engine.cpu, "new_rows", NEW_ROWS)
    wanted = run("cpu")
    assert_same(found[0], wanted[0])
    assert found[1:] == wanted[1:] == (3, wanted[2])
    assert names == [sequence.count(0), sequence.count(1)]


def test_a_device_counts_no_steps_of_another(two_devices, monkeypatch):
    """Nor does it read a number that lies on another."""

    def run(name):
        with on(name):
            world = World(nonfinite="skip").run(2)
            for only in (0, 0, 1, 1):
                world.set_gradients()
                for param in world.params[1 - only :: 2]:
                    param.grad = None
                world.optimizer.found_inf = torch.tensor(float(only == 0))
                world.optimizer.step()
                world.done += 1
            return settled(world.optimizer), world.optimizer.skipped_steps

    found = run("cuda")
    names = [collections.Counter(name for name, _ in each.launched)["decide"] for each in two_devices]
    monkeypatch.setattr(engine.cpu, "new_rows", NEW_ROWS)
    wanted = run("cpu")
    assert_same(found[0], wanted[0])
    assert found[1] == wanted[1] == 2
    assert names == [2, 2]


def test_no_step_is_captured_on_two_devices(two_devices, monkeypatch):
    with on("cuda"):
        world = World(max_grad_norm=1.0).run(2)
        world.set_gradients()
        before = snapshot(world.optimizer)
        with monkeypatch.context() as patch:
            patch.setattr(engine.cuda, "is_capturing", lambda: True)
            with pytest.raises(RuntimeError, match=r"captured in a CUDA graph.*one GPU"):
                world.optimizer.step()
        assert snapshot(world.optimizer) == before
        found = settled(world.run(1).optimizer)
    monkeypatch.setattr(engine.cpu, "new_rows", NEW_ROWS)
    assert_same(found, results(World(max_grad_norm=1.0).run(3).optimizer))

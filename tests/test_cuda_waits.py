"""Guards that a step on a device never waits for it.

It is shown in two ways: on a device that runs nothing until someone reads from it; and with memory that no code of the
host may read, which ends a process that tries.
"""

import math

import pytest
import torch

from bits import World, in_child, on
from deciding import Pair, decisions
from guarded import Forbidden, Guarded, OnDevice
from launchers import Device
from lucid.engine.cuda import device_tables, launch

OPTIONS = {
    "plain": {},
    "clipped": {"max_grad_norm": 1.0},
    "skip": {"nonfinite": "skip"},
    "spikes": {"spike_threshold": 6.0},
    "scaled": {"scaled": True},
    "lr": {"rate": True},
    "observed": {"observed": True},
    "all": {
        "max_grad_norm": 1.0,
        "nonfinite": "skip",
        "spike_threshold": 6.0,
        "scaled": True,
        "rate": True,
        "observed": True,
    },
}
JUDGING = ("max_grad_norm", "nonfinite", "spike_threshold")
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


class Late(Device):
    """Runs nothing before someone reads what is in its memory: then all that it was asked for, in order."""

    def __init__(self):
        super().__init__()
        self.graph = []
        self.memory = []
        self.read = 0

    def empty(self, words):
        found = super().empty(words)
        self.memory.append(found)
        return found

    def staging(self, words):
        return launch.Interpreter.empty(self, words)

    def catch_up(self):
        acts, self.graph = self.graph, []
        for act in acts:
            act()

    def holds(self, tensor):
        place = tensor.untyped_storage().data_ptr()
        return any(place == own.untyped_storage().data_ptr() for own in self.memory)


@every_option
def test_a_device_may_run_late(options, monkeypatch):
    """A whole sequence of steps is asked for before the first of them runs."""
    late = Late()
    monkeypatch.setitem(launch._launchers, (1, 0), late)
    device_tables._powers.cache_clear()
    tolist = torch.Tensor.tolist

    def waiting(tensor):
        if late.holds(tensor):
            late.read += 1
            late.catch_up()
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", waiting)
    given = {key: value for key, value in options.items() if key in JUDGING}
    pair = Pair(**given)
    kept = []
    if options.get("observed"):
        pair.each(lambda world: world.optimizer.observe())
    for step in range(7):
        for world in pair.worlds:
            optimizer = world.optimizer
            world.set_gradients()
            if step in (3, 4) and options.get("nonfinite"):
                world.params[1].grad[0] = math.nan
            if options.get("scaled"):
                optimizer.grad_scale = torch.tensor(2.0 ** (10 - step))
                optimizer.found_inf = torch.tensor(float(step == 2))
            if options.get("rate"):
                optimizer.param_groups[0]["lr"] = torch.tensor(0.01 * (step + 1))
            # A device gives out memory in the order of what it runs, so that there none of it is used anew too early.
            kept += [*(param.grad for param in world.params), optimizer.param_groups[0]["lr"]]
            kept += [vars(optimizer).get("grad_scale"), vars(optimizer).get("found_inf")]
        if step == 1:
            late.catch_up()  # new state: the host has decided
            late.read = 0
        pair.step()
    assert len(late.graph) > 6
    assert late.read == 0
    if not decisions(late):
        late.catch_up()  # the host has counted, nobody has to wait
    pair.compare()
    late.catch_up()
    pair.compare()
    pair.compare_norms()


@pytest.mark.slow
@every_option
def test_no_code_of_the_host_reads_a_device(options):
    """Not in a warm step: who tries, in Python or C++, ends the process, here a child."""

    def act():
        torch.set_num_threads(1)
        memory = Forbidden()
        launch._launchers[1, 0] = Guarded(memory)
        with on("cuda"):
            given = {key: value for key, value in options.items() if key in JUDGING}
            world = World(shapes=((70, 64), (7,), (3, 5)), state_format="8bit", **given)
            optimizer = world.optimizer
            for param in world.params:
                param.data = memory.tensor(param.data)
            optimizer.observe(options.get("observed", False))
            world.run(1)
            for entry in optimizer.state.values():
                for key in entry.keys() - {"step", "stream"}:
                    entry[key] = memory.tensor(entry[key])
            hosts = {
                entry[key].data_ptr() for entry in optimizer.state.values() for key in ("step", "stream") & entry.keys()
            }
            for step in range(11):  # until the plan no longer reads the state
                world.set_gradients()
                for param in world.params:
                    param.grad = memory.tensor(param.grad)
                if options.get("scaled"):
                    optimizer.grad_scale = memory.tensor(torch.tensor(4.0))
                    optimizer.found_inf = memory.tensor(torch.tensor(float(step == 9)))
                if options.get("rate"):
                    optimizer.param_groups[1]["lr"] = memory.tensor(torch.tensor(0.01 * (step + 1)))
                with OnDevice(memory, hosts) as operations, memory.forbidden():
                    optimizer.step()
                    optimizer.zero_grad()
                    norm, scale = optimizer.grad_norm, optimizer._stepper.observations._scale
                if step > 2:
                    assert operations.seen <= {
                        "aten::empty",
                        "aten::zeros",
                        "aten::clone",
                    }  # the host's own; the norm's
                world.done += 1
            assert (norm is None) == (not given)
            assert scale is not None
            left_out = int(options.get("scaled", False))
            assert optimizer.skipped_steps == left_out
            assert {entry["step"].item() for entry in optimizer.state.values()} == {12.0 - left_out}

    in_child(act)


def test_who_reads_a_device_is_caught():
    """So that the test above can fail: by an operation of torch's, and by an address."""
    for read in (torch.Tensor.tolist, torch.Tensor.item, lambda tensor: tensor.numpy().sum()):

        def act(read=read):
            memory = Forbidden()
            value = memory.tensor(torch.ones(1))
            with OnDevice(memory, set()), memory.forbidden():
                read(value)

        with pytest.raises(AssertionError, match=r"the child ended"):
            in_child(act)

"""Guards `spike_threshold` on several processes: all remember the norms of the whole, and M load what N have saved."""

import pytest
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from bits import on
from resumed import Net, make, sharded, train
from spiking import memory

OPTIONS = {"spike_threshold": 2.0}
START = [130.0, 9.0, 64, 0]  # the norm of the gradients in `train` is about 140


def whole(steps):
    """The memory of one process."""
    return memory(trained(Net(), range(steps)))


def trained(net, steps):
    optimizer = make(net, OPTIONS)
    optimizer.param_groups[0]["spike_memory"][:] = START
    go_on(net, optimizer, steps)
    return optimizer


def go_on(net, optimizer, steps, large=3):
    """Take these steps, and the large one a second time, with gradients 100 times as large."""

    def scale(*_):
        for param in net.parameters():
            param.grad = param.grad * 100

    for step in steps:
        train(net, optimizer, [step])
        if step == large:
            handle = optimizer.register_step_pre_hook(scale)
            train(net, optimizer, [step])
            handle.remove()


def save(folder, engine_name):
    with on(engine_name):
        net = sharded()
        optimizer = trained(net, range(4))
        assert optimizer.skipped_steps == 1
        for flat in (False, True):
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            saved = get_optimizer_state_dict(net, optimizer, options=options)
            dcp.save({"optimizer": saved}, checkpoint_id=folder / str(flat))
    return memory(optimizer)


def load(folder, engine_name):
    found = []
    with on(engine_name):
        for flat in (False, True):
            net = sharded()
            optimizer = make(net, OPTIONS)
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            both = {"optimizer": get_optimizer_state_dict(net, optimizer, options=options)}
            dcp.load(both, checkpoint_id=folder / str(flat))
            set_optimizer_state_dict(net, optimizer, both["optimizer"], options=options)
            found.append(memory(optimizer))
            go_on(net, optimizer, [4, 5])
            found.append(memory(optimizer))
    distributed.barrier()
    return found


@pytest.mark.parametrize("engine_name", ["cpu", "cuda"])
def test_all_processes_remember_the_norms_of_the_whole(ranks, tmp_path, engine_name):
    at_the_spike, later = whole(4), whole(6)
    assert at_the_spike[3] == 1
    assert later[3] == 0
    assert ranks.run(2, save, tmp_path, engine_name) == [at_the_spike] * 2
    for world in (1, 3):
        found = ranks.run(world, load, tmp_path, engine_name)
        assert found == [[at_the_spike, later] * 2] * world

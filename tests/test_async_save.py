"""Guards that a checkpoint written in the background holds the moment of the call, while training goes on."""

import threading

import pytest
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from bits import SEALED, assert_same, results
from lucid.optim.checkpoint import load_optimizer
from resumed import Net, make, sharded, train, uninterrupted
from sharded import KINDS, assert_whole

GO_ON = threading.Event()  # what is written waits for it, so that the steps come first


class Late(FileSystemWriter):
    """Writes only once it is told to."""

    def write_data(self, plan, planner):
        assert GO_ON.wait(60)
        return super().write_data(plan, planner)


def save_late(net, optimizer, folder, **options):
    """Begin to save what there is now; nothing is written before GO_ON."""
    GO_ON.clear()
    state = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
    return dcp.async_save(state, storage_writer=Late(folder), **options)


def write(future):
    assert not future.done()
    GO_ON.set()
    future.result()


def loaded(net, optimizer, folder):
    state = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(net, state["model"])
    set_optimizer_state_dict(net, optimizer, state["optimizer"])
    return optimizer


def steps_before_it_is_written(folder, before, clips):
    """The same bits in the file as before the call, and in training as if nothing had been saved."""
    background = distributed.new_group(backend="gloo")  # steps that clip talk over the other
    for name, (dtype, options) in KINDS.items():
        net = sharded(dtype)
        optimizer = make(net, options)
        if clips:
            optimizer.max_grad_norm = 1e9  # measures, and clips nothing
        path = folder / f"{before} {clips} {name}"
        train(net, optimizer, range(before))
        future = save_late(net, optimizer, path, process_group=background)
        train(net, optimizer, range(before, before + 3))
        write(future)
        assert_whole(optimizer, uninterrupted(name, before + 3), f"{name}, after saving")
        for by_name in (False, True):
            twin = sharded(dtype)
            resumed = loaded(twin, make(twin, options), path)
            if by_name:
                resumed = make(twin, options)
                load_optimizer(twin, resumed, path)
            assert_whole(resumed, uninterrupted(name, before), f"{name}, loaded")
            train(twin, resumed, range(before, before + 2))
            assert_whole(resumed, uninterrupted(name, before + 2), f"{name}, going on")
    distributed.barrier()


@pytest.mark.parametrize(("before", "clips"), [(2, False), (2, True), (SEALED + 2, False)])
def test_sharded_state_is_that_of_the_call(ranks, tmp_path, before, clips):
    ranks.run(2, steps_before_it_is_written, tmp_path, before, clips)


def plain_processes(folder):
    """Whole parameters on every process, as under DDP."""
    for name, (dtype, options) in KINDS.items():
        net = Net(dtype)
        optimizer = make(net, options)
        train(net, optimizer, range(2))
        future = save_late(net, optimizer, folder / name)
        train(net, optimizer, range(2, 4))
        write(future)
        assert_same(results(optimizer), results(uninterrupted(name, 4)), f"{name}, after saving")
        twin = Net(dtype)
        resumed = loaded(twin, make(twin, options), folder / name)
        assert_same(results(resumed), results(uninterrupted(name, 2)), f"{name}, loaded")
        train(twin, resumed, range(2, 4))
        assert_same(results(resumed), results(optimizer), f"{name}, going on")


def test_plain_state_is_that_of_the_call(ranks, tmp_path):
    ranks.run(2, plain_processes, tmp_path)


@pytest.mark.filterwarnings("ignore:.*assuming the intent is to save in a single process")
@pytest.mark.filterwarnings("ignore:.*assuming the intent is to load in a single process")
def test_without_processes(tmp_path):
    plain_processes(tmp_path)

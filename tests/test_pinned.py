"""Guards the pinned memory of state on the host: few large pieces, tensors with storages of their own, and its ends."""

import copy
import gc
import io
import itertools
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, draw, in_child, on, peek, results, snapshot
from lucid.bench.shapes import gpt2_small, llama_1b
from lucid.engine import formats, pinned, sizes
from pinning import Pages, lies_in, pretend_pinned
from quick import examples


@pytest.fixture
def arena(monkeypatch):
    return pretend_pinned(monkeypatch)


class Waited:
    """An event that notes when it was waited for."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def record(self):
        self.log.append(("record", self.name))

    def synchronize(self):
        self.log.append(("wait", self.name))


def made(shape, dtype=torch.float32):
    return pinned.empty_like(torch.empty(shape, dtype=dtype, device="meta"))


# Tensors


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (1000, 7)])
def test_tensors_have_storages_of_their_own(shape, dtype, arena):
    first, tensor, last = made((5,)), made(shape, dtype), made((5,))
    tensor.fill_(3)
    first.fill_(1)
    last.fill_(2)
    assert tensor.eq(3).all()
    assert first.eq(1).all()
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert arena.holds(tensor)
    assert not tensor.numel() or (tensor.data_ptr() - first.data_ptr()) % 256 == 0
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert tensor.storage_offset() == 0
    assert not arena.holds(torch.empty(3))


def test_strides_are_kept(arena):
    like = torch.empty(4, 3, 5, 5, device="meta", memory_format=torch.channels_last)
    assert pinned.empty_like(like).stride() == like.stride()
    assert pinned.empty_like(like.transpose(0, 1)).stride() == like.transpose(0, 1).stride()


def test_files_and_copies_have_the_tensor_alone(arena):
    tensor = made((10,)).copy_(torch.arange(10.0))
    file = io.BytesIO()
    torch.save({"a": tensor}, file)
    assert len(file.getvalue()) < 4096 < arena.reserved
    file.seek(0)
    for twin in (torch.load(file)["a"], copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), tensor.clone()):
        assert torch.equal(twin, tensor)
        assert not arena.holds(twin)


# Pieces


def test_pieces_are_powers_of_two_and_few(monkeypatch):
    pages = Pages()
    arena = pretend_pinned(monkeypatch, pages)
    sizes = [100, 1 << 20, 3 << 20, (3 << 20) + 1, *([300_000] * 60)]
    tensors = [made((size,), torch.uint8) for size in sizes]
    assert all(size & (size - 1) == 0 for size in pages.asked)
    assert arena.reserved == sum(pages.asked) == pinned.bytes_for(sizes)
    assert arena.waste == arena.reserved - sum(-(-size // 256) * 256 for size in sizes)
    assert len(pages.asked) < 20 < len(sizes)
    assert len({tensor.data_ptr() for tensor in tensors}) == len(sizes)


@pytest.mark.parametrize("shapes", [gpt2_small(), llama_1b(), [(64,)] * 10_000], ids=["gpt2", "llama", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_format", formats.NAMES)
def test_what_is_wasted(state_format, dtype, shapes):
    """Of the memory that models take: up to 1/16, what the largest tensors leave, and 4 MiB."""
    slots = [sizes.slot_bytes(shape, dtype, state_format) for shape in shapes]
    pinned_sizes = [size for each in slots for key, size in each.items() if key != "stream"]
    taken = sum(-(-size // 256) * 256 for size in pinned_sizes)
    assert taken <= pinned.bytes_for(pinned_sizes) <= 1.13 * taken + (4 << 20)


def test_room_that_comes_back_is_found(arena):
    """Also by a size for which the first pieces had none."""
    tensors = [made((300_000,), torch.uint8) for _ in range(7)]  # three in a piece
    address = tensors.pop(1).data_ptr()
    assert made((300_000,), torch.uint8).data_ptr() == address


def test_planning_takes_no_memory():
    assert pinned.bytes_for([1 << 40, 5, 0]) == (1 << 40) + (1 << 30)


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.one_of(st.integers(1, 700_000), st.tuples(st.integers(0, 50))), max_size=60))
def test_tensors_never_share_memory(acts):
    """A number makes a tensor, a tuple drops one."""
    with pytest.MonkeyPatch.context() as patch:
        arena = pretend_pinned(patch)
        alive = []
        for act in acts:
            if isinstance(act, int):
                alive.append(made((act,), torch.uint8))
            elif alive:
                alive.pop(act[0] % len(alive))
            places = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.numel()) for tensor in alive)
            assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
            assert arena.reserved - arena.waste == sum(-(-tensor.numel() // 256) * 256 for tensor in alive)
            for piece in arena._pieces:
                assert all(one[1] < other[0] for one, other in zip(piece.free, piece.free[1:], strict=False))
        alive.clear()
        assert arena.reserved == 0


def test_a_piece_goes_with_its_last_tensor(arena):
    one, other = made((1000,)), made((1000,))
    memory = weakref.ref(arena._pieces[0].memory)
    del one
    assert arena.reserved == 1 << 20
    address = other.data_ptr()
    third = made((900,))
    assert third.data_ptr() < address  # where the first one was
    view = other[3:]
    del other, third
    assert memory() is not None
    del view
    gc.collect()
    assert memory() is None
    assert arena.reserved == 0


# Kernels that still write


def test_memory_is_used_again_after_kernels_have_finished(arena):
    log = []
    tensor = made((1000,))
    pinned.in_flight.launched("stream", lambda: Waited(log, "stream"))
    pinned.in_flight.launched("other", lambda: Waited(log, "other"))
    pinned.in_flight.launched("stream", lambda: pytest.fail("there is one"))
    assert log == [("record", "stream"), ("record", "other"), ("record", "stream")]
    memory = weakref.ref(arena._pieces[0].memory, lambda _: log.append("freed"))
    log.clear()
    del tensor
    assert log == [("wait", "stream"), ("wait", "other"), "freed"]
    assert memory() is None


def test_what_comes_back_while_others_are_waited_for_waits_for_its_own_kernels(arena):
    """Another thread has launched a kernel for it since, and has dropped it."""
    kept = [made((1000,)), made((1 << 20,))]
    waste = []

    class Dropping(Waited):
        def synchronize(self):
            waste.append(arena.waste)
            kept.clear()

    pinned.in_flight.launched("stream", lambda: Dropping([], "stream"))
    before = arena.waste
    del kept[0]
    assert waste == [before, 0]
    assert arena.reserved == 0


def test_nothing_waits_while_a_step_is_captured(arena, monkeypatch):
    log = []
    tensor = made((1000,))
    pinned.in_flight.launched("stream", lambda: Waited(log, "stream"))
    log.clear()
    with monkeypatch.context() as patch:
        patch.setattr(pinned.cuda, "is_capturing", lambda: True)
        del tensor
        pinned.in_flight.wait()
        made((1000,))
        assert log == []
        assert arena.reserved > 0
    made((1000,))
    assert log == [("wait", "stream")] * 2  # before the first is used again, and the second's end
    assert arena.reserved == 0


# No memory


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_where_memory_cannot_be_had_nothing_is_changed(limit, monkeypatch):
    pages = Pages(limit)
    arena = pretend_pinned(monkeypatch, pages)
    with on("cuda"):
        world = World(shapes=((100, 100), (600, 600), (7,)), state_device="cpu")
        world.set_gradients()
        before = snapshot(world.optimizer)
        with pytest.raises(
            MemoryError, match=r"asked for [12] MiB of pinned host memory beside the [01] MiB .*out of mem"
        ):
            world.optimizer.step()
        assert snapshot(world.optimizer) == before
        assert not peek(world.optimizer)
        gc.collect()
        assert arena.reserved == 0
        pages.limit = 1 << 40
        world.optimizer.step()
        assert all(lies_in(arena, entry) for entry in peek(world.optimizer).values())


def test_the_optimizers_end_frees_it(arena):
    with on("cuda"):
        world = World(state_device="cpu").run(2)
        assert arena.reserved > 0
        world.optimizer.state.clear()
        world.optimizer = None
        gc.collect()
    assert arena.reserved == 0


# State that did not come from here


def one_step(optimizer, params, number):
    for index, param in enumerate(params):
        param.grad = draw(100 * number + index, param.shape)
    optimizer.step()


HOW = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
def test_copies_are_pinned_by_their_next_step(how, arena):
    with on("cuda"):
        world = World(state_format="bf16", state_device="cpu", nonfinite="skip").run(2)
        twin = how(world.optimizer)
        params = [param for group in twin.param_groups for param in group["params"]]
        assert not any(lies_in(arena, entry) for entry in peek(twin).values())
        for _ in range(3):
            world.set_gradients()
            for param, own in zip(params, world.params, strict=True):
                param.grad = own.grad.clone()
            world.optimizer.step()
            twin.step()
            world.done += 1
        assert_same(results(twin), results(world.optimizer))
        assert all(lies_in(arena, entry) for entry in peek(twin).values())


def test_state_put_in_by_hand_is_pinned_or_refused(arena):
    with on("cuda"):
        params = [Parameter(draw(index, (40, 30))) for index in range(2)]
        twins = [Parameter(param.detach().clone()) for param in params]
        ours, theirs = optim.AdamW(params, state_device="cpu"), optim.AdamW(twins)
        for number in range(2):
            one_step(ours, params, number)
            one_step(theirs, twins, number)
        for optimizer, own in ((ours, params), (theirs, twins)):
            optimizer.state[own[0]]["exp_avg"] = torch.full((40, 30), 0.25)
        one_step(ours, params, 3)
        one_step(theirs, twins, 3)
        assert_same(results(ours), results(theirs))
        assert lies_in(arena, peek(ours)[params[0]])
        ours.state[params[0]]["exp_avg"] = torch.empty(40, 30, device="meta")
        with pytest.raises(ValueError, match="meta device"):
            one_step(ours, params, 4)


def test_what_cannot_be_copied_to_pinned_memory_is_refused():
    """Its storage was freed, so to read it would end the process; or it has no values at all."""

    def act():
        with pytest.MonkeyPatch.context() as patch, on("cuda"):
            pretend_pinned(patch)
            world = World(state_device="cpu", ema_decay=0.9).run(1)
            for key in ("exp_avg", "ema"):
                kept = world.optimizer.state[world.params[0]][key]
                freed = torch.zeros_like(kept)
                freed.untyped_storage().resize_(0)
                with FakeTensorMode():
                    fake = torch.zeros(kept.shape)
                for value, error, match in ((freed, ValueError, "has no memory"), (fake, TypeError, "FakeTensor")):
                    world.optimizer.state[world.params[0]][key] = value
                    world.set_gradients()
                    with pytest.raises(error, match=f"state '{key}' of parameter 0 .*{match}"):
                        world.optimizer.step()
                world.optimizer.state[world.params[0]][key] = kept
            assert_same(results(world.run(1).optimizer), results(World(ema_decay=0.9).run(2).optimizer))

    in_child(act)


def test_pinned_tensors_put_in_by_hand_again_and_again_do_not_add_up(arena):
    with on("cuda"):
        world = World(shapes=((300, 300), (7,)), state_device="cpu").run(1)
        for _ in range(40):
            world.optimizer.state[world.params[0]]["exp_avg"] = torch.zeros(300, 300)
            world.run(1)
    assert arena.reserved <= 2 << 20

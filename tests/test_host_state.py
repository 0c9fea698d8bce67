"""Guards state on the host that a GPU updates where it lies: the bits of state on the device, and who waits for whom.

There is no GPU here: interpreted kernels stand for one, as parameters on the CPU do for those on it, and ordinary pages
for pinned ones (pinning.py). test_compose.py has this state with every other feature, tests/gpu the real one.
"""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, draw, in_child, on, peek, results, through_a_file
from deciding import every_kind
from guarded import Forbidden, Guarded, OnDevice
from launchers import Device, device_plan
from lucid import engine
from lucid.engine import choice, formats, offload
from lucid.engine.conversion import decoded
from lucid.engine.cuda import launch
from lucid.engine.numbers import Operand
from pinning import Pages, lies_in, pretend_pinned
from test_cuda_graphs import Trainer, check_graphs, settled
from test_offload import KINDS, layouts


@pytest.fixture
def arena(monkeypatch):
    return pretend_pinned(monkeypatch)


HOW = {"host decides": {}, "device decides": {"nonfinite": "skip", "max_grad_norm": 0.5}}
SMALL = ((64, 64), (33, 200), (7,), (), (0, 3), (6, 5, 4))


def twins(options, **kind):
    """A training with state on the host, and one with state on the device."""
    found = []
    for device in ("cpu", None):
        with on("cuda"):
            world = World(state_device=device, **kind, **options)
            world.optimizer.observe()
            for step in range(5):
                world.set_gradients()
                if step == 3 and "nonfinite" in options:
                    world.params[1].grad.view(-1)[3] = math.nan
                world.optimizer.step()
                world.done += 1
            found.append(world)
    return found


@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_bits_of_state_on_the_device(kind, how, arena):
    ours, theirs = twins(how, shapes=SMALL, **kind)
    assert all(lies_in(arena, entry) for entry in peek(ours.optimizer).values())
    assert_same(settled(ours.optimizer), settled(theirs.optimizer))
    assert ours.optimizer.skipped_steps == theirs.optimizer.skipped_steps == ("nonfinite" in how)
    assert str(ours.optimizer.statistics()) == str(theirs.optimizer.statistics())
    assert str(ours.optimizer.grad_norm) == str(theirs.optimizer.grad_norm)
    with on("cuda"):
        assert {ours.optimizer.engine_for(param) for param in ours.params} == {"cuda"}


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "8bit"])
def test_layouts(state_format, arena):
    runs = []
    for device in ("cpu", None):
        with on("cuda"):
            _, views = zip(*layouts(1), strict=True)
            params = [Parameter(view) for view in views]
            optimizer = optim.AdamW(params, 0.01, state_format=state_format, state_device=device)
            for step in range(3):
                for number, param in enumerate(params):
                    param.grad = draw(100 * step + number, param.shape)
                optimizer.step()
            runs.append(
                (results(optimizer), [value.stride() for x in peek(optimizer).values() for value in x.values()])
            )
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_thousands_of_small_tensors(arena):
    with on("cuda"):
        ours, theirs = (World(shapes=[(7,)] * 300, state_device=device).run(1) for device in ("cpu", None))
    assert_same(results(ours.optimizer), results(theirs.optimizer))
    assert len(arena._pieces) == 1


def test_kernels_get_the_hosts_addresses(arena, device):
    """One launch for a kind, whose table has the addresses in pinned memory; nothing is copied but tables."""
    with on("cuda"):
        world = World(shapes=((30, 40), (7,)), state_device="cpu").run(2)
        device.forget()
        world.run(1)
    assert [name for name, _ in device.launched] == ["update"]
    rows = device_plan(world.optimizer)._row_table.table
    for row, param in zip(rows, world.params, strict=True):
        entry = peek(world.optimizer)[param]
        for key, operand in (("exp_avg", Operand.EXP_AVG), ("exp_avg_sq", Operand.EXP_AVG_SQ)):
            assert row[operand] == entry[key].data_ptr()
            assert arena.holds(entry[key])
        assert row[Operand.PARAM] == param.data_ptr()


def test_init_state_pins(arena):
    with on("cuda"):
        world = World(state_device="cpu", state_format="bf16")
        world.optimizer.init_state()
        assert all(lies_in(arena, entry) for entry in peek(world.optimizer).values())
        world.run(2)
        assert_same(results(world.optimizer), results(World(state_format="bf16").run(2).optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{"amsgrad": True}, {"state_format": "8bit"}], ids=str)
def test_moments_alone(dtype, options, arena):
    """Master weights are on the device then; state goes from each place to the others."""

    def world(place):
        return World(dtype, ((64, 64), (7,)), state_device=place, **options).run(1)

    with on("cuda"):
        worlds = {place: world(place) for place in ("cpu:moments", "cpu", None)}
        saved = [through_a_file(each.optimizer.state_dict()) for each in worlds.values()]
        for each, state in zip(worlds.values(), saved[1:] + saved[:1], strict=True):
            each.optimizer.load_state_dict(state)
        wanted = world(None).run(2)
        for place, each in worlds.items():
            assert_same(results(each.run(2).optimizer), results(wanted.optimizer))
            for entry in peek(each.optimizer).values():
                moments = {key for key in entry if "exp_avg" in key}
                on_host = {
                    "cpu:moments": moments,
                    "cpu": moments | (entry.keys() & {"residual", "master"}),
                    None: set(),
                }
                assert {key for key, value in entry.items() if arena.holds(value)} == on_host[place]


@pytest.mark.parametrize("place", ["cpu", "cpu:moments"])
def test_staged_state_is_all_on_the_host(place, monkeypatch):
    monkeypatch.setattr(choice, "IN_PLACE", False)
    kept = formats.format_for(torch.empty(3, device="meta", dtype=torch.bfloat16), "fp32", True, "p", place)
    assert kept.on_host == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "residual"}
    assert not kept.in_pinned


def test_without_the_option_nothing_is_pinned(arena):
    with on("cuda"):
        World().run(1)
    World(state_device="cpu").run(1)
    assert arena.reserved == 0


# The choice of the way


def test_one_line_chooses_the_way(arena, monkeypatch):
    with on("cuda"):
        assert choice.in_place(torch.device("cpu"))
        monkeypatch.setattr(choice, "IN_PLACE", False)
        world = World(state_device="cpu").run(1)
    assert not choice.in_place(torch.device("cpu"))
    assert arena.reserved == 0
    assert all(param in peek(world.optimizer) for param in world.params)
    monkeypatch.setattr(choice, "IN_PLACE", True)
    row = engine.Row(
        0, 0, "p", *[torch.empty(3, device="meta")] * 2, {}, torch.zeros(()), {"exp_avg": torch.zeros(3)}, *[None] * 2
    )
    assert offload.is_offloaded(row)  # no engine reads this device's memory
    monkeypatch.setattr(offload, "in_place", lambda device: True)
    assert not offload.is_offloaded(row)


# Who waits for kernels that still write


class Late(Device):
    """Runs nothing before someone waits for an event: then all that was asked for before it, in order."""

    def __init__(self):
        super().__init__()
        self.graph = []
        self.waits = 0

    def event(self):
        return LateEvent(self)

    def catch_up(self):
        acts, self.graph = self.graph, []
        for act in acts:
            act()


class LateEvent:
    def __init__(self, device):
        self.device = device

    def record(self):
        pass

    def synchronize(self):
        self.device.waits += 1
        self.device.catch_up()


@pytest.fixture
def late(monkeypatch):
    found = Late()
    monkeypatch.setitem(launch._launchers, (1, 0), found)
    return found


def save(world):
    return through_a_file(world.optimizer.state_dict())["state"][0]["exp_avg"]


def load_its_own(world):
    own = {"state": dict(enumerate(peek(world.optimizer).values())), "param_groups": world.saved["param_groups"]}
    world.optimizer.load_state_dict(own)
    return peek(world.optimizer)[world.params[0]]["exp_avg"]


def copied(world):
    twin = copy.deepcopy(world.optimizer)
    return peek(twin)[twin.param_groups[0]["params"][0]]["exp_avg"]


def read(world):
    return world.optimizer.state[world.params[0]]["exp_avg"]


def converted(world):
    return world.optimizer.torch_state_dict()["state"][0]["exp_avg"]


def moved(world):
    """The parameter is on the CPU now; its engine reads what the kernel has written."""
    with on("cpu"):
        world.run(1)
    return peek(world.optimizer)[world.params[0]]["exp_avg"]


@pytest.mark.parametrize("act", [save, load_its_own, copied, read, converted, moved])
def test_who_reads_state_waits_for_the_kernels(act, arena, late):
    def run(device):
        with on("cuda"):
            world = World(state_device=device).run(1)
            late.catch_up()
            world.saved = world.optimizer.state_dict()
            late.waits = 0
            for _ in range(3):
                world.run(1)
                kept.extend(param.grad for param in world.params)  # kernels that run late read them
        return world

    kept = []
    wanted = run(None)
    late.catch_up()
    wanted = act(wanted).clone()
    ours = run("cpu")
    assert late.waits == 0
    assert len(late.graph) >= 3
    assert torch.equal(act(ours), wanted)
    assert late.waits > 0


def test_memory_that_kernels_still_write_is_not_freed(arena, late):
    with on("cuda"):
        world = World(state_device="cpu").run(2)
        late.catch_up()
        world.run(1)
        memory, left = weakref.ref(arena._pieces[0].memory), []
        weakref.finalize(arena._pieces[0].memory, lambda: left.append(len(late.graph)))
        late.waits = 0
        peek(world.optimizer).clear()
        world.optimizer = None
        gc.collect()
    assert memory() is None
    assert left == [0]
    assert late.waits > 0


def test_an_ordinary_training_never_waits(arena, late):
    """Not for step after step, whose kernels have not run; the device alone decides."""
    with on("cuda"):
        world = World(state_device="cpu").run(1)
        late.catch_up()
        late.waits = 0
        world.run(20)
    assert late.waits == 0
    assert len(late.graph) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "nonfinite": "skip"}], ids=str)
def test_no_code_of_the_host_touches_state_on_the_host(options):
    """In a warm step: who tries, in Python or C++, ends the process, here a child."""

    def act():
        torch.set_num_threads(1)
        memory = Forbidden(1 << 23)
        launch._launchers[1, 0] = Guarded(memory)
        pages = Pages()
        pages.of = lambda size: memory.tensor(torch.full((size,), 0x7F, dtype=torch.uint8)).numpy()
        with pytest.MonkeyPatch.context() as patch, on("cuda"):
            arena = pretend_pinned(patch, pages.of)
            world = World(shapes=((70, 64), (7,), (3, 5)), state_format="8bit", state_device="cpu", **options)
            for param in world.params:
                param.data = memory.tensor(param.data)
            world.run(2)
            assert all(lies_in(arena, entry) for entry in peek(world.optimizer).values())
            hosts = {
                entry[key].data_ptr()
                for entry in peek(world.optimizer).values()
                for key in entry.keys() & {"step", "stream"}
            }
            for _ in range(3):
                world.set_gradients()
                for param in world.params:
                    param.grad = memory.tensor(param.grad)
                with OnDevice(memory, hosts), memory.forbidden():
                    world.optimizer.step()
                world.done += 1
            twin = World(shapes=((70, 64), (7,), (3, 5)), state_format="8bit", **options).run(5)
            assert_same(settled(world.optimizer), settled(twin.optimizer))

    in_child(act)


# Captured


@pytest.mark.parametrize("script", ["aaaa", "asaaskasds", "aebsabekba", "naanaenekanasna", "fafefaafsea"])
def test_replays_are_steps(script, capturing, arena):
    found = check_graphs(capturing, script, max_grad_norm=1.0, state_device="cpu")
    assert all(lies_in(arena, entry) for entry in peek(found.optimizer).values())


@every_kind
def test_replays_in_every_format(dtype, options, capturing, arena):
    shapes = ((64, 64) if options.get("state_format") == "8bit" else (3, 5), (7,))
    check_graphs(capturing, "aasnlaea", dtype=dtype, shapes=shapes, state_device="cpu", **options)


def test_who_reads_state_waits_for_replays(capturing, arena, monkeypatch):
    """An event that a graph has recorded tells nothing of its replays: the whole device is waited for."""
    waits = []

    class Noted:
        def record(self):
            pass

        def synchronize(self):
            waits.append("everything")

    monkeypatch.setattr(capturing, "everything", Noted, raising=False)
    with on("cuda"):
        trainer = Trainer(capturing, state_device="cpu")
        trainer.run("e")
        assert trainer.optimizer.state
        assert not waits
        trainer.run("aa")
        assert trainer.optimizer.state
        assert waits


# Checkpoints


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "8bit"])
def test_torchs_state_stays_on_the_host(state_format):
    """A device without room for the state has none for float32 moments either; `meta` stands for such a device."""
    world = World(shapes=((64, 64), (7,)), state_format=state_format, amsgrad=True).run(1)
    wanted = world.optimizer.torch_state_dict()["state"]
    for number, param in enumerate(world.params):
        found = decoded(param.detach().to("meta"), peek(world.optimizer)[param], "p")
        assert {key: value.device.type for key, value in found.items()} == dict.fromkeys(wanted[number], "cpu")
        assert all(torch.equal(value, wanted[number][key]) for key, value in found.items())


@pytest.mark.parametrize("there", ["bf16", "8bit", "fp32"])
@pytest.mark.parametrize("here", ["bf16", "8bit", "fp32"])
def test_checkpoints_of_any_place_and_format(here, there, arena):
    """Saved with state on the host, loaded with state on the device, and the other way; to bits alike."""

    def world(name, device, state_format, saved=None, dtype=torch.bfloat16):
        with on(name):
            made = World(dtype, shapes=((64, 80), (7,)), state_format=state_format, state_device=device)
            if saved is not None:
                for param, value in zip(made.params, saved[1], strict=True):
                    param.data.copy_(value)
                made.optimizer.load_state_dict(through_a_file(saved[0]))
                made.done = 3
            if device and name == "cuda" and saved is not None:
                assert all(lies_in(arena, entry) for entry in peek(made.optimizer).values())
            made.run(3)
            return (
                made.optimizer.state_dict(),
                [param.detach().clone() for param in made.params],
                results(made.optimizer),
            )

    places = [("cuda", "cpu"), ("cuda", None), ("cpu", None)]
    first = [world(*place, here) for place in places]
    found = [world(*place, there, saved) for saved in first for place in places]
    for each in found:
        assert_same(each[2], found[0][2])

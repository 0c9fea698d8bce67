"""Guards steps that are captured in a CUDA graph: replays are steps, and what cannot be right is refused.

Captured steps are put off, uploads and torch's own operations included, and then run again and again as a graph is,
between steps that are taken at once. The twin on the CPU engine takes each step at once, and must have the same bits.
"""

import contextlib
import copy
import gc
import math
import random
import signal
import weakref

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, draw, on, peek, results, snapshot
from capturing import replay
from deciding import every_kind
from launchers import Device, settled
from lucid import engine


class Trainer:
    """Gradients, a scale and learning rates that stay where they are; steps at once or by graphs, by letter.

    a, b: a step by a graph of that name, captured when it is first asked for. e: a step at once. s, k, d, o: someone
    reads the state, the skipped steps, makes a copy, reads the norm. n: the next step's gradients are bad. l: other
    learning rates. f: GradScaler has found an overflow, for the next step.
    """

    def __init__(self, device, dtype=torch.float32, shapes=((3, 5), (7,), (2, 2), ()), warm=2, **options):
        self.device, self.graphs = device, {}
        self.world = World(dtype, shapes, **{"nonfinite": "skip", **options})
        self.optimizer, self.params = self.world.optimizer, self.world.params
        for param in self.params:
            param.grad = torch.zeros_like(param)
        self.rates = [torch.tensor(0.01), torch.tensor(0.03)]
        self.scale, self.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        self.done, self.bad = 0, False
        self.norms = []
        for _ in range(warm):
            self.step("e")

    def set_gradients(self):
        for index, param in enumerate(self.params):
            if param.grad is not None:
                param.grad.copy_(draw(1000 * (self.done + 1) + index, param.shape, param.dtype))
                if self.bad and index == 1:
                    param.grad.view(-1)[-1] = math.nan
        self.bad = False
        self.done += 1

    def take(self):
        self.optimizer.grad_scale, self.optimizer.found_inf = self.scale, self.found_inf
        self.optimizer.step()

    def step(self, name):
        self.set_gradients()
        if name == "e" or self.device is None:
            self.take()
        else:
            if name not in self.graphs:
                with self.device.captures(self.optimizer) as graph:
                    self.take()
                self.graphs[name] = graph
            replay(self.graphs[name])
        self.found_inf.zero_()

    def act(self, letter):
        if letter in "abe":
            self.step(letter)
        elif letter == "s":
            assert len(self.optimizer.state) >= len(self.params)
        elif letter == "k":
            self.norms.append(self.optimizer.skipped_steps)
        elif letter == "d":
            self.norms.append(settled(copy.deepcopy(self.optimizer)))
        elif letter == "o":
            norm = self.optimizer.grad_norm
            self.norms.append(None if norm is None else norm.item())
        elif letter == "n":
            self.bad = True
        elif letter == "f":
            self.found_inf.fill_(1.0)
        elif letter == "l":
            for rate in self.rates:
                rate.mul_(0.7)

    def run(self, script):
        for letter in script:
            self.act(letter)
        return self


def check_graphs(capturing, script, **options):
    with on("cpu"):
        wanted = Trainer(None, **options).run(script)
    with on("cuda"):
        found = Trainer(capturing, **options).run(script)
    assert_same(settled(found.optimizer), results(wanted.optimizer), script)
    assert found.optimizer.skipped_steps == wanted.optimizer.skipped_steps
    for ours, theirs in zip(found.norms, wanted.norms, strict=True):
        if isinstance(theirs, list):
            assert_same(ours, theirs, script)
        elif theirs is not None:
            assert ours == pytest.approx(theirs, nan_ok=True, rel=0, abs=0)
    return found


SCRIPTS = {
    "one": "a",
    "replays": "aaaa",
    "read in between": "asaaskasds",
    "steps at once in between": "aeaeea",
    "two graphs": "abbaab",
    "two graphs, steps, reads": "aebsabekba",
    "bad gradients": "naanaenekanasna",
    "found by GradScaler": "fafefaafsea",
    "other learning rates": "alalaeleala",
    "norms": "aonaoaoeoao",
}
random_scripts = ["".join(random.Random(seed).choices("aabbeeesknnfldo", k=25)) for seed in range(3)]


@pytest.mark.parametrize("script", [*SCRIPTS.values(), *random_scripts], ids=[*SCRIPTS, *map(str, range(3))])
def test_replays_are_steps(script, capturing):
    check_graphs(capturing, script, max_grad_norm=1.0)


@pytest.mark.parametrize("how", [{}, {"max_grad_norm": 0.1}, {"nonfinite": "propagate"}], ids=str)
@every_kind
def test_replays_are_steps_in_every_format(dtype, options, how, capturing):
    script = "aasea" if how.get("nonfinite") == "propagate" else "aanslaea"
    shapes = ((64, 64) if options.get("state_format") == "8bit" else (3, 5), (7,))
    check_graphs(capturing, script, dtype=dtype, shapes=shapes, **options, **how)


def test_a_graph_captured_first_of_all_that_is_decided(capturing):
    """What the device keeps from step to step must not be made anew by the graph."""

    def run(name):
        with on(name):
            world = World().run(1)
            world.set_gradients()
            for _ in range(3):
                if name == "cuda":
                    if not graphs:
                        with capturing.captures(world.optimizer) as graph:
                            world.optimizer.step()
                        graphs.append(graph)
                    replay(graphs[0])
                else:
                    world.optimizer.step()
            return settled(world.optimizer)

    graphs = []
    assert_same(run("cuda"), run("cpu"))


def refused(optimizer, act):
    """Whether `act` is refused for the sake of captured steps; nothing is changed then."""
    assert optimizer.state is peek(optimizer)
    before = snapshot(optimizer)
    try:
        act()
    except RuntimeError as error:
        assert "captured in" in str(error)  # noqa: PT017
        assert "CUDA graph" in str(error)  # noqa: PT017
        assert optimizer.state is peek(optimizer)
        assert snapshot(optimizer) == before
        return True
    return False


def some_rows_alone(trainer):
    """Rows that shared a step count when they were captured would do so no longer."""
    left_out, trainer.params[1].grad = trainer.params[1].grad, None
    return lambda: setattr(trainer.params[1], "grad", left_out)


def one_row_more(trainer):
    late = Parameter(torch.ones(3))
    trainer.optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(3)
    return lambda: setattr(late, "grad", None)


def another_row_in_the_place_of_one(trainer):
    left_out, trainer.params[1].grad = trainer.params[1].grad, None  # which graphs go on to read
    late = Parameter(torch.ones(3))
    trainer.optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(3)
    return lambda: (
        setattr(late, "grad", None),
        setattr(trainer.params[1], "grad", left_out),
    )


@pytest.mark.parametrize("change", [some_rows_alone, one_row_more, another_row_in_the_place_of_one])
def test_a_step_of_other_rows_is_refused_or_counted_for_the_graphs(change, capturing):
    """The counts of all rows that a device decides are guessed together, and a graph knows its own only."""
    shapes = ((3,), (4,), (5,), (6,))
    with on("cuda"):
        found = Trainer(capturing, shapes=shapes).run("aa")
        back = change(found)
        found.set_gradients()
        no = refused(found.optimizer, found.take)
        back()
        found.run("aasaea")
    with on("cpu"):
        wanted = Trainer(None, shapes=shapes).run("aa")
        back = change(wanted)
        wanted.set_gradients()
        if not no:
            wanted.take()
        back()
        wanted.run("aasaea")
    assert_same(settled(found.optimizer), results(wanted.optimizer))


def test_a_step_without_gradients_is_none(capturing):
    with on("cuda"):
        found = Trainer(capturing, max_grad_norm=1.0).run("aa")
        kept = [param.grad for param in found.params]
        found.optimizer.zero_grad()
        found.optimizer.step()
        for param, gradient in zip(found.params, kept, strict=True):
            param.grad = gradient
        found.run("aea")
    with on("cpu"):
        wanted = Trainer(None, max_grad_norm=1.0).run("aaaea")
    assert_same(settled(found.optimizer), results(wanted.optimizer))


def load_own_state(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("let_go", [load_own_state, optim.AdamW.release_captured], ids=["loaded", "released"])
def test_captured_steps_that_are_let_go(let_go, capturing):
    """What the old graph counts is nobody's any more; steps of any rows are taken, and captured anew."""

    def run(name):
        with on(name):
            trainer = Trainer(capturing if name == "cuda" else None, shapes=((3,), (4,), (5,), (6,)))
            trainer.run("aana")
            let_go(trainer.optimizer)
            trainer.graphs.clear()
            left_out, trainer.params[1].grad = trainer.params[1].grad, None
            trainer.run("ene")
            trainer.params[1].grad = left_out
            trainer.run("eaansa")
            return settled(trainer.optimizer), trainer.optimizer.skipped_steps

    ours, theirs = run("cuda"), run("cpu")
    assert_same(ours[0], theirs[0])
    assert ours[1] == theirs[1] == 2


def test_a_refused_step_names_the_way_out(capturing):
    with on("cuda"):
        trainer = Trainer(capturing, shapes=((3,), (4,))).run("aa")
        trainer.params[1].grad = None
        with pytest.raises(RuntimeError, match=r"optimizer\.release_captured\(\)"):
            trainer.step("e")
        trainer.optimizer.release_captured()
        trainer.step("e")
        assert [int(entry["step"]) for entry in trainer.optimizer.state.values()] == [5, 4]


def test_released_steps_keep_no_memory(capturing):
    """Loading keeps the tables of the old graph, which may still be run; releasing does not."""

    def alive(let_go):
        trainer = Trainer(capturing).run("aa")
        (step,) = trainer.optimizer._stepper.whole.counts._current.captured
        tables = weakref.ref(step.alive[0])
        del step
        let_go(trainer.optimizer)
        trainer.graphs.clear()
        gc.collect()
        return tables() is not None

    with on("cuda"):
        assert alive(load_own_state)
        assert not alive(optim.AdamW.release_captured)


@pytest.mark.parametrize("first", ["load", "step"])
def test_what_replays_write_to_stays_with_them(first, capturing):
    """A graph that nobody counts may still be run, also after steps of other parameters; its memory is not freed."""

    def add(optimizer):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
        optimizer.step()

    with on("cuda"):
        trainer = Trainer(capturing).run("aa")
        words = weakref.ref(trainer.optimizer._stepper.whole.counts._current.words[1, 0])
        for act in (load_own_state, add) if first == "load" else (add, load_own_state):
            act(trainer.optimizer)
        trainer.graphs.clear()  # a real graph holds nothing
        capturing.graph = None
        gc.collect()
        assert words() is not None
        trainer.optimizer.release_captured()
        add(trainer.optimizer)
        gc.collect()
        assert words() is None


def test_without_captured_steps_nothing_is_released(engine_name):
    with on(engine_name):
        trainer = Trainer(None).run("e")
        before = snapshot(trainer.optimizer)
        trainer.optimizer.release_captured()
        assert snapshot(trainer.optimizer) == before


def test_an_interrupted_step_is_counted_for_the_graphs(capturing, monkeypatch):
    """Ctrl-C is raised after the step; a graph that is run next counts on from it."""
    launched = []

    def interrupting(*args):
        Device.launch(capturing, *args)
        launched.append(args)
        if len(launched) == 1:
            signal.raise_signal(signal.SIGINT)

    with on("cpu"):
        wanted = Trainer(None, max_grad_norm=1.0).run("aaeaa")
    with on("cuda"):
        found = Trainer(capturing, max_grad_norm=1.0).run("aa")
        with monkeypatch.context() as patch:
            patch.setattr(capturing, "launch", interrupting)
            with pytest.raises(KeyboardInterrupt):
                found.run("e")
        found.run("aa")
        assert_same(settled(found.optimizer), results(wanted.optimizer))


# What cannot be captured


def on_the_cpu_engine(world):
    return engine.only("cpu")


def without_state(world):
    world.optimizer.state.clear()


def with_a_new_parameter(world):
    world.params.append(Parameter(torch.ones(3)))
    world.optimizer.add_param_group({"params": [world.params[-1]]})


def with_errors(world):
    world.optimizer.nonfinite = "error"


def with_a_large_bound(world):
    world.optimizer.nonfinite, world.optimizer.max_grad_norm = "skip", 2.0**63


def with_amsgrad(world):
    world.optimizer.param_groups[0]["amsgrad"] = True


REFUSED = {
    on_the_cpu_engine: "one GPU",
    without_state: "before",
    with_a_new_parameter: "before",
    with_errors: "error",
    with_a_large_bound: "2\\^63",
    with_amsgrad: "before",
}


@pytest.mark.parametrize("captured_before", [False, True], ids=["", "after another"])
@pytest.mark.parametrize(("change", "message"), REFUSED.items(), ids=[f.__name__ for f in REFUSED])
def test_what_cannot_be_captured_is_refused(change, message, captured_before, capturing):
    with on("cuda"):
        world = World(max_grad_norm=1.0).run(2)
        if captured_before:
            world.set_gradients()
            with capturing.captures(world.optimizer) as graph:
                world.optimizer.step()
            replay(graph)
        context = change(world) or contextlib.nullcontext()
        world.set_gradients()
        assert world.optimizer.state is peek(world.optimizer)
        before = snapshot(world.optimizer)
        launched = len(capturing.launched)
        expected = "captured in.*CUDA graph" if captured_before else f"captured in a CUDA graph.*{message}"
        with context, capturing.captures(world.optimizer), pytest.raises(RuntimeError, match=expected):
            world.optimizer.step()
        assert snapshot(world.optimizer) == before
        assert len(capturing.launched) == launched
        assert not any(name == "update" for name, _ in capturing.launched[launched:])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prepare", "empty", "staging", "upload", "launch"])
def test_a_capture_that_fails_changes_nothing(method, capturing, monkeypatch):
    """Nor does it leave behind a graph that nobody can run, for which steps would wait from then on."""
    with on("cpu"):
        wanted = Trainer(None, max_grad_norm=1.0).run("eea")
    for at in range(1, 100):
        with on("cuda"):
            found = Trainer(capturing, max_grad_norm=1.0)
            found.run("e")
            assert found.optimizer.state is peek(found.optimizer)
            before = snapshot(found.optimizer)
            calls = []
            original = getattr(capturing, method)

            def failing(*args, at=at, calls=calls, original=original):
                calls.append(1)
                if len(calls) == at:
                    raise MemoryError
                return original(*args)

            refused = False
            with monkeypatch.context() as patch, capturing.captures(found.optimizer):
                patch.setattr(capturing, method, failing)
                try:
                    found.optimizer.step()
                except MemoryError:
                    refused = True
            if not refused:
                break
            assert snapshot(found.optimizer) == before
            assert not found.optimizer._stepper.whole.counts.captured, f"call {at}"
            assert_same(settled(found.run("ea").optimizer), results(wanted.optimizer))
    assert at > 2


def test_a_first_step_is_not_captured(capturing):
    for make in (lambda optimizer: None, lambda optimizer: optimizer.init_state()):
        with on("cuda"):
            world = World()
            make(world.optimizer)
            world.set_gradients()
            before = snapshot(world.optimizer)
            with (
                capturing.captures(world.optimizer),
                pytest.raises(RuntimeError, match=r"captured in a CUDA graph.*take a step"),
            ):
                world.optimizer.step()
            assert snapshot(world.optimizer) == before
            assert_same(settled(world.run(2).optimizer), results(World().run(2).optimizer))


@pytest.mark.parametrize("read", [False, True], ids=["", "counts are read before"])
@pytest.mark.parametrize("graphs_before", [0, 1])
def test_a_graph_of_other_rows_is_refused_or_right(graphs_before, read, capturing):
    """The counts of all rows that a device decides are guessed together."""

    def trained(device):
        trainer = Trainer(device, shapes=((3,), (4,), (5,), (6,)), max_grad_norm=1.0).run("a" * graphs_before + "e")
        trainer.params[1].grad = None
        trainer.set_gradients()
        return trainer

    with on("cpu"):
        wanted = trained(None)
        wanted.take()
        wanted.take()
    with on("cuda"):
        found = trained(capturing)
        if read:
            assert found.optimizer.state is peek(found.optimizer)
        with capturing.captures(found.optimizer) as graph:
            no = refused(found.optimizer, found.take) if read else None
            if no is None:
                try:
                    found.take()
                except RuntimeError as error:
                    assert "CUDA graph" in str(error)  # noqa: PT017
                    no = True
        if graphs_before and no:
            return  # where steps at once are refused as well
        for _ in range(2):
            found.take() if no else replay(graph)
        assert_same(settled(found.optimizer), results(wanted.optimizer))

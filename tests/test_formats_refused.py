"""Guards what a state format refuses, before anything changes: wrong options, broken state, another format too late.

And what it must not refuse: state that was loaded under inference mode, rows that rest, another default dtype.
"""

import copy
import io
import itertools

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, draw, on, peek, results, snapshot
from formats import FORMATS, MATRIX, World
from lucid import engine
from lucid.engine.numbers import MomentFormat, ParamFormat
from lucid.engine.shards import WHOLE


# Where the plan reads the state and where it trusts it; that is alike for all engines.
@pytest.mark.parametrize(
    ("engine_name", "after"), [("cpu", 1), ("cpu", 15), ("cuda", 1), ("reference", 1), ("reference", 15)]
)
@pytest.mark.parametrize(("before", "now"), list(itertools.permutations(FORMATS, 2)), ids=str)
def test_changing_the_format_after_the_first_step_raises_and_changes_nothing(before, now, after, engine_name):
    with on(engine_name):
        world = World(state_format=before).run(after)
        twin = copy.deepcopy(world)
        for group in world.optimizer.param_groups:
            group["state_format"] = now
        for param in world.named.values():
            param.grad = torch.ones_like(param)
        seen = snapshot(world.optimizer)
        with pytest.raises(ValueError, match=r"state.*of parameter '.*(load_state_dict|another format)") as caught:
            world.optimizer.step()
        assert "\n" not in str(caught.value)
        assert "load_state_dict" in str(caught.value)
        assert snapshot(world.optimizer) == seen
        for group in world.optimizer.param_groups:
            group["state_format"] = before
        assert_same(world.run(2).bits(), twin.run(2).bits())


@pytest.mark.parametrize("now", FORMATS)
def test_changing_the_format_before_the_first_step_is_a_choice(now):
    world = World(state_format="8bit" if now == "fp32" else "fp32")
    for group in world.optimizer.param_groups:
        group["state_format"] = now
    assert_same(world.run(2).bits(), World(state_format=now).run(2).bits())


WRONG_ARGUMENTS = [
    ("state_format", "int4", ValueError, "'fp32', 'bf16', '8bit'"),
    ("state_format", None, ValueError, "'fp32', 'bf16', '8bit'"),
    ("state_format", 8, ValueError, "'fp32', 'bf16', '8bit'"),
    ("state_format", "8BIT", ValueError, "'fp32', 'bf16', '8bit'"),
    ("state_format", ["fp32"], ValueError, "'fp32', 'bf16', '8bit'"),
    ("master_weights", 1, TypeError, "True, False or .stochastic."),
    ("master_weights", None, TypeError, "True, False or .stochastic."),
    ("master_weights", "yes", TypeError, "True, False or .stochastic."),
    ("seed", -1, ValueError, r"2\*\*63"),
    ("seed", 2**63, ValueError, r"2\*\*63"),
    ("seed", True, TypeError, "whole number"),
    ("seed", "x", TypeError, "whole number"),
    ("seed", 1.0, TypeError, "whole number"),
    ("seed", None, TypeError, "whole number"),
]


@pytest.mark.parametrize(("name", "value", "error", "allowed"), WRONG_ARGUMENTS, ids=str)
def test_wrong_arguments_are_named(name, value, error, allowed):
    pattern = rf"{name}.*{allowed}.*{value!r}".replace("[", r"\[").replace("]", r"\]")
    param = Parameter(torch.ones(3))
    with pytest.raises(error, match=pattern):
        optim.AdamW([param], **{name: value})
    with pytest.raises(error, match=pattern):
        optim.AdamW([{"params": [param], name: value}])
    optimizer = optim.AdamW([param])
    optimizer.param_groups[0][name] = value
    param.grad = torch.ones(3)
    before = snapshot(optimizer)
    with pytest.raises(error, match=pattern):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_every_seed_that_is_allowed_can_be_saved(seed):
    world = World(state_format="8bit", seed=seed).run(1)
    file = io.BytesIO()
    torch.save(world.optimizer.state_dict(), file)
    file.seek(0)
    other = World(state_format="8bit")
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert other.optimizer.param_groups[1]["seed"] == seed


def put(key, value):
    def tamper(entry):
        entry[key] = value(entry[key]) if callable(value) else value

    return tamper


def drop(key):
    def tamper(entry):
        del entry[key]

    return tamper


TAMPERED = {
    "codes int8": put("exp_avg_code", lambda x: x.to(torch.int8)),
    "codes float": put("exp_avg_code", lambda x: x.float()),
    "codes int64": put("exp_avg_sq_code", lambda x: x.long()),
    "codes transposed": put("exp_avg_code", lambda x: x.t().contiguous().t()),
    "codes strided": put("exp_avg_sq_code", lambda x: torch.stack([x, x], -1)[..., 0]),
    "codes flat": put("exp_avg_code", lambda x: x.flatten()),
    "codes of another shape": put("exp_avg_sq_code", lambda x: x[:, :-1].contiguous()),
    "no codes": drop("exp_avg_code"),
    "no codes of v": drop("exp_avg_sq_code"),
    "codes None": put("exp_avg_code", None),
    "codes a list": put("exp_avg_code", [1, 2]),
    "no scale": drop("exp_avg_scale"),
    "no scale of v": drop("exp_avg_sq_scale"),
    "scale flat": put("exp_avg_scale", lambda x: x.flatten()),
    "scale of a row too few": put("exp_avg_sq_scale", lambda x: x[1:].contiguous()),
    "scale of a block too many": put("exp_avg_scale", lambda x: torch.cat([x, x], 1)),
    "scale float64": put("exp_avg_scale", lambda x: x.double()),
    "scale float16": put("exp_avg_sq_scale", lambda x: x.half()),
    "scale strided": put("exp_avg_scale", lambda x: torch.stack([x, x], -1)[..., 0]),
    "scale on meta": put("exp_avg_scale", lambda x: x.to("meta")),
    "scales sparse": put("exp_avg_scale", lambda x: x.to_sparse()),
    "no stream": drop("stream"),
    "stream float": put("stream", lambda x: x.float()),
    "stream int32": put("stream", lambda x: x.int()),
    "stream of one dim": put("stream", lambda x: x.view(1)),
    "stream an int": put("stream", 7),
    "residual float32": put("residual", lambda x: x.float()),
    "residual int16": put("residual", lambda x: x.view(torch.int16)),
    "residual float16": put("residual", lambda x: x.view(torch.float16)),
    "residual flat": put("residual", lambda x: x.flatten()),
    "residual None, a string": put("residual", "none"),
    "codes are the parameter's memory": put(
        "exp_avg_code", lambda x: x.untyped_storage().nbytes() and x[:1].expand(64, 80)
    ),
    "two share memory": lambda entry: entry.update(exp_avg_sq_code=entry["exp_avg_code"]),
}


@pytest.mark.parametrize(
    ("engine_name", "steps"), [("cpu", 1), ("cpu", 14), ("cuda", 1), ("reference", 1), ("reference", 14)]
)
@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED.keys())
def test_state_that_someone_has_broken_raises_before_anything_changes(tamper, steps, engine_name):
    params = [Parameter(draw(k, MATRIX).bfloat16()) for k in range(2)]
    optimizer = optim.AdamW([("first", params[0]), ("second", params[1])], state_format="8bit")

    def step():
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()

    with on(engine_name):
        for _ in range(steps):
            step()
        kept = dict(optimizer.state[params[1]])
        tamper(optimizer.state[params[1]])
        for param in params:
            param.grad = torch.ones_like(param)
        before = snapshot(optimizer)
        with pytest.raises((ValueError, TypeError), match="parameter 'second'") as caught:
            optimizer.step()
        assert snapshot(optimizer) == before, caught.value
        optimizer.state[params[1]].update(kept)
        step()
    assert int(optimizer.state[params[1]]["step"]) == steps + 1


@pytest.mark.parametrize(
    ("key", "broken", "said"),
    [
        ("exp_avg_code", lambda x: x.t().contiguous().t(), "row-major"),
        ("exp_avg_sq_scale", lambda x: x[:-1], "one for each block"),
        ("exp_avg_scale", lambda x: torch.cat([x, x], 1)[:, :1], "one for each block"),
    ],
)
def test_the_engine_itself_refuses_codes_that_it_would_misread(key, broken, said):
    """Python has looked before; this is what stands between a mistake there and foreign memory."""
    param = Parameter(torch.ones(64, 80))
    param.grad = torch.ones_like(param)
    optimizer = optim.AdamW([param], state_format="8bit")
    optimizer.init_state()
    entry = optimizer.state[param]
    rows = engine.cpu.new_rows([[param]])
    rows.gather([[param]], [optimizer.state, True])
    stored = engine.RowFormat(ParamFormat.PLAIN, MomentFormat.EIGHT_BIT)

    def bound(slots):
        slots = {name: slot for name, slot in slots.items() if name != "step"}
        row = engine.Row(0, 0, "p", param, param.grad, entry, entry["step"], slots, stored, WHOLE)
        return rows.bind(row.index, row.gradient, row.entry, row.roles, row.format, row.numbering)

    assert bound(entry) is None
    assert said in bound(entry | {key: broken(entry[key])})
    rows.release()


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
def test_rows_that_rest_after_their_state_was_replaced(state_format):
    """What the plan knew of them is gone by the time they take part again, and the next replacement is seen too."""

    def run():
        params = [Parameter(draw(index, (64, 128)).bfloat16()) for index in range(3)]
        optimizer = optim.AdamW(params, lr=0.01, state_format=state_format)

        def step(number, *active):
            for index, param in enumerate(params):
                wanted = draw(100 * number + index, param.shape).bfloat16()
                param.grad = wanted if index in active else None
            optimizer.step()

        step(1, 0, 1, 2)
        step(2, 0, 1, 2)
        entry = peek(optimizer)[params[0]]
        entry["residual"] = entry["residual"].clone()
        step(3, 0)
        step(4, 0, 1, 2)
        for number in range(5, 9):
            entry = peek(optimizer)[params[1]]
            entry["residual"] = torch.full_like(entry["residual"].view(torch.int16), number).view(torch.bfloat16)
            optimizer._box.cells[1] = True
            step(number, 0, 1, 2)
        return results(optimizer)

    with on("reference"):
        wanted = run()
    assert_same(run(), wanted)


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "8bit"])
def test_state_loaded_or_copied_under_inference_mode_can_be_updated(state_format, engine_name):
    source = World(torch.float32, state_format=state_format)
    source.run(2)
    saved = source.optimizer.state_dict()
    plain = World(torch.float32, state_format=state_format)
    plain.optimizer.load_state_dict(copy.deepcopy(saved))
    loaded = World(torch.float32, state_format=state_format)
    with torch.inference_mode():
        loaded.optimizer.load_state_dict(saved)
        copied = copy.deepcopy(loaded.optimizer)
    assert not any(x.is_inference() for entry in copied.state.values() for x in entry.values())
    with on(engine_name):
        plain.run(2)
        loaded.run(2)
    assert_same(results(loaded.optimizer), results(plain.optimizer))


def test_inference_state_that_was_put_by_hand_is_refused_before_anything_changes(engine_name):
    param = Parameter(draw(0, (64, 80)))
    param.grad = draw(1, (64, 80))
    optimizer = optim.AdamW([param], state_format="8bit")
    optimizer.init_state()
    with torch.inference_mode():
        optimizer.state[param]["exp_avg_scale"] = torch.zeros(64, 1)
    before = snapshot(optimizer, param)
    with on(engine_name), pytest.raises(ValueError, match=r"'exp_avg_scale' was created under torch\.inference_mode"):
        optimizer.step()
    assert snapshot(optimizer, param) == before


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_is_nothing_to_the_formats(default, engine_name):
    def run():
        param = Parameter(draw(0, (64, 80)))
        optimizer = optim.AdamW([param], state_format="8bit")
        for number in range(3):
            param.grad = draw(number + 1, (64, 80))
            optimizer.step()
        return results(optimizer)

    wanted = run()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with on(engine_name):
            found = run()
    finally:
        torch.set_default_dtype(before)
    assert_same(found, wanted)


@pytest.mark.parametrize("key", ["step", "exp_avg_code", "exp_avg_sq_scale"])
def test_state_that_two_parameters_share_is_refused_before_anything_changes(key, engine_name):
    params = [Parameter(draw(index, (64, 80))) for index in range(2)]
    optimizer = optim.AdamW(params, state_format="8bit")
    optimizer.init_state()
    optimizer.state[params[1]][key] = optimizer.state[params[0]][key]
    for param in params:
        param.grad = torch.ones_like(param)
    before = snapshot(optimizer, *params)
    with on(engine_name), pytest.raises(ValueError, match="same memory"):
        optimizer.step()
    assert snapshot(optimizer, *params) == before

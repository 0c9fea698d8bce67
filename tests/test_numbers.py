"""Guards that Python, C++ and Triton mean the same by each number that they share: no compiler compares them."""

import re
from pathlib import Path

import pytest

from lucid.engine import exact_sum, numbers
from lucid.engine.cuda import decide, formats, kernels, squares
from lucid.engine.row import ROLES

SOURCES = {
    name: (Path(__file__).parents[1] / "csrc" / name).read_text()
    for name in ("kernels.h", "rows.h", "bindings.cpp", "exact_sum.h")
}


def enumeration(name, source):
    """The members of an enumeration in C++ with their values."""
    body = re.search(rf"enum (?:class )?{name} : \w+ \{{(.*?)\}}", SOURCES[source], re.DOTALL).group(1)
    found, value = {}, -1
    for member in re.sub(r"//[^\n]*", "", body).split(","):
        if member.strip():
            key, _, given = (part.strip() for part in member.partition("="))
            value = {"max_operands": len(numbers.Operand)}.get(given, int(given) if given.isdigit() else value + 1)
            found[key] = value
    return found


def constant(name, source):
    return int(re.search(rf"\b{name} = (-?\d+)", SOURCES[source]).group(1))


@pytest.mark.parametrize(
    ("ours", "name", "prefix"),
    [
        (numbers.Dtype, "Type", ""),
        (numbers.ParamFormat, "ParamFormat", ""),
        (numbers.MomentFormat, "MomentFormat", ""),
        (numbers.Operand, "Operand", ""),
    ],
)
def test_enumerations_are_those_of_the_kernels(ours, name, prefix):
    assert {member.name.lower(): member.value for member in ours} == enumeration(name, "kernels.h")


def test_columns_are_those_that_csrc_writes():
    columns = {f"column_{column.name.lower()}": column.value for column in numbers.Column}
    assert columns | {"device_columns": numbers.COLUMNS} == enumeration("DeviceColumn", "rows.h")


def test_constants_are_those_of_csrc():
    assert constant("block", "kernels.h") == numbers.BLOCK
    assert constant("shaped_operands", "kernels.h") == numbers.SHAPED_OPERANDS
    assert len(numbers.Operand) == constant("max_operands", "kernels.h")
    assert constant("step_role", "rows.h") == numbers.STEP_ROLE
    assert constant("stream_role", "rows.h") == numbers.STREAM_ROLE
    assert constant("words_of_set", "bindings.cpp") == numbers.SET


def test_sums_are_those_of_csrc():
    assert constant("sum_words", "exact_sum.h") == exact_sum.WORDS == exact_sum.Count.NAN
    assert constant("word_bits", "exact_sum.h") == exact_sum.WORD_BITS
    assert constant("lowest_exponent", "exact_sum.h") == exact_sum.LOWEST
    assert "nan_count = sum_words, infinite_count, large_count" in SOURCES["exact_sum.h"]
    counts = int(re.search(r"total_words = sum_words \+ (\d+)", SOURCES["exact_sum.h"]).group(1))
    assert exact_sum.WORDS + counts == exact_sum.TOTAL_WORDS == max(exact_sum.Count) + 1
    assert [squares.WORDS.value, squares.TOTAL_WORDS.value] == [exact_sum.WORDS, exact_sum.TOTAL_WORDS]


@pytest.mark.parametrize("ours", [numbers.Column, numbers.Operand, numbers.Scalar, numbers.Told, numbers.ToldOfSet])
def test_kernels_read_the_words_that_python_writes(ours):
    missing = set(ours.__members__)
    for module in (decide, kernels, squares):
        own = {member.name: getattr(module, member.name).value for member in ours if hasattr(module, member.name)}
        assert own == {name: ours[name].value for name in own}
        missing -= own.keys()
    assert missing <= {
        "ONE_MINUS_BETA1",
        "ONE_MINUS_BETA2",
        "ONE_MINUS_EMA_DECAY",
        "LOW_BITS",
    }  # 1 - beta is next to beta, for the kernels


def test_kernels_know_formats_by_the_same_numbers():
    assert [formats.FLOAT32.value, formats.FLOAT64.value, formats.FLOAT16.value, formats.BFLOAT16.value] == [0, 1, 2, 3]
    assert formats.EIGHT_BIT.value == numbers.MomentFormat.EIGHT_BIT
    assert formats.FLOAT16_MASTER.value == numbers.ParamFormat.FLOAT16_MASTER


def test_every_key_of_state_has_a_role():
    from lucid.engine.formats import KEYS

    assert ROLES.keys() == KEYS

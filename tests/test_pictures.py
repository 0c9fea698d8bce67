"""Guards that the pictures of docs/benchmarks.md are of the committed tables as they are now."""

import re

import pytest
from benchmarks import pictures
from PIL import Image

PAGE = pictures.ROOT / "docs" / "benchmarks.md"


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_of_the_tables(name):
    read, draw = pictures.PICTURES[name]
    with Image.open(pictures.FOLDER / f"{name}.png") as picture:
        assert picture.text["Description"] == pictures.digest(read()), (
            "old; python -m benchmarks.pictures draws it anew"
        )
    assert draw(read()).axes


def test_all_are_on_the_page_and_no_other():
    shown = re.findall(r"\(pictures/(\w+)\.png\)", PAGE.read_text())
    assert sorted(shown) == sorted(pictures.PICTURES) == sorted(path.stem for path in pictures.FOLDER.iterdir())


@pytest.mark.parametrize(
    ("cell", "value"), [("1,024", 1024), ("8.41 (7.64–12.5)", 8.41), ("+27.22 ± 4.21 worse", 27.22), ("–", None)]
)
def test_numbers_of_cells(cell, value):
    assert pictures.number(cell) == value


def test_the_tables_say_what_is_drawn():
    assert pictures.cpu_data()["1,000 of 64"].keys() == pictures.PEERS.keys()
    assert pictures.formats_data()["torch fused"]["bytes"] == 16
    assert len(pictures.quality_data()["torch bf16"]) == 4

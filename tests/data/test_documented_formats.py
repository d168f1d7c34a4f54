"""Every format stands in docs/data.md with an example, and every example is imported as
the format that it stands for."""

import re

import pytest
from PIL import Image

from align.data.formats import FORMATS
from tests.data.sources import imported, lines, reply
from tests.doc_pages import ROOT, blocks_of

PAGE = ROOT / "docs/data.md"
# Ratings are written by `align label`, and no data to import.
EXAMPLES = {block.title: block.text for block in blocks_of(PAGE) if block.title not in (None, "ratings.jsonl")}
# The shape of a plain table: its name is for --format.
BY_NAME_ONLY = {"mm-rlhf": "plain"}
LISTED = ("llama-factory/own_columns.json", "mmpr/animals.jsonl")


def makes():
    rows = re.findall(r"^\| (`[^|]+`) \|[^|]+\| (pairs|questions|either) \|$", PAGE.read_text(), flags=re.MULTILINE)
    return {name: kind for names, kind in rows for name in re.findall(r"`([\w-]+)`", names)}


def test_every_format_has_its_line_and_an_example():
    assert set(makes()) == {title.partition("/")[0] for title in EXAMPLES} == set(FORMATS)


@pytest.mark.parametrize("title", [title for title in EXAMPLES if title not in LISTED])
def test_an_example_is_read_as_what_it_stands_for(title, tmp_path):
    format_ = title.partition("/")[0]
    folder = tmp_path / format_
    folder.mkdir()
    for other, text in EXAMPLES.items():
        if other == title or (other in LISTED and other.startswith(f"{format_}/")):
            (tmp_path / other).write_text(text)
    for name, colour in (("kitten", (200, 90, 0)), ("puppy", (0, 60, 220))):
        Image.linear_gradient("L").convert("RGB").point([min(v + c, 255) for c in colour for v in range(256)]).resize((64, 48)).save(folder / f"{name}.jpg")  # fmt: skip
    done = imported(tmp_path / title, tmp_path / "out")
    assert set(done.counts.formats.values()) == {BY_NAME_ONLY.get(format_, format_)}
    assert (done.counts.dropped, done.counts.without_image) == ({}, 0)
    made = lines(done.path)
    assert made
    assert all(line["images"] for line in made)
    assert makes()[format_] in ("either", done.path.stem)
    if done.path.stem == "pairs":
        assert all(reply(line, "chosen") != reply(line, "rejected") for line in made)

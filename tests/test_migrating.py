"""docs/migrating.md: its tables turn the examples of other trainers into the align.yaml that stands below them."""

from __future__ import annotations

import dataclasses
import re
import shlex
from itertools import pairwise
from typing import Any

import pytest
import yaml
from trl import DPOConfig

from align.config import build_config
from align.dpo.settings import check_fields
from tests.data.sources import imported, lines, reply, save_pictures
from tests.doc_pages import ROOT, blocks_of

PAGE = ROOT / "docs" / "migrating.md"
BLOCKS = {block.title: block.text for block in blocks_of(PAGE) if block.title is not None}
SECTIONS = {"trl": "From TRL", "llama-factory": "From LLaMA-Factory", "ms-swift": "From ms-swift"}
TRL_FIELDS = {field.name for field in dataclasses.fields(DPOConfig)}
Table = dict[str, tuple[str, ...]]


def table_of(tool: str) -> Table:
    """Their `key`, or `key: value` for one value alone, to what stands for it here; empty for nothing."""
    section = re.search(rf"^## {SECTIONS[tool]}$(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert section
    found: Table = {}
    for theirs, here in re.findall(r"^\| (.*?) \| (.*?) \|$", section[1], re.M):
        ours = () if here.startswith("nothing") else tuple(re.findall(r"`([^`]+)`", here))
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", theirs), ours)
    return found


def settings_of(tool: str) -> dict[str, Any]:
    """Their example as keys and values: of a YAML file, or of a command and the variables before it."""
    (text,) = [text for title, text in BLOCKS.items() if title.startswith(f"{tool}/dpo.")]
    if not text.startswith("CUDA"):
        return yaml.safe_load(text)
    words = shlex.split(text)
    found = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    found |= {word[2:]: value for word, value in pairwise(words) if word.startswith("--")}
    # YAML takes 1e-4 for text.
    numbers = re.compile(r"[\d.]+e-?\d+")
    return {key: float(text) if numbers.fullmatch(text) else yaml.safe_load(text) for key, text in found.items()}


def converted(settings: dict[str, Any], table: Table) -> dict[str, Any]:
    result: dict[str, Any] = {"rounds": 1}
    for key, value in settings.items():
        exact = next((theirs for theirs in table if _says(theirs, key, value)), key)
        if exact in table:
            ours = table[exact]
        else:
            assert key in TRL_FIELDS, f"{key} stands in no row"
            ours = (f"dpo.{key}",)
        for name in ours:
            dotted, constant, text = name.partition(": ")
            place = result
            *sections, last = dotted.split(".")
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = yaml.safe_load(text) if constant else value
    return result


def _says(theirs: str, key: str, value: Any) -> bool:
    """
    >>> _says("pref_loss: sigmoid", "pref_loss", "sigmoid"), _says("pref_loss: sigmoid", "pref_loss", "orpo")
    (True, False)
    """
    name, constant, text = theirs.partition(": ")
    return bool(constant) and name == key and yaml.safe_load(text) == value


@pytest.mark.parametrize("tool", SECTIONS)
def test_the_table_makes_the_configuration_below_it(tool, tmp_path):
    result = converted(settings_of(tool), table_of(tool))
    assert result == yaml.safe_load(BLOCKS[f"{tool}/align.yaml"])
    config = build_config(result, base=tmp_path)
    # What stands under dpo is TRL's to know, not only ours to carry.
    check_fields(config.dpo)


@pytest.mark.parametrize("tool", SECTIONS)
def test_every_row_leads_to_a_setting_that_exists(tool, tmp_path):
    for theirs, ours in table_of(tool).items():
        for name in ours:
            if name == "dpo.":
                continue
            dotted, constant, text = name.partition(": ")
            value = yaml.safe_load(text) if constant else _example(dotted)
            nested: Any = value
            for part in reversed(dotted.split(".")):
                nested = {part: nested}
            first: dict[str, Any] = {"policy": "p", "questions": "q.jsonl"}
            if dotted == "dpo.keep":
                nested["dpo"]["eval_steps"] = 5
            check_fields(build_config(first | nested, base=tmp_path, where=theirs).dpo)


def _example(dotted: str) -> Any:
    numbers = {"num_processes": 2, "max_length": 4096, "beta": 0.1, "warmup_steps": 0.1, "strategy": "zero2"}
    numbers |= {"eval_steps": 5}
    texts = {"dtype": "bfloat16", "attention": "sdpa", "keep": "best"}
    return (numbers | texts).get(dotted.rpartition(".")[2], "x")


@pytest.mark.parametrize("tool", SECTIONS)
def test_their_pairs_are_read_as_what_they_are(tool, tmp_path):
    (title,) = [title for title in BLOCKS if title.startswith(f"{tool}/pairs.")]
    source = tmp_path / title
    save_pictures(source.parent, 1, "kitten.jpg")
    source.write_text(BLOCKS[title])
    done = imported(source, tmp_path / "out")
    assert set(done.counts.formats.values()) == {tool}
    (pair,) = lines(tmp_path / "out" / "pairs.jsonl")
    assert (reply(pair, "chosen"), reply(pair, "rejected")) == ("A kitten.", "A puppy.")
    assert len(pair["images"]) == 1

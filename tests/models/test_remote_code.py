"""A trained folder opens where its parent opened: with the parent's own code, by its authors' call,
under their loader."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from align.errors import UserError
from align.models.families import FAMILIES
from align.models.load import load_model, load_processor
from align.models.remote_code import add_code, whose_code
from align.models.save import save_checkpoint
from tests.forks import in_a_process
from tests.models.goldens import FOLDER
from tests.models.test_load import edit
from tests.models.test_save import copy_of

GOLDEN = FOLDER / "valley_eagle_tiny"
THEIRS = {"AutoModel": "modeling_valley.ValleyQwen2ForCausalLM", "AutoProcessor": "processing_valley.ValleyProcessor"}


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN)


@pytest.fixture(scope="module")
def processor():
    return load_processor(GOLDEN)


@pytest.fixture
def published(tmp_path):
    """A folder that ships code of its own, three files of which one imports another, as ByteDance's do."""
    folder = copy_of(GOLDEN, tmp_path / "published")
    edit(folder / "config.json", auto_map=THEIRS)
    (folder / "modeling_valley.py").write_text("from .modeling_vision_tower import build\n")
    (folder / "modeling_vision_tower.py").write_text("build = None\n")
    (folder / "processing_valley.py").write_text("import transformers\n")
    own = {"processor_class": "ValleyProcessor", "auto_map": {"AutoProcessor": THEIRS["AutoProcessor"]}, "anyres": True}
    (folder / "processor_config.json").write_text(json.dumps(own))
    return folder


def code_of(folder):
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def auto_map_of(folder, name="config.json"):
    return json.loads((folder / name).read_text())["auto_map"]


def test_the_parents_own_code_stays_over_two_rounds(model, processor, published, tmp_path):
    first = save_checkpoint(model, processor, tmp_path / "first", parent=published)
    second = save_checkpoint(load_model(first), load_processor(first), tmp_path / "second")
    for child in (first, second):
        assert code_of(child) == code_of(published)
        for name in ("config.json", "processor_config.json"):
            assert auto_map_of(child, name) == auto_map_of(published, name)


def test_the_toolkits_code_can_take_its_place(model, processor, published, tmp_path):
    child = save_checkpoint(model, processor, tmp_path / "child", parent=published, code="toolkit")
    assert not code_of(published).keys() & code_of(child).keys()
    for name in ("config.json", "processor_config.json"):
        assert auto_map_of(child, name)["AutoProcessor"] == "processing_valley_eagle.ValleyProcessor"
    assert json.loads((child / "processor_config.json").read_text())["anyres"] is True


def test_both_lie_side_by_side_and_the_parents_is_used(model, processor, published, tmp_path):
    child = save_checkpoint(model, processor, tmp_path / "child", parent=published, code="both")
    assert code_of(published).items() <= code_of(child).items()
    config = json.loads((child / "config.json").read_text())
    assert config["auto_map"] == THEIRS
    assert config["auto_map_toolkit"]["AutoModel"] == "modeling_valley_eagle.ValleyQwen2ForCausalLM"
    assert (child / "modeling_valley_eagle.py").is_file()
    assert type(load_model(child)) is type(model)
    assert [whose_code(folder) for folder in (published, child, GOLDEN)] == ["parent", "parent", None]


def test_a_file_of_the_parent_is_never_overwritten(model, processor, published, tmp_path):
    (published / "modeling_valley_eagle.py").write_text("theirs = True\n")
    with pytest.raises(UserError, match=r"modeling_valley_eagle\.py.*save\.code"):
        save_checkpoint(model, processor, tmp_path / "child", parent=published, code="both")


@pytest.mark.parametrize("named", ["gone.Model", "other/repository--modeling.Model", None])
def test_a_parent_without_code_gets_the_toolkits(model, processor, tmp_path, named):
    parent = copy_of(GOLDEN, tmp_path / "parent")
    if named:
        edit(parent / "config.json", auto_map={"AutoModel": named})
    child = save_checkpoint(model, processor, tmp_path / "child", parent=parent)
    # Code in another repository is code: the entry opens there.
    if named and "--" in named:
        assert auto_map_of(child) == {"AutoModel": named}
        assert code_of(child) == {}
    else:
        assert auto_map_of(child)["AutoModel"] == "modeling_valley_eagle.ValleyQwen2ForCausalLM"
        assert whose_code(child) == "toolkit"


CALLS = [
    ("valley_eagle_tiny", {"only_navit": False, "anyres": True, "max_pixels": 1280 * 784, "min_pixels": 4 * 784}),
    ("valley25_tiny", {"only_navit": True, "max_pixels": 16384 * 784, "min_pixels": 4 * 784}),
]


@pytest.mark.parametrize(("name", "keywords"), CALLS)
@pytest.mark.parametrize("case_name", ["square_small", "tall"])
def test_the_authors_published_call_gives_the_recorded_ids(name, keywords, case_name):
    folder = FOLDER / name
    case = next(case for case in json.loads((folder / "cases.json").read_text()) if case["name"] == case_name)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, **keywords)
    images = [Image.open(folder / path) for path in case["images"]]
    found = processor({"conversations": case["conversation"], "images": images}, inference=True)
    assert found["input_ids"].shape == (1, case["seq_len"])
    again = processor.apply_chat_template(
        case["conversation"],
        images=images,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert found.keys() == again.keys()
    assert all(torch.equal(found[key], again[key]) for key in found)
    turns = [
        {"from": {"user": "human"}.get(turn["role"], turn["role"]), "value": turn["content"]}
        for turn in case["conversation"]
    ]
    assert torch.equal(processor({"conversations": turns, "images": images})["input_ids"], found["input_ids"])
    answer = load_model(folder).generate(**found, max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert answer[0, case["seq_len"] :].tolist() == case["greedy"][:4]


def test_published_keywords_that_the_checkpoint_contradicts_are_refused():
    for folder, keywords in ((GOLDEN, {"only_navit": True}), (FOLDER / "valley25_tiny", {"only_navit": False})):
        with pytest.raises(UserError, match=r"only_navit: expected .*config\.json"):
            load_processor(folder, **keywords)
    with pytest.raises(UserError, match="anyres"):
        load_processor(GOLDEN, anyres=False)


# What transformers 4.51 takes for the relative imports of a file (`get_relative_imports` in dynamic_module_utils.py).
RELATIVE = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE)


def import_alone(folder: Path, wanted: list[str]) -> None:
    """In a process that has transformers, but cannot import this toolkit."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "align"]:
        del sys.modules[name]
    sys.modules["align"] = None  # type: ignore[assignment]
    sys.path.insert(0, str(folder))
    for line in wanted:
        package, module, name = line.split(":")
        assert getattr(importlib.import_module(f"{package}.{module}"), name), line


def test_every_file_that_is_named_brings_all_that_it_needs(tmp_path):
    """As transformers 4.51 opens a local folder: the named file is copied, and what it names itself;
    nothing further."""
    wanted = []
    for number, (architecture, family) in enumerate(FAMILIES.items()):
        folder = tmp_path / architecture
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        add_code(family, folder)
        for auto_class, entry in auto_map_of(folder).items():
            module, name = entry.split(".")
            package = f"p{number}_{auto_class}"
            copied = {module, *RELATIVE.findall((folder / f"{module}.py").read_text())}
            (tmp_path / package).mkdir()
            for file in copied:
                (tmp_path / package / f"{file}.py").write_text((folder / f"{file}.py").read_text())
            wanted.append(f"{package}:{module}:{name}")
    assert len(wanted) == 5 * len(FAMILIES)
    in_a_process(import_alone, tmp_path, wanted)

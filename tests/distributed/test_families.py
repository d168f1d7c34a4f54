"""A step under ZeRO-3 for a tiny model of every family, one process without an image; FSDP2 where GPUs are."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

from align.config import load_config
from align.models.load import load_model
from align.models.weights import tensor_table
from align.records import write_jsonl
from align.run.folder import RunDir
from tests import tiny_models, tiny_vlms
from tests.distributed.launches import add_run, run_alone, train_in_two_processes
from tests.dpo.conftest import make_pairs
from tests.test_family_rounds import COMPANIONS, GOLDENS, SETTINGS

FAMILIES = [*SETTINGS, *tiny_vlms.VLMS]
TAKES_ONE_IMAGE = ("vl360_tiny",)


def save_family(name, folder):
    if name not in SETTINGS:
        tiny_vlms.save(name, folder)
        return
    folder.mkdir()
    for path in (GOLDENS / name).iterdir():
        if path.suffix in COMPANIONS and path.name != "cases.json":
            shutil.copyfile(path, folder / path.name)


def steps_of(folder, name):
    config = load_config(folder / f"{name}.yaml")
    checkpoint = RunDir(config.run_dir).round(1).checkpoint
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return checkpoint, [entry for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("families")
    (folder / "images").mkdir()
    write_jsonl(folder / "mixed.jsonl", make_pairs(folder / "images", 2, (2, 0)))
    write_jsonl(folder / "single.jsonl", make_pairs(folder / "images", 2, (1, 0)))
    for name in FAMILIES:
        save_family(name, folder / name)
        add_run(
            folder,
            name,
            policy=f"./{name}",
            pairs_file="single.jsonl" if name in TAKES_ONE_IMAGE else "mixed.jsonl",
            model={"processor": SETTINGS.get(name, {})},
            launch={"strategy": "zero3"},
            dpo={"learning_rate": 1e-4, "gradient_checkpointing": True},
        )
    train_in_two_processes(folder, FAMILIES)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_zero3_trains_every_family_and_its_checkpoint_opens(folder, name):
    checkpoint, steps = steps_of(folder, name)
    assert [entry["step"] for entry in steps] == [1]
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert all(entry["grad_norm"] > 0 for entry in steps)
    shapes = [{k: info.shape for k, info in tensor_table(place).items()} for place in (folder / name, checkpoint)]
    assert shapes[0] == shapes[1]
    load_model(checkpoint)
    _, report = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_fsdp2_trains_like_one_gpu_and_its_checkpoint_opens(tmp_path):
    (tmp_path / "images").mkdir()
    tiny_models.save_llava_onevision(tmp_path / "policy")
    write_jsonl(tmp_path / "pairs.jsonl", make_pairs(tmp_path / "images", 20, (1, 0, 2, 0)))
    common = {"policy": "./policy", "pairs_file": "pairs.jsonl"}
    fp32 = {"bf16": False}
    run_alone(add_run(tmp_path, "alone", dpo={"per_device_train_batch_size": 2} | fp32, **common))
    add_run(tmp_path, "fsdp2", dpo=fp32, launch={"strategy": "fsdp2"}, **common)
    train_in_two_processes(tmp_path, ["fsdp2"])
    (_, expected), (checkpoint, found) = (steps_of(tmp_path, name) for name in ("alone", "fsdp2"))
    for a, b in zip(expected, found, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        # Without the placements of the head's gradient this is what differs.
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    load_model(checkpoint)

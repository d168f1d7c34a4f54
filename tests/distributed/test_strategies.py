"""Two processes train as one, under every strategy that works on a CPU, also where one of them gets no image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from align.config import Config, load_config
from align.models.load import load_model
from align.models.weights import tensor_table
from align.records import write_jsonl
from align.run.folder import RunDir
from tests import tiny_models
from tests.distributed.launches import add_run, run_alone, train_in_two_processes
from tests.dpo.conftest import make_pairs
from tests.dpo.test_rows import ORDERS, pairs_of_questions

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

LORA = {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}
# What is different from the training in one process, which has twice as many pairs on its device.
SPREAD: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"launch": {"strategy": "zero2"}},
    "zero3": {"launch": {"strategy": "zero3"}},
    "zero3-checkpointing": {"launch": {"strategy": "zero3"}, "dpo": {"gradient_checkpointing": True}},
    "ddp-checkpointing": {"dpo": {"gradient_checkpointing": True}},
    "zero3-plain": {"launch": {"strategy": "zero3"}, "shared_prefix": "off"},
    "zero3-live": {"launch": {"strategy": "zero3"}, "dpo": {"reference": "live"}},
}
# Rows of questions: five of them, or an odd number of batches, so that one process repeats one, which counts nothing.
QUESTIONS = {"rows": "question", "tokens_per_batch": 250, "per_device_train_batch_size": None}
PICTURES = {"image_preference": {"corruption": "crop"}, "rows": "question", "pair_weight": "question"}
ROWS: dict[str, dict[str, Any]] = {
    "rows": QUESTIONS,
    "pictures": PICTURES | LORA,
    "live": QUESTIONS | LORA | {"reference": "live"},
}
SPREAD_ROWS = {
    "ddp-rows": "rows",
    "zero2-pictures": "pictures",
    "zero3-pictures": "pictures",
    "zero2-live": "live",
    "zero3-rows-live": "live",
}
ADAPTED = {"zero2-lora": {"launch": {"strategy": "zero2"}}, "zero3-lora": {"launch": {"strategy": "zero3"}}}


def common(folder: Path) -> dict[str, Any]:
    return {"policy": str(folder / "policy"), "pairs_file": "pairs.jsonl"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All trainings of this file: alone in this process, the others in one launch of two processes."""
    folder = tmp_path_factory.mktemp("strategies")
    (folder / "images").mkdir()
    tiny_models.save_llava_onevision(folder / "policy")
    # One image, none, two, none: in many steps one process has images and the other has not, in some neither.
    write_jsonl(folder / "pairs.jsonl", make_pairs(folder / "images", 8, (1, 0, 2, 0)))
    run_alone(add_run(folder, "alone", dpo={"per_device_train_batch_size": 2}, **common(folder)))
    run_alone(add_run(folder, "alone-lora", dpo={"per_device_train_batch_size": 2} | LORA, **common(folder)))
    orders = [*ORDERS, *ORDERS[:2]]
    write_jsonl(folder / "questions.jsonl", pairs_of_questions(folder / "images", orders))
    of_questions = common(folder) | {"pairs_file": "questions.jsonl"}
    for name, dpo in ROWS.items():
        run_alone(add_run(folder, f"alone-{name}", dpo=dpo | {"gradient_accumulation_steps": 2}, **of_questions))
    for name, kind in SPREAD_ROWS.items():
        launch = {"strategy": name.split("-")[0]}
        add_run(folder, name, dpo=ROWS[kind], launch=launch, **of_questions)
    for name, fields in SPREAD.items():
        add_run(folder, name, **common(folder), **fields)
    for name, fields in ADAPTED.items():
        add_run(folder, name, dpo=LORA, **common(folder), **fields)
    train_in_two_processes(folder, [*SPREAD, *ADAPTED, *SPREAD_ROWS])
    return folder


def run_of(folder: Path, name: str) -> tuple[Config, Path]:
    config = load_config(folder / f"{name}.yaml")
    return config, RunDir(config.run_dir).round(1).checkpoint


def logged(checkpoint: Path, metric: str) -> list[float]:
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry[metric] for entry in log if "loss" in entry]


@pytest.mark.parametrize(("name", "alone"), [*((n, "alone") for n in SPREAD), *((n, "alone-lora") for n in ADAPTED)])
def test_steps_in_two_processes_equal_those_in_one(folder, name, alone):
    (_, expected), (_, found) = run_of(folder, alone), run_of(folder, name)
    assert len(logged(expected, "loss")) == 4
    assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), abs=1e-5)
    for metric in ("rewards/margins", "logps/chosen", "grad_norm"):
        assert logged(found, metric) == pytest.approx(logged(expected, metric), abs=1e-4, rel=1e-4), metric
    check_weights(folder, expected, found)


@pytest.mark.parametrize(("name", "kind"), SPREAD_ROWS.items())
def test_rows_of_questions_and_corrupted_pictures_train_in_two_processes_as_in_one(folder, name, kind):
    (_, expected), (_, found) = run_of(folder, f"alone-{kind}"), run_of(folder, name)
    assert len(logged(expected, "loss")) >= 2
    for metric in ("loss", "grad_norm"):
        assert logged(found, metric) == pytest.approx(logged(expected, metric), abs=1e-4, rel=1e-3), metric
    check_weights(folder, expected, found)


def check_weights(folder: Path, expected: Path, found: Path) -> None:
    """Two checkpoints differ by little of what training has moved."""
    before, one, two = (load_file(place / "model.safetensors") for place in (folder / "policy", expected, found))
    for tensor in before:
        if tensor.endswith("k_proj.bias"):
            # Adding a constant to all keys changes no attention: the true gradient is 0, and Adam amplifies rounding.
            continue
        moved = (one[tensor] - before[tensor]).norm()
        assert (one[tensor] - two[tensor]).norm() <= 1e-2 * moved + 1e-6, tensor


@pytest.mark.parametrize("name", [*SPREAD, *ADAPTED])
def test_checkpoints_have_the_original_names_and_open_with_plain_transformers(folder, name):
    _, checkpoint = run_of(folder, name)
    shapes = [{k: info.shape for k, info in tensor_table(place).items()} for place in (folder / "policy", checkpoint)]
    assert shapes[0] == shapes[1]
    model, report = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = load_model(checkpoint).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_compiled_for_processes_on_a_cpu(folder):
    assert (folder / "zero3.yaml").exists()
    assert not list(folder.glob("compiled/**/*"))

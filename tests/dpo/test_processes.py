"""The same training in one process and in two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from align.config import Config
from align.dpo.train import run_dpo
from align.media.images import ImageStore
from align.records import Pair, read_jsonl, write_jsonl
from tests.dpo.conftest import make_pairs
from tests.dpo.sharded_head import ADAPTERS, mean_loss, shared_model, take_steps, write_sharded
from tests.dpo.test_rows import ORDERS, pairs_of_questions
from tests.dpo.test_train import history, make_run, round_1, weights
from tests.forks import in_two_processes
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]


def write_config(folder: Path, config: Config) -> Path:
    path = folder / f"{config.name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@pytest.mark.slow
def test_two_processes_that_the_command_starts_train_as_one(tmp_path):
    """Other strategies: tests/distributed."""
    alone = make_run(tmp_path, name="alone", dpo={"num_train_epochs": 1})
    # Two pairs per step with images and without: the processes take different ways through the model.
    pairs = make_pairs(tmp_path / "images", 6, num_images=(1, 0, 2, 1))
    write_jsonl(round_1(alone).pairs, pairs)
    run_dpo(alone, 1)
    together = make_run(tmp_path, name="together", dpo={"num_train_epochs": 1, "gradient_accumulation_steps": 1})
    write_jsonl(round_1(together).pairs, pairs)
    command = [sys.executable, "-m", "align.cli", "dpo", "--config", str(write_config(tmp_path, together))]
    subprocess.run(
        [*command, "--num-processes", "2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=PATIENCE_S,
    )
    for a, b in zip(history(round_1(alone).checkpoint), history(round_1(together).checkpoint), strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
            assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-4), f"{name} at step {a['step']}"
    before = weights(tmp_path / "policy")
    one, two = weights(round_1(alone).checkpoint), weights(round_1(together).checkpoint)
    assert one.keys() == two.keys() == before.keys()
    moved = torch.cat([(one[name] - before[name]).flatten() for name in before]).norm()
    apart = torch.cat([(one[name] - two[name]).flatten() for name in before if "k_proj.bias" not in name]).norm()
    assert apart < 1e-2 * moved


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The folder of images and pairs, and what two processes made of them whose model FSDP2 has sharded."""
    folder = tmp_path_factory.mktemp("sharded") / "images"
    folder.mkdir()
    write_jsonl(folder / "pairs.jsonl", make_pairs(folder, 4))
    # Five batches of questions: the one that a process repeats, so that both have equally many, must count nothing.
    write_jsonl(folder / "questions.jsonl", pairs_of_questions(folder, [*ORDERS, *ORDERS[:2]]))
    output = folder / "sharded.pt"
    in_two_processes(write_sharded, folder, output)
    return folder, torch.load(output, weights_only=True)


@pytest.mark.slow
def test_gradients_of_a_model_sharded_by_fsdp2_are_those_of_one_process(sharded):
    folder, found = sharded
    model = shared_model()
    mean_loss(model, read_jsonl(folder / "pairs.jsonl", Pair), ImageStore(folder)).backward()
    alone = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found["gradients"].keys() == alone.keys()
    total = torch.cat([gradient.flatten() for gradient in alone.values()]).norm()
    for name, gradient in alone.items():
        assert (found["gradients"][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * total, name


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_fsdp2_trains_rows_of_questions_with_corrupted_pictures_as_one_process(sharded, adapter):
    folder, found = sharded
    two, one = found[adapter], take_steps(folder, adapter)
    assert one["batches"] == 5
    assert len(one["losses"]) == 6
    assert len({round(loss, 3) for loss in one["losses"]}) == 6, "every step has a loss of its own"
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        assert torch.allclose(two["weights"][name], weight, atol=1e-6, rtol=1e-4), name

"""Two processes whose model FSDP2 has sharded compute as one."""

from __future__ import annotations

import pytest
import torch

from align.media.images import ImageStore
from align.records import Pair, read_jsonl, write_jsonl
from tests.dpo.conftest import make_pairs
from tests.dpo.sharded_head import ADAPTERS, mean_loss, shared_model, take_steps, write_sharded
from tests.dpo.test_rows import ORDERS, pairs_of_questions
from tests.forks import in_two_processes


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

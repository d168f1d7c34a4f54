"""DPO steps a second and peak memory: ours against stock TRL with a live reference, on the same pairs.

    python scripts/bench_dpo.py             # table over prompt lengths
    python scripts/bench_dpo.py --quick     # 1000/120 and 400/60 only, three repeats

A step is forward, backward and AdamW on one pair, from a batch that has been collated before: opening images and
tokenising are left out on both sides (stock TRL does them twice a pair). The peer's batch is what TRL's collator makes
(tests/dpo/test_equals_trl.py). Ours finds the reference's log-probabilities in the batch; what computing them costs is
measured too, and `with reference` is the ratio of a single epoch, in which that is paid once a pair. Peak memory is
that of all tensors alive during a step: weights, reference, gradients, optimiser state and activations, on a CPU
counted by their storages (scripts/live_tensors.py), on a GPU by the allocator.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_common import Comparison, arguments, compare_in_turn, finish, prompt_inputs, start
from datasets import Dataset
from live_tensors import peak_bytes
from trl import DPOConfig, DPOTrainer

from align.dpo.collator import plain_batch, shared_batch
from align.dpo.shared import log_prob_head
from align.dpo.trainer import PairTrainer, pair_dataset
from align.records import Pair

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.tiny_models import llava_onevision_processor

LENGTHS = [(200, 60), (400, 60), (1000, 120), (2000, 150), (4000, 200)]
QUICK_LENGTHS = [(400, 60), (1000, 120)]
HEADLINE = (1000, 120)
TOLERANCE = 1e-3


class Batches:
    """One pair in both layouts, and what a data set needs to stand for it."""

    def __init__(self, model: Any, prompt: int, response: int) -> None:
        generator = torch.Generator().manual_seed(1)
        responses = [[torch.randint(1, 4000, (response,), generator=generator).tolist()] for _ in range(2)]
        inputs = prompt_inputs(model, prompt)
        twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
        self.plain = plain_batch(twice, responses, pad_token_id=0)
        self.shared = shared_batch(inputs, responses, pad_token_id=0)
        turn = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
        self.pair = Pair(id="pair", prompt=[{"role": "user", "content": "?"}], chosen=turn[0], rejected=turn[1])


class Step:
    """A trainer that repeats one step on one batch."""

    def __init__(self, trainer: DPOTrainer, batch: dict[str, Any]) -> None:
        self.trainer = trainer
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        self.batch = trainer._prepare_inputs(batch)
        self.losses: list[float] = []

    def __call__(self) -> None:
        self.losses.append(float(self.trainer.training_step(self.trainer.model, dict(self.batch))))
        self.trainer.optimizer.step()
        self.trainer.model.zero_grad()

    def standing(self) -> Iterator[torch.Tensor]:
        """Everything that is alive before a step."""
        for model in (self.trainer.model, self.trainer.ref_model):
            if model is not None:
                yield from model.parameters()
                yield from model.buffers()
        for state in self.trainer.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
        yield from self.batch.values()


def trainer_arguments(folder: str, device: str) -> DPOConfig:
    return DPOConfig(
        output_dir=folder,
        max_length=None,
        per_device_train_batch_size=1,
        learning_rate=1e-5,
        bf16=device != "cpu",
        use_cpu=device == "cpu",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def stock_step(model: Any, batches: Batches, folder: str, device: str) -> Step:
    """TRL as it is: two full rows a pair, and a reference model beside the policy."""
    row = {
        "images": [],
        "prompt": batches.pair.prompt,
        "chosen": batches.pair.chosen,
        "rejected": batches.pair.rejected,
    }
    trainer = DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(model),
        args=trainer_arguments(folder, device),
        train_dataset=Dataset.from_list([row]),
        data_collator=lambda rows: batches.plain,
        processing_class=llava_onevision_processor(),
    )
    return Step(trainer, dict(batches.plain))


class GivenBatch:
    """Stands for the collator of a batch that is there already."""

    layout = "shared"


def our_step(model: Any, batches: Batches, folder: str, device: str, reference: torch.Tensor) -> Step:
    """Ours: the prompt once a pair, and the reference's log-probabilities with the batch."""
    trainer = PairTrainer(
        copy.deepcopy(model),
        args=trainer_arguments(folder, device),
        train_dataset=pair_dataset([batches.pair], [(float(reference[0]), float(reference[1]))]),
        data_collator=GivenBatch(),
        processor=llava_onevision_processor(),
    )
    columns = {"ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:]}
    return Step(trainer, batches.shared | columns | {"pair_index": torch.tensor([0])})


@torch.no_grad()
def reference_log_probs(model: Any, batch: dict[str, torch.Tensor], device: str) -> torch.Tensor:
    """What is computed once a round: the log-probabilities of both responses under the reference."""
    batch = {name: value.to(device) for name, value in batch.items()}
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
        return model(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)


def measure(model: Any, prompt: int, response: int, repeats: int, device: str) -> Comparison:
    batches = Batches(model, prompt, response)
    with tempfile.TemporaryDirectory() as folder:
        with log_prob_head(model, shared=True):
            reference = reference_log_probs(model, batches.shared, device)
            seconds = []
            for _ in range(repeats):
                began = time.perf_counter()
                reference_log_probs(model, batches.shared, device).tolist()
                seconds.append(time.perf_counter() - began)
        theirs = stock_step(model, batches, folder, device)
        ours = our_step(model, batches, folder, device, reference)
        result = compare_in_turn({"prompt": prompt, "response": response}, ours, theirs, repeats=repeats)
        difference = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
        assert difference < TOLERANCE or device != "cpu", f"the losses differ by {difference}"
        result.ours_mib = peak_bytes(ours, ours.standing()) / 2**20
        result.theirs_mib = peak_bytes(theirs, theirs.standing()) / 2**20
    one_epoch = statistics.median(result.theirs_s) / (statistics.median(result.ours_s) + statistics.median(seconds))
    result.label |= {
        "TRL pairs/s": f"{1 / statistics.median(result.theirs_s):.2f}",
        "our pairs/s": f"{1 / statistics.median(result.ours_s):.2f}",
        "with reference": f"{one_epoch:.2f}",
        "memory": f"{result.ours_mib / result.theirs_mib:.2f}",
    }
    return result


def main() -> None:
    options = arguments(__doc__).parse_args()
    warnings.filterwarnings("ignore")
    model = start(options)
    found = []
    for prompt, response in QUICK_LENGTHS if options.quick else LENGTHS:
        found.append(measure(model, prompt, response, options.repeats, options.device))
        print(f"{prompt}/{response}: {found[-1].ratio:.2f}", flush=True)
    target = next(c for c in found if (c.label["prompt"], c.label["response"]) == HEADLINE)
    finish(options, found, target)


if __name__ == "__main__":
    main()

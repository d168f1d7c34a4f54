"""DPO steps per second and peak memory: ours against stock TRL with a live reference, on the same pairs.

    python scripts/bench_dpo.py             # table over prompt lengths
    python scripts/bench_dpo.py --quick     # 1000/120 and 400/60 only, three repeats
    python scripts/bench_dpo.py --question  # all pairs of five responses in one row, against the same pairs apart
    python scripts/bench_dpo.py --size valley-eagle-7b   # on a GPU: pairs/s, model FLOPs utilisation, peak GiB

A step is forward, backward and AdamW on one pair, from a batch that has been collated before: opening images and
tokenising are left out on both sides (stock TRL does them twice a pair). The peer's batch is what TRL's collator makes
(tests/dpo/test_equals_trl.py). Ours finds the reference's log-probabilities in the batch; what computing them costs is
measured too, and `with reference` is the ratio of a single epoch, in which that is paid once a pair. Peak memory is
that of all tensors alive during a step: weights, reference, gradients, optimiser state and activations, on a CPU
counted by their storages (scripts/live_tensors.py), on a GPU by the allocator.

On a CPU part of the ratio is the vocabulary projection: TRL makes it for every position there, on a GPU for those of
the responses only, as ours does everywhere. With a vocabulary of 600 words instead of 4096, which leaves little of it,
the ratio at 1000/120 was 2.7 where it was 3.6 before (two runs on a busy machine).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_common
import torch
from bench_common import Comparison, arguments, compare_in_turn, finish, prompt_inputs, start
from datasets import Dataset
from live_tensors import peak_bytes
from trl import DPOConfig, DPOTrainer
from valley_size import SIZES, build_valley, peak_flops, prompt_of_one_image, work_of

from align.dpo.collator import pair_dataset, plain_batch, shared_batch
from align.dpo.shared_forward import log_prob_head
from align.dpo.step_memory import GIB, How, StepBatch, training_memory
from align.dpo.tokenize import TokenizedPair
from align.dpo.trainer import PairTrainer
from align.models.shapes import model_shape
from align.records import Pair

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.tiny_models import llava_onevision_processor

LENGTHS = [(200, 60), (400, 60), (1000, 120), (2000, 150), (4000, 200)]
QUICK_LENGTHS = [(400, 60), (1000, 120)]
HEADLINE = (1000, 120)
TOLERANCE = 1e-3
PUBLISHED_PAIRS_S = 0.588


PAIR_COUNTS = (1, 2, 4, 10)
NUM_RESPONSES = 5


class Batches:
    """Pairs in both layouts, and what a data set needs to stand for one."""

    def __init__(self, inputs: dict[str, torch.Tensor], response: int, vocab_size: int, pairs: int = 1) -> None:
        branches = [responses_of(2, response, vocab_size, seed) for seed in range(1, pairs + 1)]
        inputs = {name: torch.cat([value.cpu()] * pairs) for name, value in inputs.items()}
        twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
        places = [(row, side) for side in range(2) for row in range(pairs)]
        self.unshared = plain_batch(twice, [branches[row][side] for row, side in places], pad_token_id=0)
        self.shared = shared_batch(inputs, branches, places, pad_token_id=0)
        self.pairs = pairs
        turn = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
        self.pair = Pair(id="pair", prompt=[{"role": "user", "content": "?"}], chosen=turn[0], rejected=turn[1])


def responses_of(count: int, length: int, vocab_size: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab_size // 2, (length,), generator=generator).tolist() for _ in range(count)]


class Step:
    """A trainer that repeats one step on the same micro-batches."""

    def __init__(self, trainer: DPOTrainer, *batches: dict[str, Any]) -> None:
        self.trainer = trainer
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        self.batches = [trainer._prepare_inputs(batch) for batch in batches]
        self.losses: list[float] = []
        self.accumulation = 1

    def __call__(self) -> None:
        for batch in self.batches * self.accumulation:
            self.losses.append(float(self.trainer.training_step(self.trainer.model, dict(batch))))
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
        for batch in self.batches:
            yield from batch.values()


def trainer_arguments(folder: str, device: str, **settings: Any) -> DPOConfig:
    defaults = {
        "output_dir": folder,
        "max_length": None,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-5,
        "bf16": device != "cpu",
        "use_cpu": device == "cpu",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return DPOConfig(**(defaults | settings))


def stock_trainer(model: Any, pair: Pair, folder: str, device: str) -> DPOTrainer:
    """TRL as it is: two full rows per pair, and a reference model beside the policy."""
    row = {"images": [], "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(model),
        args=trainer_arguments(folder, device),
        train_dataset=Dataset.from_list([row]),
        data_collator=lambda rows: rows,
        processing_class=llava_onevision_processor(),
    )


class GivenBatch:
    """Stands for the collator of a batch that is there already."""

    layout = "shared"


def our_trainer(model: Any, folder: str, device: str, *, in_place: bool = False, **settings: Any) -> PairTrainer:
    trainer = PairTrainer(
        model if in_place else copy.deepcopy(model),
        args=trainer_arguments(folder, device, **settings),
        train_dataset=pair_dataset([TokenizedPair("pair", [], "", 1, [1], [2])], [(0.0, 0.0)]),
        data_collator=GivenBatch(),
        processor=llava_onevision_processor(),
    )
    if settings.get("gradient_checkpointing"):
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    return trainer


def with_reference(batch: dict[str, torch.Tensor], reference: torch.Tensor) -> dict[str, torch.Tensor]:
    """A shared batch with the log-probabilities of the reference, as the data set would bring them."""
    chosen, rejected = reference.chunk(2)
    columns = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return batch | columns | {"pair_index": torch.zeros(len(chosen), dtype=torch.long)}


@torch.no_grad()
def reference_log_probs(model: Any, batch: dict[str, torch.Tensor], device: str) -> torch.Tensor:
    """What is computed once a round: the log-probabilities of both responses under the reference."""
    batch = {name: value.to(device) for name, value in batch.items()}
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
        return model(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)


def measure(model: Any, prompt: int, response: int, repeats: int, device: str) -> Comparison:
    batches = Batches(prompt_inputs(model, prompt), response, model.config.text_config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        with log_prob_head(model, shared=True):
            reference = reference_log_probs(model, batches.shared, device)
            seconds = []
            for _ in range(repeats):
                began = time.perf_counter()
                reference_log_probs(model, batches.shared, device).tolist()
                seconds.append(time.perf_counter() - began)
        theirs = Step(stock_trainer(model, batches.pair, folder, device), dict(batches.unshared))
        ours = Step(our_trainer(model, folder, device), with_reference(batches.shared, reference))
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


class Question:
    """`count` pairs of five responses to one question: in one row, each in a row of its own, and as TRL has them."""

    def __init__(self, model: Any, prompt: int, response: int, count: int, folder: str, device: str) -> None:
        inputs = {name: value.cpu() for name, value in prompt_inputs(model, prompt).items()}
        twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
        responses = responses_of(NUM_RESPONSES, response, model.config.text_config.vocab_size)
        pairs = list(itertools.combinations(range(NUM_RESPONSES), 2))[:count]
        used = responses[: 1 + max(rejected for _, rejected in pairs)]
        places = [(0, pair[side]) for side in range(2) for pair in pairs]
        together = shared_batch(inputs, [used], places, pad_token_id=0)
        apart = [
            shared_batch(inputs, [[responses[i] for i in pair]], [(0, 0), (0, 1)], pad_token_id=0) for pair in pairs
        ]
        plain = [plain_batch(twice, [responses[i] for i in pair], pad_token_id=0) for pair in pairs]
        with log_prob_head(model, shared=True):
            together = with_reference(together, reference_log_probs(model, together, device))
            apart = [with_reference(batch, reference_log_probs(model, batch, device)) for batch in apart]
        stock = stock_trainer(model, Batches(inputs, response, 99).pair, folder, device)
        self.steps = {
            "one row": Step(our_trainer(model, folder, device), together),
            "rows of pairs": Step(our_trainer(model, folder, device), *apart),
            "stock TRL": Step(stock, *plain),
        }
        for step in self.steps.values():
            step.trainer.current_gradient_accumulation_steps = len(step.batches)


def measure_question(options: argparse.Namespace) -> None:
    """The table over n pairs; all three sides in turn. Separate pairs are micro-batches of one, as is the default."""
    model = start(options)
    print(
        "| n pairs | one row s | rows of pairs s | ratio | spread | stock TRL s | ratio | spread | MiB | of one pair |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    single = None
    for count in PAIR_COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            steps = Question(model, *HEADLINE, count, folder, options.device).steps
            for step in steps.values():
                step()
            totals = [sum(step.losses) for step in steps.values()]
            assert max(totals) - min(totals) < TOLERANCE, f"the losses differ: {totals}"
            times = {name: [] for name in steps}
            for _ in range(options.repeats):
                for name, step in steps.items():
                    times[name].append(bench_common.seconds(step))
            ours = steps["one row"]
            peak = peak_bytes(ours, ours.standing()) / 2**20
            single = single or peak
        cells = [f"{count}", f"{statistics.median(times['one row']):.2f}"]
        for peer in ("rows of pairs", "stock TRL"):
            ratios = sorted(a / b for a, b in zip(times[peer], times["one row"], strict=True))
            spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
            cells += [f"{statistics.median(times[peer]):.2f}", f"{statistics.median(ratios):.2f}", spread]
        print("| " + " | ".join([*cells, f"{peak:.0f}", f"{peak / single:.2f}x"]) + " |", flush=True)


def measure_valley(options: argparse.Namespace) -> None:
    """Our step at full size: one 800 x 600 image, 150-token responses, towers frozen, as Valley2-DPO was trained.

    Weights, gradients and AdamW's moments are bfloat16, which is what fits beside each other on one GPU (17.8, 15.6
    and 31.1 GB); a real run keeps float32 weights and spreads them over several.
    """
    device, on_gpu = options.device, options.device != "cpu"
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model, processor = build_valley(options.size, device, dtype)
    inputs = prompt_of_one_image(processor)
    work = work_of(model, inputs, options.response)
    batches = Batches(inputs, options.response, model.config.vocab_size, options.pairs)
    settings = {"gradient_checkpointing": options.checkpointing, "optim": options.optim}
    with tempfile.TemporaryDirectory() as folder:
        with log_prob_head(model, shared=True):
            reference = reference_log_probs(model, batches.shared, device).cpu()
        step = Step(
            our_trainer(model, folder, device, in_place=True, **settings), with_reference(batches.shared, reference)
        )
        step.accumulation = options.accumulation
        step()
        seconds = [_timed(step) for _ in range(options.repeats)]
        peak = peak_bytes(step, step.standing()) / 2**30
    pairs = options.pairs * options.accumulation
    rates = sorted(pairs / second for second in seconds)
    rate = statistics.median(rates)
    print(f"{options.size}: {work.prompt_tokens} prompt tokens, 2 x {work.response_tokens} response tokens per pair")
    print(
        f"{options.pairs} pairs per forward, optimiser {options.optim} every {options.accumulation} forwards, weights"
        f" {dtype}"
    )
    print(
        f"{rate:.3f} pairs/s ({rates[0]:.3f} to {rates[-1]:.3f}), {rate * work.tokens:.0f} tokens/s, peak"
        f" {peak:.1f} GiB"
    )
    found = {
        "pairs_per_s": rate,
        "tokens_per_s": rate * work.tokens,
        "tflop_per_pair": work.flops / 1e12,
        "peak_gib": peak,
    }
    found |= {"planned_gib": planned_gib(model, inputs, options), "mfu": None}
    print(f"planned peak {found['planned_gib']:.1f} GiB")
    if (peak_rate := peak_flops()) is not None:
        found["mfu"] = rate * work.flops / peak_rate
        print(
            f"model FLOPs utilisation {100 * rate * work.flops / peak_rate:.1f} % ({work.flops / 1e12:.1f} TFLOP a"
            " pair)"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if options.size == "valley-eagle-7b":
        print(f"the published Valley2-DPO run had {PUBLISHED_PAIRS_S} pairs/s a GPU (of a type that is not recorded)")
        print(f"ratio: {rate / PUBLISHED_PAIRS_S:.2f}")


def planned_gib(model: Any, inputs: dict[str, torch.Tensor], options: argparse.Namespace) -> float:
    """What `align plan` counts for the step of `measure_valley`."""
    size = 2 if options.device != "cpu" else 4
    pixels = sum(value.numel() for value in inputs.values() if value.is_floating_point())
    batch = StepBatch(
        options.pairs,
        int(inputs["attention_mask"].sum()),
        options.response,
        options.response,
        pixels=options.pairs * pixels,
    )
    how = How(
        weight_bytes=size,
        compute_bytes=size,
        checkpointing=options.checkpointing,
        accumulates=options.accumulation > 1,
        optimizer=options.optim,
    )
    return training_memory(model_shape(model), batch, how).total / GIB


def _timed(step: Step) -> float:
    began = time.perf_counter()
    # Every step reads its loss back, so that the device is idle when it returns but for the optimiser.
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", choices=("small", *SIZES), default="small", help="which model")
    valley = parser.add_argument_group("with --size valley-eagle-7b")
    valley.add_argument("--response", type=int, default=150, help="tokens of a response")
    valley.add_argument("--pairs", type=int, default=1, help="pairs per forward")
    valley.add_argument("--accumulation", type=int, default=2, help="forwards a step of the optimiser")
    valley.add_argument("--optim", default="adamw_torch_fused", help="transformers' name of the optimiser")
    valley.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute activations"
    )
    parser.add_argument("--question", action="store_true", help="pairs of one question in one row, a table over n")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.size != "small":
        measure_valley(options)
        return
    if options.question:
        measure_question(options)
        return
    model = start(options)
    found = []
    for prompt, response in QUICK_LENGTHS if options.quick else LENGTHS:
        found.append(measure(model, prompt, response, options.repeats, options.device))
        print(f"{prompt}/{response}: {found[-1].ratio:.2f}", flush=True)
    target = next(c for c in found if (c.label["prompt"], c.label["response"]) == HEADLINE)
    finish(options, found, target)


if __name__ == "__main__":
    main()

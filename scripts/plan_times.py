"""Measured seconds of every stage on one CPU thread, beside those that `align plan`'s model of time expects."""

from __future__ import annotations

import gc
import random
import statistics
import string
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from align.dpo.collator import PairCollator, pair_dataset
from align.dpo.reference import ReferenceKey, reference_log_probs
from align.dpo.tokenize import tokenize_pairs
from align.dpo.trainer import PairTrainer
from align.engines.base import SampleRequest, SamplingSettings
from align.engines.local import LocalEngine
from align.media.images import ImageStore
from align.models.modules import freeze_parts
from align.models.shapes import model_shape
from align.plan.branched_sizes import CountingModel
from align.plan.measured import machine_of
from align.plan.prompt_sizes import PromptMeter, PromptSize
from align.plan.speed import Machine, Speed
from align.plan.times import Training, judging, reading, referencing, sampling, training_steps
from align.records import Pair, Question
from align.selftest.measure import measure
from reward.critics import Item, make_critic
from tests import tiny_models
from tests.dpo.conftest import make_args

STAGES = ("sample", "score", "reference", "dpo", "evaluate")
ACCUMULATION = 4
# Random heads predict nearly uniformly: so that nuclei are as small as a trained model's.
HEAD_STD = 0.3


@dataclass(frozen=True)
class Timed:
    """One configuration: sizes of the model, and what is asked of it. Image tiles are `tile_px` wide."""

    name: str
    hidden: int = 256
    layers: int = 4
    inner: int = 1024
    vocabulary: int = 4096
    vision: int = 128
    tile_px: int = 112
    text: int = 120
    response: int = 32
    samples: int = 5
    questions: int = 6
    checkpointing: bool = False


TIMED = [
    Timed("reference"),
    Timed("long prompt", text=900),
    Timed("long responses", response=160),
    Timed("K = 8", samples=8, response=24),
    Timed("wide", hidden=512, inner=2048, layers=3),
    Timed("deep and narrow", hidden=128, inner=512, layers=12),
    Timed("large vocabulary", vocabulary=32768),
    Timed("large tower, many patches", vision=256, tile_px=224),
    Timed("checkpointed", text=500, checkpointing=True),
]


def calibrate() -> Machine:
    """What this CPU does with one thread, in processor seconds, since others use the machine, too."""
    decoder = tiny_models.llava_onevision(hidden_size=32, num_layers=8).get_decoder()
    return machine_of(measure(torch.device("cpu"), decoder, clock=time.process_time), 1)


class Bench:
    """A configuration's model with its questions, answers and pairs; stages run in it and are planned for it."""

    def __init__(self, timed: Timed, folder: Path) -> None:
        self.timed, self.folder = timed, folder
        self.model = tiny_models.llava_onevision(
            hidden_size=timed.hidden,
            num_layers=timed.layers,
            intermediate_size=timed.inner,
            vocab_size=timed.vocabulary,
            vision_hidden_size=timed.vision,
            vision_layers=4,
            tile_px=timed.tile_px,
        )
        with torch.no_grad():
            self.model.lm_head.weight.normal_(std=HEAD_STD)
        self.processor = tiny_models.llava_onevision_processor(tile_px=timed.tile_px)
        self.images = ImageStore(folder)
        freeze_parts(self.model, ["vision"])
        self.questions = [self._question(index) for index in range(timed.questions)]
        self.engine = LocalEngine(self.model, self.processor, open_image=self.images.open)
        self.engine.eos_token_ids = []
        given = [self._pair(question, index) for index, question in enumerate(self.questions)]
        self.pairs = tokenize_pairs(given, self.processor, self.images).pairs

    def _question(self, index: int) -> Question:
        name = f"{index}.png"
        side = self.timed.tile_px
        tiny_models.random_image(index, width=2 * side, height=2 * side).save(self.folder / name)
        return Question(id=f"q{index}", question=_text(self.timed.text, index), images=[name])

    def _pair(self, question: Question, index: int) -> Pair:
        sides = [_text(self.timed.response - 1, 100 * index + side) for side in (1, 2)]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in sides)
        return Pair(
            id=question.id, images=question.images, prompt=question.messages(), chosen=chosen, rejected=rejected
        )

    def requests(self, samples: int) -> list[SampleRequest]:
        return [
            SampleRequest(q.id, q.messages(), tuple(q.images), num_samples=samples, seed=n)
            for n, q in enumerate(self.questions)
        ]

    def items(self) -> list[Item]:
        texts = [tuple(_text(self.timed.response, 1000 + k) for k in range(self.timed.samples))] * len(self.questions)
        return [
            Item(id=q.id, question=q.as_text(), images=tuple(q.images), responses=responses)
            for q, responses in zip(self.questions, texts, strict=True)
        ]

    # The stages as they run.

    def sample(self, samples: int, *, greedy_first: bool = False) -> None:
        settings = SamplingSettings(
            temperature=1.0, top_p=0.9, max_new_tokens=self.timed.response, greedy_first=greedy_first
        )
        self.engine.sample(self.requests(samples), settings, lambda result: None)

    def score(self) -> None:
        make_critic("pairwise", {}, judge_model=self.engine).judge(self.items())

    def evaluate(self) -> None:
        self.sample(2, greedy_first=True)

    def reference(self) -> None:
        path = self.folder / "reference.safetensors"
        path.unlink(missing_ok=True)
        reference_log_probs(
            path,
            ReferenceKey("", "", "", "shared", "float32", "None"),
            self.pairs,
            collator=PairCollator(self.processor, self.images, "shared"),
            load_model=lambda: self.model,
            autocast=lambda: torch.autocast("cpu", enabled=False),
            batch_size=1,
            state=PartialState(cpu=True),
        )

    def trainer(self) -> PairTrainer:
        args = make_args(
            self.folder / "out",
            per_device_train_batch_size=1,
            gradient_accumulation_steps=ACCUMULATION,
            gradient_checkpointing=self.timed.checkpointing,
            learning_rate=1e-6,
            logging_steps=100,
            num_train_epochs=1,
        )
        return PairTrainer(
            self.model,
            args=args,
            train_dataset=pair_dataset(self.pairs, [(-100.0, -90.0)] * len(self.pairs)),
            data_collator=PairCollator(self.processor, self.images, layout="shared"),
            processor=self.processor,
        )

    # What is planned.

    def sizes(self) -> list[PromptSize]:
        meter = PromptMeter(self.processor, self.images)
        return [meter.size(q.id, q.messages(), q.images) for q in self.questions]

    def planned(self, machine: Machine) -> dict[str, float]:
        timed, sizes = self.timed, self.sizes()
        speed = Speed(model_shape(self.model), machine, 4)
        judge_model = CountingModel(self.engine.prompter, timed.response)
        make_critic("pairwise", {}, judge_model=judge_model).judge(self.items()[:1])
        training = Training(
            pairs=1,
            chosen=timed.response,
            rejected=timed.response,
            rows=1,
            accumulation=ACCUMULATION,
            checkpointing=timed.checkpointing,
            shared=True,
            live=False,
            frozen_towers=True,
        )
        greedy = sampling(speed, sizes, 1, timed.response, greedy=True)
        costs = {
            "sample": sampling(speed, sizes, timed.samples, timed.response),
            "score": judging(speed, sizes, judge_model.asked[0]),
            "reference": referencing(speed, sizes, training),
            "dpo": training_steps(speed, sizes, training),
            "evaluate": greedy + sampling(speed, sizes, 2, timed.response),
            "_reading": reading(speed, sizes),
        }
        return {name: cost.seconds(machine) for name, cost in costs.items()}

    def measured(self, repeats: int) -> dict[str, float]:
        """Processor seconds, the least of some runs; the first batch, with its proof, is not among them."""
        self.sample(1)
        self.score()
        found = {
            "sample": self._least(lambda: self.sample(self.timed.samples), repeats),
            "score": self._least(self.score, repeats),
            "evaluate": self._least(self.evaluate, repeats),
            "reference": self._least(self.reference, repeats),
        }
        trainer = self.trainer()
        trainer.train()
        found["dpo"] = self._least(lambda: trainer.train(), repeats)
        return found

    def _least(self, run: Callable[[], Any], repeats: int) -> float:
        seconds = []
        for _ in range(repeats):
            gc.collect()
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
        return min(seconds)


def _text(length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(string.ascii_lowercase + " ", k=length))


def times_table(only: str | None = None, repeats: int = 1) -> None:
    """Print planned and measured seconds, and their ratio, of every stage of every configuration."""
    torch.set_num_threads(1)
    print("| configuration | prompt | GFLOP/s, GB/s of weights and arrays, us a layer | " + " | ".join(STAGES) + " |")
    print("|---|---|---|" + "---|" * len(STAGES))
    ratios: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for timed in TIMED:
        if only and only not in timed.name:
            continue
        with tempfile.TemporaryDirectory() as name:
            bench = Bench(timed, Path(name))
            # Anew each time: others use the machine, too.
            machine = calibrate()
            planned, measured = bench.planned(machine), bench.measured(repeats)
            tokens = statistics.mean(size.tokens for size in bench.sizes())
        cells = []
        for stage in STAGES:
            ratio = planned[stage] / measured[stage]
            ratios[stage].append(ratio)
            cells.append(f"{planned[stage]:.2f} / {measured[stage]:.2f} = {ratio:.2f}")
        speed = (
            f"{1000 * machine.tflops:.0f}, {machine.bandwidth_gbs:.0f} and {machine.arrays_gbs:.0f},"
            f" {machine.layer_us:.0f}"
        )
        print(f"| {timed.name} | {tokens:.0f} | {speed} | " + " | ".join(cells) + " |", flush=True)
    print()
    for stage, found in ratios.items():
        print(f"{stage}: {min(found):.2f} to {max(found):.2f} of measured")


if __name__ == "__main__":
    times_table()

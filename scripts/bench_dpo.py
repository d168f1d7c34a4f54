"""DPO steps a second and peak memory: ours against stock TRL with a live reference, on the same pairs.

    python scripts/bench_dpo.py             # table over prompt lengths, about 15 minutes on a CPU
    python scripts/bench_dpo.py --quick     # 1000/120 and 400/60 only, fewer repeats
    python scripts/bench_dpo.py --size valley-eagle-7b   # on a GPU: our step alone, pairs/s, MFU, peak GiB

A step is forward, backward and AdamW on one pair, float32, from a batch that has been collated before: opening images
and tokenising are left out on both sides (stock TRL does them twice). Ours finds the reference's log-probabilities in
the batch; what computing them costs is measured too and shown as a ratio of its own, for a single epoch, in which it
is paid once a pair. Peak memory is that of all tensors alive during a step: weights, reference, gradients, optimiser
state and activations.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_common import Ratio, Size, alternate, build_model, describe_machine, peak_bytes, question_of, tiny_models
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from align.dpo.collator import PairCollator
from align.dpo.reference import group_log_probs
from align.dpo.shared import log_prob_head
from align.dpo.trainer import PairTrainer, pair_dataset
from align.images import ImageStore
from align.records import Pair

LENGTHS = [(200, 60), (400, 60), (1000, 120), (2000, 150), (4000, 200)]
QUICK_LENGTHS = [(400, 60), (1000, 120)]
HEADLINE = (1000, 120)


@dataclass(frozen=True)
class Row:
    """What was measured at one prompt and response length."""

    prompt: int
    response: int
    trl_pairs_s: float
    our_pairs_s: float
    ratio: Ratio
    ratio_with_reference: Ratio
    memory_ratio: float
    loss_difference: float


def make_pair(folder: Path, processor: Any, image_tokens: int, prompt: int, response: int) -> Pair:
    """A pair with one image, `prompt` tokens before the responses and `response` tokens in each of them."""
    tiny_models.random_image(0, 300, 300).save(folder / "image.png")
    question = question_of(processor, image_tokens, prompt)
    # One token a character, and two for the end of the turn.
    texts = [(word * response)[: response - 2] for word in ("good words ", "other ones ")]
    return Pair(
        id="pair",
        images=["image.png"],
        prompt=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
        chosen=[{"role": "assistant", "content": texts[0]}],
        rejected=[{"role": "assistant", "content": texts[1]}],
    )


def arguments(folder: str) -> DPOConfig:
    return DPOConfig(
        output_dir=folder,
        max_length=None,
        per_device_train_batch_size=1,
        learning_rate=1e-6,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


class Step:
    """A trainer that repeats one step on one collated batch."""

    def __init__(self, trainer: DPOTrainer, rows: list[dict[str, Any]]) -> None:
        self.trainer = trainer
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        self.batch = trainer._prepare_inputs(trainer.data_collator(rows))
        self.loss = float("nan")

    def __call__(self) -> None:
        self.loss = float(self.trainer.training_step(self.trainer.model, dict(self.batch)))
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
        yield from (value for value in self.batch.values() if isinstance(value, torch.Tensor))

    def peak(self) -> int:
        with peak_bytes(self.standing) as result:
            self()
        return result[0]


def stock(model: Any, processor: Any, pair: Pair, images: ImageStore, folder: str) -> Step:
    row = {
        "images": [images.open(name) for name in pair.images],
        "prompt": [{"role": "user", "content": pair.prompt[0]["content"][1]["text"]}],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
    }
    trainer = DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(model),
        args=arguments(folder),
        train_dataset=Dataset.from_list([row]),
        processing_class=processor,
    )
    return Step(trainer, [row])


def shared(
    model: Any, processor: Any, pair: Pair, images: ImageStore, folder: str, reference: tuple[float, float]
) -> Step:
    dataset = pair_dataset([pair], [reference])
    trainer = PairTrainer(
        copy.deepcopy(model),
        args=arguments(folder),
        train_dataset=dataset,
        data_collator=PairCollator(processor, images, "shared"),
        processor=processor,
    )
    return Step(trainer, list(dataset))


class ReferencePass:
    """The reference's log-probabilities of one pair, as they are computed once a round."""

    def __init__(self, model: Any, processor: Any, pair: Pair, images: ImageStore) -> None:
        self.model = copy.deepcopy(model).eval()
        self.collator = PairCollator(processor, images, "shared")
        self.pair = pair
        # Collated before, as for the steps.
        inputs = self.collator.collate([pair])
        self.collator.batch = lambda *_: dict(inputs)  # type: ignore[method-assign]

    @torch.no_grad()
    def __call__(self) -> tuple[float, float]:
        with log_prob_head(self.model, shared=True):
            (line,) = group_log_probs(self.model, [[self.pair]], self.collator, nullcontext)
        return line.logps


def measure(size: Size, prompt: int, response: int, repeats: int) -> Row:
    model, processor, image_tokens = build_model(size, prompt)
    with tempfile.TemporaryDirectory() as folder:
        images = ImageStore(Path(folder))
        pair = make_pair(Path(folder), processor, image_tokens, prompt, response)
        reference = ReferencePass(model, processor, pair, images)
        peer = stock(model, processor, pair, images, folder)
        ours = shared(model, processor, pair, images, folder, reference())
        mask = peer.batch["completion_mask"]
        assert peer.batch["attention_mask"].sum(dim=1).tolist() == [prompt + response] * 2
        assert mask.sum(dim=1).tolist() == [response] * 2
        seconds = alternate({"trl": peer, "ours": ours, "reference": reference}, repeats)
        difference = abs(peer.loss - ours.loss)
        memory = ours.peak() / peer.peak()
    with_reference = [a + b for a, b in zip(seconds["ours"], seconds["reference"], strict=True)]
    return Row(
        prompt,
        response,
        trl_pairs_s=repeats / sum(seconds["trl"]),
        our_pairs_s=repeats / sum(seconds["ours"]),
        ratio=Ratio.of(seconds["trl"], seconds["ours"]),
        ratio_with_reference=Ratio.of(seconds["trl"], with_reference),
        memory_ratio=memory,
        loss_difference=difference,
    )


def print_table(rows: list[Row]) -> None:
    print("| prompt | response | TRL pairs/s | ours pairs/s | ratio [quartiles] | with reference pass | peak memory |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.prompt} | {row.response} | {row.trl_pairs_s:.2f} | {row.our_pairs_s:.2f} | {row.ratio} "
            f"| {row.ratio_with_reference} | {row.memory_ratio:.2f}x |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two lengths and few repeats")
    parser.add_argument("--repeats", type=int, help="rounds that are timed")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    size = Size()
    repeats = options.repeats or (5 if options.quick else 11)
    print(f"{describe_machine()}; LLaVA-OneVision {size}; {repeats} rounds")
    rows = []
    for prompt, response in QUICK_LENGTHS if options.quick else LENGTHS:
        rows.append(measure(size, prompt, response, repeats))
        print(f"{prompt}/{response}: {rows[-1].ratio}, memory {rows[-1].memory_ratio:.2f}x", flush=True)
    print()
    print_table(rows)
    if options.json:
        options.json.write_text(
            json.dumps(
                [
                    vars(row) | {"ratio": vars(row.ratio), "ratio_with_reference": vars(row.ratio_with_reference)}
                    for row in rows
                ],
                indent=1,
            )
        )
    headline = next(row for row in rows if (row.prompt, row.response) == HEADLINE)
    print(
        f"\nat {headline.prompt}/{headline.response}, quartiles {headline.ratio.low:.2f} to {headline.ratio.high:.2f}"
    )
    print(f"ratio: {headline.ratio.median:.2f}")


if __name__ == "__main__":
    main()

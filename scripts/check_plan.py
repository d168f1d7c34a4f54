"""`align plan`'s memory model against the measured peaks of real training steps, one line a configuration.

    python scripts/check_plan.py            memory
    OMP_NUM_THREADS=1 python scripts/check_plan.py --times

Trains two steps on random images with the toolkit's own trainer and counts every tensor alive (on a
CPU; on a GPU the allocator says). Weights are random and small enough for a laptop;
the shapes are those of real models.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.dpo.collator import PairCollator, pair_dataset
from align.dpo.step_memory import How, Memory, training_memory
from align.dpo.tokenize import TokenizedPair, tokenize_pairs
from align.dpo.trainer import PairTrainer
from align.media.images import ImageStore
from align.models.meta import with_adapter
from align.models.modules import freeze_parts
from align.models.shapes import model_shape
from align.plan.prompt_sizes import patch_size, step_batch
from align.records import Pair
from scripts.live_tensors import peak_bytes
from scripts.plan_times import times_table
from tests import tiny_models, tiny_vlms
from tests.dpo.conftest import make_args

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One line: the model's sizes, the batch, and what is traded for memory."""

    name: str
    sizes: dict[str, Any] = field(default_factory=dict)
    rows: int = 1
    prompt: int = 300
    response: int = 60
    shared: bool = True
    checkpointing: bool = False
    freeze: tuple[str, ...] = ("vision",)
    bf16: bool = False
    accumulation: int = 2
    build: str = "llava_onevision"
    lora: dict[str, Any] | None = None
    dropout: bool = False


SMALL = {"hidden_size": 128, "num_layers": 4, "intermediate_size": 512, "vocab_size": 2000}
MIDDLE = {"hidden_size": 192, "num_layers": 8, "intermediate_size": 768, "vocab_size": 4000}
WIDE = {"hidden_size": 384, "num_layers": 2, "num_heads": 6, "intermediate_size": 2048, "vocab_size": 1000}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
TWO, ALL = {"r": 8, "target_modules": ["q_proj", "v_proj"]}, {"r": 16, "target_modules": ATTENTION + FEED_FORWARD}
HEADS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
EXPERTS = {"hidden_size": 128, "num_hidden_layers": 4, "num_experts": 8, "moe_intermediate_size": 192, "head_dim": 16}
DENSE = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384, "head_dim": 16}
EXPERTS["rope_parameters"] = DENSE["rope_parameters"] = HEADS  # type: ignore[assignment]
CASES = [
    Case("small, short", SMALL),
    Case("small, short, checkpointed", SMALL, checkpointing=True),
    Case("small, long prompt", SMALL, prompt=1000),
    Case("small, long responses", SMALL, response=400),
    Case("small, 4 rows", SMALL, rows=4),
    Case("small, separate rows", SMALL, prompt=800, shared=False),
    Case("small, everything trained", {**SMALL, "vision_hidden_size": 128, "vision_layers": 6}, freeze=()),
    Case("middle, 2 rows", MIDDLE, rows=2),
    Case("middle, 2 rows, checkpointed", MIDDLE, rows=2, checkpointing=True),
    Case("middle, bf16 arithmetic", MIDDLE, prompt=300, bf16=True),
    Case("middle, no accumulation", MIDDLE, accumulation=1),
    Case("wide", WIDE, prompt=600),
    Case("wide, language frozen", WIDE, prompt=600, freeze=("vision", "language")),
    Case("middle, vision, projector, embeddings frozen", MIDDLE, freeze=("vision", "projector", "embeddings")),
    Case("middle, embeddings and head frozen", MIDDLE, freeze=("vision", "embeddings", "head")),
    Case("middle, bf16, language frozen", MIDDLE, freeze=("vision", "language"), bf16=True),
    Case("middle, LoRA on queries and values", MIDDLE, lora=TWO),
    Case("middle, LoRA on all", MIDDLE, lora=ALL),
    Case("middle, LoRA on all, dropout", MIDDLE, lora=ALL | {"lora_dropout": 0.1}, dropout=True),
    Case("middle, LoRA on all, checkpointed", MIDDLE, lora=ALL, checkpointing=True),
    Case("middle, LoRA on all, bf16 arithmetic", MIDDLE, lora=ALL, bf16=True),
    Case("middle, LoRA on all, bf16, checkpointed", MIDDLE, lora=ALL, bf16=True, checkpointing=True),
    Case("small, LoRA, long prompt", SMALL, lora=TWO, prompt=1000),
    Case("small, LoRA on vision too", {**SMALL, "vision_hidden_size": 128, "vision_layers": 6}, lora=ALL, rows=2),
    Case("experts", EXPERTS, build="qwen3_vl_moe", shared=False),
    Case("experts, checkpointed", EXPERTS, build="qwen3_vl_moe", shared=False, checkpointing=True),
    Case("experts, long prompt", EXPERTS, build="qwen3_vl_moe", shared=False, prompt=800),
    Case("experts, LoRA on attention", EXPERTS, build="qwen3_vl_moe", shared=False, lora=TWO),
    Case("no experts, normed heads", DENSE, build="qwen3_vl", prompt=600),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="cases whose names hold this")
    parser.add_argument("--times", action="store_true", help="seconds of every stage instead of memory")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    if options.times:
        times_table(options.only)
        return
    print("| configuration | prompt + responses | planned MiB | measured MiB | planned / measured |")
    print("|---|---|---|---|---|")
    worst = 0.0
    for case in CASES:
        if options.only and options.only not in case.name:
            continue
        planned, measured, lengths = check(case)
        ratio = planned.total / measured
        worst = max(worst, abs(ratio - 1))
        print(
            f"| {case.name} | {case.rows} x ({lengths}) | {planned.total / MIB:.1f} | {measured / MIB:.1f} |"
            f" {ratio:.3f} |",
            flush=True,
        )
    print(f"\nfurthest from measured: {100 * worst:.1f} %")


def check(case: Case) -> tuple[Memory, int, str]:
    """The planned peak, the measured one in bytes, and the lengths of a row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, processor = build(case)
        pairs = make_pairs(folder, case)
        images = ImageStore(folder)
        if case.lora is None:
            freeze_parts(model, case.freeze)
        tokenized = tokenize_pairs(pairs, processor, images).pairs
        how = How(
            checkpointing=case.checkpointing,
            shared=case.shared,
            accumulates=case.accumulation > 1,
            compute_bytes=2 if case.bf16 else 4,
            repeated_keys=not case.shared,
            triton=torch.cuda.is_available(),
            dropout=case.dropout,
        )
        batch = step_batch(processor, pairs[: case.rows], images, patch_size(model))
        planned = training_memory(model_shape(shaped(model, case.lora)), batch, how)
        measured = measure(case, model, processor, tokenized, images, folder)
        first = tokenized[0]
        return planned, measured, f"{first.prompt_tokens} + {len(first.chosen_ids)} + {len(first.rejected_ids)}"


def shaped(model: Any, lora: dict[str, Any] | None) -> Any:
    """The model that `align plan` would look at: without weights, with the adapter."""
    if lora is None:
        return model
    with torch.device("meta"):
        empty = type(model)(model.config)
    return with_adapter(empty, LoraConfig(**lora))


def build(case: Case) -> tuple[Any, Any]:
    if case.build != "llava_onevision":
        return getattr(tiny_vlms, case.build)(**case.sizes)
    return tiny_models.llava_onevision(0, **case.sizes), tiny_models.llava_onevision_processor()


def make_pairs(folder: Path, case: Case) -> list[Pair]:
    """Pairs of about the wanted lengths: a token is a byte, and a tenth of the prompt is
    the template's and the image's."""
    pairs = []
    for number in range(2 * case.accumulation * case.rows):
        tiny_models.random_image(number).save(folder / f"{number}.png")
        question = {"type": "text", "text": "?" * max(case.prompt - 60, 1)}
        pairs.append(
            Pair(
                id=f"p{number}",
                images=[f"{number}.png"],
                prompt=[{"role": "user", "content": [{"type": "image"}, question]}],
                chosen=[{"role": "assistant", "content": "a" * case.response}],
                rejected=[{"role": "assistant", "content": "b" * (case.response * 3 // 4)}],
            )
        )
    return pairs


def measure(
    case: Case, model: Any, processor: Any, pairs: list[TokenizedPair], images: ImageStore, folder: Path
) -> int:
    args = make_args(
        folder / "out",
        per_device_train_batch_size=case.rows,
        gradient_accumulation_steps=case.accumulation,
        gradient_checkpointing=case.checkpointing,
        bf16=case.bf16,
        disable_dropout=not case.dropout,
        warmup_steps=0,
        learning_rate=1e-4,
    )
    trainer = PairTrainer(
        model,
        args=args,
        train_dataset=pair_dataset(pairs, [(-100.0, -90.0)] * len(pairs)),
        data_collator=PairCollator(processor, images, layout="shared" if case.shared else "plain"),
        processor=processor,
        peft_config=LoraConfig(**case.lora) if case.lora else None,
    )
    gc.collect()
    return peak_bytes(trainer.train, [*trainer.model.parameters(), *trainer.model.buffers()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""What training Valley-Eagle-7B on 1, 8, 64 and 256 GPUs should need and give: the tables of docs/scaling.md.

    python scripts/scaling_table.py

Memory comes from `align.dpo.step_memory`, operations from `scripts/valley_size.py`, both of the model's real shapes on
torch's meta device; communication from the sizes of what each strategy exchanges. What a GPU and a network achieve is
assumed (the constants below). No GPU is used and nothing is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.dpo.step_memory import GIB, How, StepBatch, training_memory
from align.models.shapes import ModelShape, model_shape
from align.plan.speed import GPUS_PER_NODE, NETWORK_GBS, NODE_GBS, sent_bytes
from scripts.valley_size import Work, build_valley, prompt_of_one_image, work_of

NUM_GPUS = (1, 8, 64, 256)
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
RESPONSE_TOKENS = 200
# An H100's dense bfloat16 operations per second, as its maker states them,
# and the share that training is assumed to reach.
PEAK_FLOPS, UTILISATION = 989e12, 0.40
# One pair at a time on a GPU; so many times per step.
ACCUMULATION = (1, 8)


def how_of(strategy: str, num_gpus: int) -> How:
    """fp32 weights with bf16 arithmetic, gradient checkpointing on."""
    return How(
        strategy=strategy if num_gpus > 1 else "ddp",
        num_processes=num_gpus,
        weight_bytes=4,
        compute_bytes=2,
        checkpointing=True,
        accumulates=True,
    )


def step_seconds(strategy: str, shape: ModelShape, work: Work, num_gpus: int, accumulation: int) -> tuple[float, float]:
    """(computing, communicating): if they overlap wholly the larger counts, if not at all their sum.

    Checkpointing computes the language model's forward pass twice: a third more than forward and backward.
    """
    computing = accumulation * work.flops * 4 / 3 / (PEAK_FLOPS * UTILISATION)
    # Inside a node NVLink is assumed, between nodes 400 Gbit/s a GPU.
    bandwidth = NODE_GBS if num_gpus <= GPUS_PER_NODE else NETWORK_GBS
    return computing, sent_bytes(strategy, shape, num_gpus, accumulation) / (bandwidth * 1e9)


def memory_rows(shape: ModelShape, batch: StepBatch) -> Iterator[str]:
    yield "| strategy | GPUs | weights | gradients | optimiser | activations | working | sum |"
    yield "|---|---|---|---|---|---|---|---|"
    for strategy in STRATEGIES:
        for num_gpus in NUM_GPUS:
            if num_gpus == 1 and strategy != "ddp":
                continue
            memory = training_memory(shape, batch, how_of(strategy, num_gpus))
            parts = (
                memory.weights,
                memory.gradients,
                memory.optimiser,
                memory.activations,
                memory.working,
                memory.total,
            )
            yield f"| {strategy} | {num_gpus} | " + " | ".join(f"{part / GIB:.1f}" for part in parts) + " |"


def speed_rows(shape: ModelShape, work: Work) -> Iterator[str]:
    yield "| strategy | GPUs | times per step | sent per GPU and step, GB | computing, s | communicating, s | pairs/s |"
    yield "|---|---|---|---|---|---|---|"
    for strategy in STRATEGIES:
        for num_gpus in NUM_GPUS:
            if num_gpus == 1 and strategy != "ddp":
                continue
            for accumulation in ACCUMULATION:
                computing, communicating = step_seconds(strategy, shape, work, num_gpus, accumulation)
                pairs = num_gpus * accumulation
                slow, fast = pairs / (computing + communicating), pairs / max(computing, communicating)
                sent = sent_bytes(strategy, shape, num_gpus, accumulation) / 1e9
                rate = f"{slow:.1f}" if num_gpus == 1 else f"{slow:.0f} to {fast:.0f}"
                cells = f"{accumulation} | {sent:.0f} | {computing:.2f} | {communicating:.2f} | {rate}"
                yield f"| {strategy} | {num_gpus} | {cells} |"


def main() -> None:
    model, processor = build_valley("valley-eagle-7b", "meta", torch.float32)
    inputs = prompt_of_one_image(processor)
    shape, work = model_shape(model), work_of(model, inputs, RESPONSE_TOKENS)
    batch = StepBatch(
        num_rows=1,
        prompt_tokens=work.prompt_tokens,
        chosen_tokens=RESPONSE_TOKENS,
        rejected_tokens=RESPONSE_TOKENS,
        pixels=sum(value.numel() for value in inputs.values() if value.is_floating_point()),
    )
    print(f"weights: {shape.weights / 1e9:.2f} billion, trained (vision frozen): {shape.trained / 1e9:.2f} billion")
    print(
        f"a pair: prompt of {work.prompt_tokens} tokens, two responses of {RESPONSE_TOKENS}: {work.flops / 1e12:.0f}"
        " TFLOP"
    )
    print("\nGiB of one GPU:\n")
    print("\n".join(memory_rows(shape, batch)))
    print()
    print("\n".join(speed_rows(shape, work)))


if __name__ == "__main__":
    main()

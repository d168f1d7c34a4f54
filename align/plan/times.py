"""Sizes of questions, settings and the speed of a model on a machine in; what each stage computes, in seconds, out.

One function a stage, as the code of the stage does it: one prefill a question and batches of branches behind it
(`sample`, `evaluate`), one row of all branches (`score`), one forward for all responses of a question (`reference`),
forward and backward over `[prompt | chosen | rejected]` (`dpo`). Without a shared prefix every response repeats its
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.engines.batch_size import CPU_TOKENS, GPU_TOKENS, MEMORY_SHARE
from align.plan.prompt_sizes import PromptSize
from align.plan.speed import (
    BACKWARD_START,
    FORWARD,
    GRADIENT_PASSES,
    GREEDY_PASSES,
    LOG_PROB_PASSES,
    NUCLEUS_PASSES,
    STATISTICS_PASSES,
    Cost,
    Pass,
    Speed,
)
from align.prefix.plans import GROUPING_PAYS

# Until an engine knows how large its items are (`align.engines.batch_size.FIRST_ITEMS`).
FIRST_BATCH = 2


@dataclass(frozen=True)
class BranchedSize:
    """What a critic is asked about one question: `prompt_tokens` without those of images, `segment_tokens` of all
    branches behind it, in `groups` of at most `group_tokens`; `read_tokens` are projected, `new_tokens` written by each
    of `branches`."""

    prompt_tokens: int
    segment_tokens: int
    groups: int
    group_tokens: int
    branches: int
    read_tokens: int
    new_tokens: int = 0


@dataclass(frozen=True)
class Training:
    """How a round is trained: what a step is, and the rows of a question, each a pair or (`dpo.rows`) all of them.

    `chosen` and `rejected`: tokens of the `branches` responses of a row, half of them each.
    """

    pairs: float
    chosen: float
    rejected: float
    rows: int
    accumulation: int
    checkpointing: bool
    shared: bool
    live: bool
    frozen_towers: bool
    shards: int = 1
    kept_share: float = 0.0
    branches: float = 2


def reading(
    speed: Speed, sizes: Sequence[PromptSize], batch: float = 1, *, more_tokens: float = 0, shared: bool = True
) -> Cost:
    """Every question encoded once: towers, projector, and the language model over the prompt.

    `shared`: of its last layer only what predicts a response is computed.
    """
    calls = 1 / batch
    total = Cost()
    for size in sizes:
        tokens = size.tokens + more_tokens
        total += seeing(speed, size, calls)
        unread = tokens - 1 if shared else 0
        total += speed.layers(speed.shape.text, tokens, tokens * tokens / 2, unread=unread, calls=calls)
    return total


def seeing(speed: Speed, size: PromptSize, calls: float = 1) -> Cost:
    """The images of one question: made ready, towers and projector."""
    if not size.patches:
        return Cost(0.0, size.prepared_s)
    return (
        Cost(0.0, size.prepared_s)
        + speed.towers(size.patches, size.patch_scores, calls)
        + speed.projector(size.visual_tokens)
    )


def sampling(
    speed: Speed, sizes: Sequence[PromptSize], branches: int, tokens: float, *, fixed_batch: int | None = None,
    shared: bool = True, greedy: bool = False,
) -> Cost:  # fmt: skip
    """`branches` responses of `tokens` to every question."""
    prompt = _mean([size.tokens for size in sizes])
    passes = GREEDY_PASSES if greedy else NUCLEUS_PASSES
    if not shared:
        written = speed.writing(branches, 1, prompt, tokens, passes)
        return reading(speed, sizes, shared=False).times(branches, 1) + written.times(len(sizes))
    first = min(FIRST_BATCH, len(sizes))
    rest = len(sizes) - first
    total = speed.writing(first, branches, prompt, tokens, passes)
    batch: float = first
    if rest:
        batch = max(1.0, min(fixed_batch or batch_of(speed, prompt, branches * tokens), rest))
        total += speed.writing(batch, branches, prompt, tokens, passes).times(rest / batch)
    return total + reading(speed, sizes, batch)


def batch_of(speed: Speed, prompt: float, new_tokens: float) -> float:
    """Questions at a time, as `align.engines.batch_size` has it."""
    if speed.machine.waits:
        return max(1.0, CPU_TOKENS // prompt)
    text = speed.shape.text
    keys = 2 * text.num_layers * text.key * speed.number_bytes
    working = (12 * text.hidden + 4 * text.inner) * speed.number_bytes
    room = MEMORY_SHARE * (speed.machine.usable_bytes - speed.shape.weights * speed.number_bytes)
    needed = prompt * (keys + working) + new_tokens * keys
    return max(1.0, min(GPU_TOKENS // prompt, room // needed))


def judging(
    speed: Speed,
    sizes: Sequence[PromptSize],
    branched: BranchedSize,
    *,
    fixed_batch: int | None = None,
    shared: bool = True,
) -> Cost:
    """One branched prompt per question; `sizes` are those of the bare questions with the critic's processor."""
    prompts = [branched.prompt_tokens + size.visual_tokens for size in sizes]
    total = Cost()
    for size, prompt in zip(sizes, prompts, strict=True):
        batch = max(1, min(fixed_batch or int(batch_of(speed, prompt + branched.segment_tokens, 0)), len(sizes)))
        if shared:
            tokens = float(prompt + branched.segment_tokens)
            scores = prompt * prompt / 2 + segment_scores(
                prompt, branched.segment_tokens, branched.groups, branched.group_tokens
            )
            repeats, unread = 1, prompt - 1
        else:
            each, repeats = prompt + branched.segment_tokens / branched.branches, branched.branches
            tokens, scores, unread = each * repeats, repeats * each * each, 0
        total += seeing(speed, size, 1 / batch).times(repeats)
        total += speed.layers(speed.shape.text, tokens, scores, unread=unread, calls=repeats / batch)
        total += speed.head(branched.read_tokens or branched.branches, LOG_PROB_PASSES, calls=1 / batch)
        if branched.new_tokens:
            behind = prompt + branched.segment_tokens
            written = speed.writing(batch, branched.branches, behind, branched.new_tokens, GREEDY_PASSES)
            total += written.times(1 / batch)
    return total


def segment_scores(prompt: float, segments: float, groups: float, width: float) -> float:
    """Queries times keys behind a prompt, by the way that `align.prefix.plans` chooses."""
    together, apart = segments * (prompt + segments), groups * width * (prompt + width)
    return apart if together > GROUPING_PAYS * apart else together


def through_layers(speed: Speed, sizes: Sequence[PromptSize], training: Training, way: Pass = FORWARD) -> Cost:
    """The language model once over all pairs, forward or backward."""
    total = Cost()
    responses = training.chosen + training.rejected
    for size in sizes:
        if training.shared:
            tokens, unread = size.tokens + responses, size.tokens - 1
            scores = size.tokens * size.tokens / 2 + segment_scores(
                size.tokens, responses, training.branches, responses / training.branches
            )
        else:
            row = size.tokens + max(training.chosen, training.rejected)
            tokens, scores, unread = 2 * row, 2 * row * row, 0
        total += speed.layers(speed.shape.text, tokens, scores, unread=unread, calls=1 / training.rows, way=way)
    return total.times(training.pairs)


def through_head(
    speed: Speed, sizes: Sequence[PromptSize], training: Training, passes: float, products: float = 1
) -> Cost:
    """The responses' tokens onto the vocabulary; without a shared prefix and TRL's kernels, every token."""
    scored = len(sizes) * (training.chosen + training.rejected)
    if not training.shared and speed.machine.waits:
        scored += 2 * sum(size.tokens for size in sizes)
    scored *= training.pairs
    return speed.head(scored, passes, products=products, calls=training.pairs * len(sizes) / training.rows)


def _seen(speed: Speed, sizes: Sequence[PromptSize], training: Training) -> Cost:
    total = Cost()
    for size in sizes:
        total += seeing(speed, size, 1 / training.rows)
    return total.times(training.pairs * (1 if training.shared else 2), training.pairs)


def referencing(speed: Speed, sizes: Sequence[PromptSize], training: Training) -> Cost:
    """The reference's log-probabilities of every pair, once a round."""
    return (
        _seen(speed, sizes, training)
        + through_layers(speed, sizes, training)
        + through_head(speed, sizes, training, LOG_PROB_PASSES)
    )


def training_steps(speed: Speed, sizes: Sequence[PromptSize], training: Training) -> Cost:
    """One epoch: forward and backward over every pair, and a step of the optimiser every so many."""
    seen, forward = _seen(speed, sizes, training), through_layers(speed, sizes, training)
    back = backward(speed)
    total = seen + forward + through_layers(speed, sizes, training, back)
    # Backward computes the logits again.
    head = 2 + (1 if speed.shape.text.flows else 0) + (1 if speed.shape.head_trained else 0)
    total += through_head(speed, sizes, training, STATISTICS_PASSES + GRADIENT_PASSES, products=head)
    if training.checkpointing:
        total += forward.times(1 - training.kept_share)
    if not training.frozen_towers:
        total += Cost(seen.work * back.arrays, seen.start * BACKWARD_START)
    if training.live:
        total += referencing(speed, sizes, training)
    steps = training.pairs * len(sizes) / (training.rows * training.accumulation)
    return total + speed.optimiser().times(steps / training.shards)


def backward(speed: Speed) -> Pass:
    """Going backward: a product for the inputs' gradients and one for those of trained weights; twice the arrays."""
    text = speed.shape.text
    if not text.flows:
        return Pass(0, 0, 0, 0)
    frozen = text.frozen_linear / text.layer_weights
    return Pass(2 - frozen, 2.5, 2, BACKWARD_START)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

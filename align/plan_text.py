"""A plan in, what a terminal shows of it out."""

from __future__ import annotations

from align.memory import GIB, Memory
from align.plan import SHOWN, Plan

BAR = 40
PARTS = ("weights", "gradients", "optimiser", "activations", "working", "batch")


def plan_text(plan: Plan) -> str:
    """Tokens, memory, time and what does not fit, as a person reads it."""
    blocks = [_tokens(plan), _memory(plan), _time(plan), "assumed: " + "; ".join(plan.assumptions)]
    return "\n\n".join(block for block in blocks if block)


def histogram(values: list[int], *, bins: int = 8) -> list[str]:
    """Lines of a histogram with bins of equal width.

    >>> histogram([10, 12, 30], bins=2)
    ['   10-20       2 ########################################', '   21-31       1 ####################']
    """
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // bins))
    counts = [0] * bins
    for value in values:
        counts[(value - low) // width] += 1
    while counts and not counts[-1]:
        counts.pop()
    return [
        f"{low + i * width:>5}-{low + (i + 1) * width - 1:<5}{count:>5} " + "#" * round(BAR * count / max(counts))
        for i, count in enumerate(counts)
    ]


def _tokens(plan: Plan) -> str:
    tokens = [size.tokens for size in plan.sizes]
    visual = sum(size.visual_tokens for size in plan.sizes)
    lines = [
        f"{len(tokens)} prompts, {sum(tokens):,} tokens, {visual / max(sum(tokens), 1):.0%} of them visual; longest {max(tokens):,}"
    ]
    lines += histogram(tokens)
    limit = f"{plan.limit:,}" if plan.limit is not None else "unknown"
    if plan.too_long:
        named = ", ".join(plan.too_long[:SHOWN]) + (", ..." if len(plan.too_long) > SHOWN else "")
        lines.append(
            f"{len(plan.too_long)} prompts with the longest response pass the limit of {limit} tokens: {named}; raise "
            "dpo.max_length, lower sample.max_new_tokens or model.processor.max_pixels. Nothing is truncated"
        )
    else:
        lines.append(f"all fit in the limit of {limit} tokens with the longest response")
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    machine = plan.machine
    memories = [fit.memory for fit in plan.fits] + [plan.whole_model, plan.sampling]
    unit = "GiB" if max(memory.total for memory in memories) > 0.1 * GIB else "MiB"
    lines = [
        f"memory of each of {machine.gpus} GPUs with {machine.gpu_gib:g} GiB, at the peak of a training step ({unit})",
        f"{'':<10}" + "".join(f"{part:>12}" for part in PARTS) + f"{'total':>10}",
    ]
    for fit in plan.fits:
        lines.append(_row(fit.strategy, fit.memory, unit) + ("  fits" if fit.fits else f"  no: {fit.remedy}"))
    lines.append(_row("reference", plan.whole_model, unit) + _verdict(plan, plan.whole_model) + " (the whole model)")
    lines.append(_row("sampling", plan.sampling, unit) + _verdict(plan, plan.sampling) + " (one question)")
    return "\n".join(lines)


def _row(name: str, memory: Memory, unit: str) -> str:
    size = GIB if unit == "GiB" else 2**20
    cells = "".join(f"{getattr(memory, part) / size:>12.2f}" for part in PARTS)
    return f"{name:<10}{cells}{memory.total / size:>10.2f}"


def _verdict(plan: Plan, memory: Memory) -> str:
    return "  fits" if memory.total <= plan.machine.usable_bytes else "  does not fit"


def _time(plan: Plan) -> str:
    lines = ["time of a round: " + ", ".join(f"{stage} {duration(s)}" for stage, s in plan.seconds.items())]
    total = sum(plan.seconds.values()) * plan.rounds
    lines.append(f"{plan.rounds} rounds: {duration(total)}, {total * plan.machine.gpus / 3600:.2f} GPU hours")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """
    >>> duration(0.4), duration(200), duration(7300)
    ('0.4 s', '3.3 min', '2.0 h')
    """
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

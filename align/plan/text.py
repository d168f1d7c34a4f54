"""A plan in, what a terminal of some width shows of it out."""

from __future__ import annotations

import shutil
import statistics
import sys
import textwrap

from align.dpo.step_memory import GIB, Memory
from align.plan.make import Plan

NARROWEST, WIDEST = 80, 110
SHOWN = 5
COLUMNS = {
    "weights": ("weights",),
    "grads": ("gradients",),
    "optim": ("optimiser",),
    "activ": ("activations",),
    "work": ("working", "batch"),
}


def plan_text(plan: Plan, *, width: int | None = None) -> str:
    """Tokens, memory, time and what does not fit, as a person reads it; `width` in characters, else the terminal's."""
    width = min(max(width or shutil.get_terminal_size((80, 24)).columns, NARROWEST), WIDEST)
    blocks = [_model(plan, width), _tokens(plan, width), _memory(plan, width), _time(plan, width)]
    assumed = [textwrap.fill(f"- {line}", width, subsequent_indent="  ") for line in plan.assumptions]
    return "\n\n".join([*blocks, "\n".join(["assumed", *assumed])])


def bar(share: float, length: int) -> str:
    """A bar of at most `length` characters, of blocks where the terminal has them."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    block = "█" if encoding.lower().startswith("utf") else "#"
    return block * max(round(share * length), 1 if share > 0 else 0)


def histogram(values: list[int], *, length: int = 40, bins: int = 8) -> list[str]:
    """Lines of a histogram with bins of equal width; bars of at most `length` characters.

    >>> [line.replace("█", "#") for line in histogram([10, 12, 30], length=4, bins=2)]
    ['  10-20  2 ####', '  21-31  1 ##']
    """
    low, high = min(values), max(values)
    step = max(1, -(-(high - low + 1) // bins))
    counts = [0] * bins
    for value in values:
        counts[(value - low) // step] += 1
    while counts and not counts[-1]:
        counts.pop()
    names = [f"{low + i * step:,}-{low + (i + 1) * step - 1:,}" for i in range(len(counts))]
    wide, figures = max(map(len, names)), max(len(f"{count:,}") for count in counts)
    return [
        f"  {name:>{wide}}  {count:>{figures},} {bar(count / max(counts), length)}".rstrip()
        for name, count in zip(names, counts, strict=True)
    ]


def _model(plan: Plan, width: int) -> str:
    total = sum(plan.parameters.values())
    parts = ", ".join(f"{part} {_count(number)}" for part, number in plan.parameters.items())
    active = (
        f", {_count(plan.active)} pass for a token" if plan.active < 0.7 * plan.parameters.get("language", 0) else ""
    )
    line = f"model    {_count(total)} weights ({parts}){active}; {_count(plan.trained)} trained"
    return textwrap.fill(line, width, subsequent_indent=" " * 9)


def _tokens(plan: Plan, width: int) -> str:
    tokens = [size.tokens for size in plan.sizes]
    visual = sum(size.visual_tokens for size in plan.sizes)
    lines = [
        (
            f"tokens   {len(tokens):,} prompts, {_count(sum(tokens))} tokens, {visual / max(sum(tokens), 1):.0%}"
            f" visual; median {round(statistics.median(tokens)):,}, longest {max(tokens):,}"
        ),
        *histogram(tokens, length=max(width - 40, 20)),
    ]
    if plan.limit is None:
        lines.append("  the checkpoint names no limit of tokens: set dpo.max_length to have one")
    elif not plan.never_fit and not plan.too_long:
        lines.append(f"  all fit in {plan.limit:,} tokens with the longest response ({plan.response_limit:,})")
    else:
        lines += _does_not_fit(plan, width)
    return "\n".join(lines)


def _does_not_fit(plan: Plan, width: int) -> list[str]:
    happens = "would be dropped, and counted" if plan.drops else "would stop the run (dpo.on_too_long: error)"
    found = []
    if plan.never_fit:
        found.append(
            f"{len(plan.never_fit):,} prompts alone pass the limit of {plan.limit:,} tokens: {_named(plan.never_fit)}"
        )
    if plan.too_long:
        found.append(
            f"{len(plan.too_long):,} prompts pass the limit of {plan.limit:,} tokens with a response of "
            f"{plan.response_limit:,}: {_named(plan.too_long)}"
        )
    found.append(
        f"nothing is truncated: such pairs {happens}. To change: dpo.max_length, sample.max_new_tokens, or fewer visual"
        " tokens (model.processor)"
    )
    return [textwrap.fill(line, width, initial_indent="  ! ", subsequent_indent="    ") for line in found]


def _named(ids: list[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (f", and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else "")


def _memory(plan: Plan, width: int) -> str:
    machine = plan.machine
    memories = [fit.memory for fit in plan.fits] + [whole.memory for whole in plan.whole]
    unit, size = ("GiB", GIB) if max(memory.total for memory in memories) > 0.1 * GIB else ("MiB", 2**20)
    usable = machine.usable_bytes / size
    of = f"of each of {machine.gpus} GPUs" if machine.gpus > 1 else "of the GPU"
    lines = [
        f"memory   {of}, {unit}; {_amount(usable)} of {_amount(machine.gpu_gib * GIB / size)} can be used",
        f"  {'':<11}" + "".join(f"{name:>9}" for name in COLUMNS) + f"{'total':>9}",
    ]
    for fit in plan.fits:
        mark = "> " if fit.strategy == plan.strategy else "  "
        lines.append(mark + _row(fit.strategy, fit.memory, size) + ("  fits" if fit.fits else "  too much"))
    for whole in plan.whole:
        lines.append("  " + _row(whole.name, whole.memory, size) + ("  fits" if whole.fits else "  too much"))
    lines += [textwrap.fill(line, width, subsequent_indent="    ") for line in _verdict(plan, size, unit)]
    return "\n".join(lines)


def _verdict(plan: Plan, size: int, unit: str) -> list[str]:
    lines = []
    chosen = plan.configured
    if chosen.fits:
        lines.append(f"  launch.strategy {chosen.strategy} fits")
    elif plan.changes:
        ways = [f"{change.settings} ({change.memory.total / size:.1f} {unit})" for change in plan.changes]
        lines.append(
            f"  ! launch.strategy {chosen.strategy} does not fit. The cheapest change that does: {'; or '.join(ways)}"
        )
    else:
        missing = (chosen.memory.total - plan.machine.usable_bytes) / size
        lines.append(
            f"  ! launch.strategy {chosen.strategy} does not fit ({missing:.1f} {unit} are missing), and nothing that"
            " is known here helps: use larger GPUs, shorter responses or a smaller model"
        )
    for whole in plan.whole:
        if not whole.fits:
            lines.append(f"  ! {whole.name} does not fit on one GPU: {_REMEDIES[whole.name]}")
    return lines


_REMEDIES = {
    "reference": "it stands whole there before training: launch.strategy=zero3, or model.dtype=bfloat16",
    "sample": "serve the policy (sample.servers), or lower sample.num_responses or max_new_tokens",
    "critic": "serve the critic (critic.servers)",
}


def _amount(value: float) -> str:
    """
    >>> _amount(75370.4), _amount(79.25)
    ('75,370', '79.25')
    """
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _row(name: str, memory: Memory, size: int) -> str:
    cells = "".join(f"{sum(getattr(memory, part) for part in parts) / size:>9.1f}" for parts in COLUMNS.values())
    return f"{name:<11}{cells}{memory.total / size:>9.1f}"


def _time(plan: Plan, width: int) -> str:
    gpus = plan.machine.gpus
    lines = [
        f"time     {plan.rounds} round{'s' * (plan.rounds > 1)} on {gpus} GPU{'s' * (gpus > 1)}",
        f"  {'':<11}{'once':>10}{'times':>7}{'read':>9}{'written':>9}{'in all':>10}{'GPU h':>9}",
    ]
    total = sum(stage.seconds * stage.runs for stage in plan.stages)
    room = width - 70
    for stage in plan.stages:
        whole = stage.seconds * stage.runs
        share = f"  {bar(whole / total, room) if total else ''}" if room >= 8 else ""
        lines.append(
            f"  {stage.name:<11}{duration(stage.seconds):>10}{stage.runs:>7g}{_count(stage.read_tokens):>9}"
            f"{_count(stage.written_tokens):>9}{duration(whole):>10}{whole * gpus / 3600:>9.2f}"
            + (f"  {stage.note}" if stage.note else share)
        )
    read, written = (
        sum(round(getattr(stage, name) * stage.runs) for stage in plan.stages)
        for name in ("read_tokens", "written_tokens")
    )
    tokens = f"{_count(read):>9}{_count(written):>9}"
    lines.append(f"  {'all rounds':<11}{'':>10}{'':>7}{tokens}{duration(total):>10}{plan.gpu_hours:>9.2f}")
    return "\n".join(line.rstrip() for line in lines)


def _count(number: float) -> str:
    """
    >>> _count(950), _count(12_300), _count(6_912_331), _count(8_880_000_000)
    ('950', '12.3k', '6.91M', '8.88B')
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """
    >>> duration(0.4), duration(200), duration(7300)
    ('0.4 s', '3.3 min', '2.0 h')
    """
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

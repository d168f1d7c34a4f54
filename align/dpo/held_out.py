"""Pairs in, those that are held out of training to choose by, and the rest, out; and what is done with their metrics.

Whole questions are held out, drawn by the seed and the question alone. After every `dpo.eval_steps` optimiser steps,
and after the last one, TRL gives loss, margin and accuracy of their pairs; with `dpo.keep: best` the round's checkpoint
is the state in which `dpo.keep_metric` was best, and with `dpo.patience` training ends when it no longer improves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.config import DpoSettings
from align.dpo.rows import by_question
from align.dpo.tokenize import TokenizedPair
from align.errors import UserError
from align.log import log

# What is called so in TRL's logs, and whether more of it is better.
METRICS = {
    "loss": ("eval_loss", False),
    "margin": ("eval_rewards/margins", True),
    "accuracy": ("eval_rewards/accuracies", True),
}


def evaluation_fields(settings: DpoSettings, batch_size: int) -> dict[str, Any]:
    """The fields of TRL's DPOConfig that look at held-out pairs while training, and keep the best state."""
    if settings.eval_steps is None:
        return {}
    # A ratio of all steps below 1, as transformers has it.
    steps = settings.eval_steps if settings.eval_steps < 1 else int(settings.eval_steps)
    fields = {"eval_strategy": "steps", "eval_steps": steps, "per_device_eval_batch_size": batch_size}
    if settings.keep == "last":
        return fields
    name, more_is_better = METRICS[settings.keep_metric]
    return fields | {
        "load_best_model_at_end": True,
        "metric_for_best_model": name,
        "greater_is_better": more_is_better,
        "save_strategy": "steps",
        "save_steps": steps,
        # The best and the newest, which a training that was stopped resumes from.
        "save_total_limit": settings.trainer_fields().get("save_total_limit", 2),
    }


def evaluation_faults(settings: DpoSettings) -> list[str]:
    """What of `eval_steps`, `held_out`, `keep` and `patience` has no effect, or no meaning, beside the others."""
    given = settings.trainer_fields()
    faults = []
    if settings.eval_steps is None and settings.keep == "best":
        faults.append("dpo.keep: best needs dpo.eval_steps, the steps between two looks at held-out pairs")
    if settings.keep == "last" and settings.patience is not None:
        faults.append("dpo.patience needs dpo.keep: best")
    if settings.keep == "best":
        faults += [
            f"dpo.{name} cannot be set with dpo.keep: best, which saves a candidate at every dpo.eval_steps"
            for name in ("save_steps", "save_strategy")
            if name in given
        ]
    if settings.eval_steps is not None and settings.eval_steps >= 1 and settings.eval_steps % 1:
        faults.append(f"dpo.eval_steps: expected whole steps or a share below 1, found {settings.eval_steps:g}")
    return faults


def split_pairs(
    pairs: Sequence[TokenizedPair], share: float, seed: int
) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """Those that are trained on, and those of about `share` of the questions, at least one, that are not; in order.

    Raises:
        UserError: all pairs are of one question.

    >>> pairs = [TokenizedPair(str(n), [], str(n // 2), 1, [1], [2]) for n in range(20)]
    >>> trained, held_out = split_pairs(pairs, 0.2, seed=0)
    >>> len(trained), len(held_out), {pair.prompt for pair in trained} & {pair.prompt for pair in held_out}
    (16, 4, set())
    """
    groups = by_question(pairs)
    if len(groups) < 2:
        raise UserError("all pairs are of one question: none can be held out", fix="take dpo.eval_steps out")

    def drawn(group: list[int]) -> str:
        pair = pairs[group[0]]
        return hashlib.sha256("\n".join([str(seed), pair.prompt, *pair.image_files]).encode()).hexdigest()

    count = min(max(1, round(share * len(groups))), len(groups) - 1)
    held_out = {index for group in sorted(groups, key=drawn)[:count] for index in group}
    return (
        [pair for index, pair in enumerate(pairs) if index not in held_out],
        [pair for index, pair in enumerate(pairs) if index in held_out],
    )


class LookAtHeldOut(TrainerCallback):
    """Looks once more after the last step, and ends training when the metric has not improved for `patience` looks.

    What it goes by is the trainer's log, which a resumed training has, too.
    """

    def __init__(self, settings: DpoSettings) -> None:
        self.metric, self.more_is_better = METRICS[settings.keep_metric]
        self.patience = settings.patience

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A callback of the trainer's."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
            control.should_save = control.should_save or bool(args.load_best_model_at_end)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A callback of the trainer's."""
        if self.patience is None:
            return
        values = [entry[self.metric] for entry in state.log_history if self.metric in entry]
        best = values.index(max(values) if self.more_is_better else min(values))
        if len(values) - 1 - best >= self.patience:
            control.should_training_stop = True
            if state.is_world_process_zero:
                log.info("training ends at step %d: %s", state.global_step, _no_better(self.metric, self.patience))


def what_was_kept(settings: DpoSettings, state: TrainerState, num_pairs: int) -> dict[str, str]:
    """For the manifest: which state became the checkpoint, and why."""
    if settings.eval_steps is None:
        return {}
    name, _ = METRICS[settings.keep_metric]
    looks = [(entry["step"], entry[name]) for entry in state.log_history if name in entry]
    course = ", ".join(f"{value:.4g} at step {step}" for step, value in looks)
    about = f"{name.removeprefix('eval_')} of {num_pairs} held-out pairs: {course}"
    if settings.keep == "last":
        return {"kept": f"the last state, of step {state.global_step}; {about}"}
    early = state.global_step < state.max_steps and settings.patience is not None
    stopped = f"; ended early, {_no_better(name, settings.patience or 0)}" if early else ""
    return {"kept": f"the state of step {state.best_global_step}, the best by {settings.keep_metric}; {about}{stopped}"}


def _no_better(metric: str, patience: int) -> str:
    return f"{metric.removeprefix('eval_')} has not improved for {math.floor(patience)} looks"

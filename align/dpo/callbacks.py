"""What happens between steps: metrics go to a file, progress to the terminal, and a request to stop is obeyed."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.monitoring.progress import Advance, progress
from align.tracking.trackers import Trackers


class MetricsFile(TrainerCallback):
    """Appends what is logged to a JSONL file, a line per step; a resumed run takes back what it will do again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A callback of the trainer's."""
        if state.is_world_process_zero and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if -1 < _step_of(line) <= state.global_step]
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A callback of the trainer's."""
        if state.is_world_process_zero and state.log_history and "loss" in state.log_history[-1]:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def _step_of(line: str) -> int:
    """The step that a line is of; -1 where it was torn or damaged.

    >>> _step_of('{"loss": 0.6, "step": 3}'), _step_of('{"loss": 0.6, "st'), _step_of('{"step": null}')
    (3, -1, -1)
    """
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return -1


class StepTracker(TrainerCallback):
    """Hands what is logged to the trackers, with the optimiser step."""

    def __init__(self, trackers: Trackers) -> None:
        self.trackers = trackers

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A callback of the trainer's."""
        if state.is_world_process_zero:
            self.trackers.resume_after(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """A callback of the trainer's."""
        if state.is_world_process_zero:
            numbers = {name: float(x) for name, x in (logs or {}).items() if isinstance(x, int | float)}
            metrics = {_tracked_as(name): value for name, value in numbers.items()}
            self.trackers.log(metrics, state.global_step)


def _tracked_as(name: str) -> str:
    """
    >>> _tracked_as("rewards/margins"), _tracked_as("eval_rewards/margins")
    ('train/rewards/margins', 'eval/rewards/margins')
    """
    return "eval/" + name.removeprefix("eval_") if name.startswith("eval_") else f"train/{name}"


class StepProgress(TrainerCallback):
    """A progress bar over optimiser steps, with the metrics of the last one that was logged."""

    SHOWN: ClassVar = {"loss": "loss", "rewards/margins": "margin"}

    def __init__(self, label: str) -> None:
        self.label = label
        self._stack = ExitStack()
        self._advance: Advance | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A callback of the trainer's."""
        bar = progress(self.label, total=state.max_steps, done=state.global_step, together=True)
        self._advance = self._stack.enter_context(bar)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A callback of the trainer's."""
        if self._advance is not None:
            self._advance(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """A callback of the trainer's."""
        logs = logs or {}
        if self._advance is not None:
            self._advance(0, **{ours: float(logs[trls]) for trls, ours in self.SHOWN.items() if trls in logs})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A callback of the trainer's."""
        self._stack.close()
        self._advance = None


class StopOnSignal(TrainerCallback):
    """SIGTERM (a scheduler wants the machine back): finish the step, save, stop.

    The signal may reach one process of several only, or at different steps, so all processes agree after every step.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM within the context; Python allows that in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and end after this step, where any process was asked to stop."""
        if self.agreed(args.device):
            control.should_save = control.should_training_stop = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any process of the launch has been asked to stop; every process must ask."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            flag = torch.tensor(float(self.requested), device=device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.requested = bool(flag)
        return self.requested

    def _request(self, *_: Any) -> None:
        self.requested = True

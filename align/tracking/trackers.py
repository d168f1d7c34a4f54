"""Numbers in; TensorBoard, Weights & Biases and MLflow, as dpo.report_to names them, out.

    runs/NAME/tensorboard/round-1   the steps of a round's training            (step: optimiser step)
    runs/NAME/tensorboard/rounds    counts and held-out numbers of every stage (step: round)

The same two kinds of runs stand at Weights & Biases and MLflow, named "NAME round-1" and "NAME rounds"; a training that
resumes after an interruption resumes there, too. A tracker that fails on the way is given up with a warning: what it
would have got stands in the run's folder anyway. Other trackers that transformers knows get the steps of training from
transformers itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Protocol

from align.config import Config
from align.errors import UserError
from align.files import make_folder, write_text
from align.log import log
from align.run.folder import RunDir
from align.secrets import without_secrets

# The distributions that bring each of them, any of which will do.
PACKAGES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "mlflow-skinny")}
OF_TRANSFORMERS = (
    "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "neptune", "swanlab",
    "trackio",
)  # fmt: skip
ROUNDS = "rounds"


class Tracker(Protocol):
    """One place that numbers go to, open for one run of numbers."""

    def resume_after(self, step: int) -> None:
        """What was logged of later steps is done again."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send metrics of a step."""

    def close(self, *, failed: bool) -> None:
        """End the run on the tracker."""


def tracker_names(config: Config) -> list[str]:
    """What dpo.report_to names; raises UserError for a name that is none."""
    given = config.dpo.report_to
    names = [given] if isinstance(given, str) else list(given)
    known = [*PACKAGES, *OF_TRANSFORMERS]
    wrong = [name for name in names if name not in (*known, "none")]
    if wrong:
        raise UserError(
            f"dpo.report_to: {wrong[0]!r} is no tracker",
            fix=f"expected none, or one or several (as a list) of {', '.join(known)}",
        )
    return [name for name in dict.fromkeys(names) if name != "none"]


def own_names(config: Config) -> list[str]:
    """The trackers that this toolkit talks to itself."""
    return [name for name in tracker_names(config) if name in PACKAGES]


def check_trackers(config: Config) -> None:
    """Raise UserError for an unknown tracker, and for one whose package is not installed."""
    for name in own_names(config):
        if not any(_is_installed(package) for package in PACKAGES[name]):
            raise UserError(
                f"dpo.report_to names {name}, but the package {PACKAGES[name][-1]} is not installed",
                fix=f"pip install {PACKAGES[name][-1]}, or take {name} out of dpo.report_to",
            )


def _is_installed(package: str) -> bool:
    # Not asked of the import system: a folder `wandb` that a run has left would be taken for the package.
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(package))
    return False


@dataclass
class Trackers:
    """The open trackers; `notes` says which were given up and why, for the manifest."""

    open: dict[str, Tracker] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def resume_after(self, step: int) -> None:
        """Forget what was sent of later steps: they are trained again."""
        self._each(lambda tracker: tracker.resume_after(step))

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send metrics of a step to all."""
        self._each(lambda tracker: tracker.log(numbers, step))

    def close(self, *, failed: bool) -> None:
        """End the run on all trackers."""
        self._each(lambda tracker: tracker.close(failed=failed))

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                do(tracker)
            except Exception as error:
                del self.open[name]
                reason = without_secrets(f"{type(error).__name__}: {error}").splitlines()[0]
                self.notes[f"tracking with {name}"] = f"given up: {reason}"
                log.warning("tracking: %s is given up: %s", name, reason)


@contextlib.contextmanager
def tracking(config: Config, part: str) -> Iterator[Trackers]:
    """The trackers of `round-1` (steps of a training) or `rounds` (numbers of stages), closed at the end.

    Raises:
        UserError: one of them cannot be opened: no login, no server.
    """
    check_trackers(config)
    trackers = Trackers()
    try:
        for name in own_names(config):
            try:
                trackers.open[name] = OPENERS[name](config, part)
            except Exception as error:
                # A server's, a login's or a disk's trouble, in whatever exception the library has for it.
                raise UserError(
                    f"{name} cannot be opened: {without_secrets(str(error)).splitlines()[0]}",
                    fix=f"{HINTS[name]}, or take {name} out of dpo.report_to",
                ) from None
    except UserError:
        trackers.close(failed=True)
        raise
    failed = True
    try:
        yield trackers
        failed = False
    except SystemExit:
        # Told to stop, or to begin again with a smaller batch.
        failed = False
        raise
    finally:
        trackers.close(failed=failed)


def track_stage(config: Config, number: int, numbers: dict[str, float]) -> None:
    """Log the numbers of a finished stage at the step of its round; a tracker that cannot be opened is warned of."""
    if not numbers or not own_names(config):
        return
    try:
        with tracking(config, ROUNDS) as trackers:
            trackers.log(numbers, number)
    except UserError as error:
        log.warning("tracking: %s", error)


def _run_name(config: Config, part: str) -> str:
    return f"{config.dpo.trainer_fields().get('run_name') or config.name} {part}"


class _TensorBoard:
    """Event files in the run's folder, which need no torch."""

    def __init__(self, config: Config, part: str) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = config.run_dir / "tensorboard" / part
        make_folder(folder)
        self._writer = EventFileWriter(str(folder), flush_secs=10)
        if part != ROUNDS:
            log.info("tracking: tensorboard --logdir %s", folder.parent)

    def resume_after(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        # TensorBoard forgets what it has read of this step and later ones.
        self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def log(self, numbers: dict[str, float], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: Config, part: str) -> None:
        import wandb

        make_folder(config.run_dir)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "align"),
            name=_run_name(config, part),
            group=config.name,
            id=_kept_id(config, "wandb", part, lambda: uuid.uuid4().hex[:16]),
            resume="allow",
            dir=str(config.run_dir),
            config=_parameters(config),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._axis = "round" if part == ROUNDS else "train/global_step"
        self._run.define_metric(self._axis)
        self._run.define_metric("*", step_metric=self._axis)
        if part != ROUNDS:
            where = self._run.dir if self._run.offline else self._run.url
            log.info("tracking: wandb, %s", without_secrets(str(where)))

    def resume_after(self, step: int) -> None:
        """Its steps only grow: what is done again is duplicated there, at the same point of the axis."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers | {self._axis: step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    def __init__(self, config: Config, part: str) -> None:
        # A server that is not there is reported within seconds, not after its default of minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", config.name)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)

        def begin() -> str:
            run = self._client.create_run(experiment, run_name=_run_name(config, part)).info.run_id
            for key, value in _parameters(config).items():
                self._client.log_param(run, key, str(value)[:500])
            return run

        self._run = _kept_id(config, "mlflow", part, begin)
        self._client.update_run(self._run, status="RUNNING")
        if part != ROUNDS:
            log.info("tracking: mlflow, experiment %s", name)

    def resume_after(self, step: int) -> None:
        """It keeps a history: what is done again stands there twice."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_mlflow_name(name), value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


OPENERS: dict[str, Callable[[Config, str], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MLflow}
HINTS = {
    "tensorboard": "check that the run's folder can be written",
    "wandb": "log in with `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline",
    "mlflow": "check MLFLOW_TRACKING_URI",
}


def _mlflow_name(name: str) -> str:
    """
    >>> _mlflow_name("score/unscored: no answer (torn)")
    'score/unscored: no answer _torn_'
    """
    return "".join(letter if letter.isalnum() or letter in "_-. :/" else "_" for letter in name)


def _parameters(config: Config) -> dict[str, Any]:
    """What is shown beside the curves: the settings of training, without anything of servers."""
    dpo = {f"dpo.{key}": value for key, value in config.dpo.model_dump(mode="json").items()}
    return dpo | {"policy": config.policy, "seed": config.seed, "critic.kind": config.critic.kind}


def _kept_id(config: Config, tracker: str, part: str, make: Callable[[], str]) -> str:
    """The id under which a part of this run stands at a tracker; made when it is first asked for.

    A training that was restarted (--redo) is another one.
    """
    path = config.run_dir / ".trackers.json"
    kept: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    key = f"{tracker} {part}"
    if part != ROUNDS:
        entry = RunDir(config.run_dir).round(int(part.removeprefix("round-"))).manifest.stage("dpo")
        key += f" {entry.started if entry else ''}"
    if key not in kept:
        kept[key] = make()
        write_text(path, json.dumps(kept, indent=2) + "\n")
    return kept[key]

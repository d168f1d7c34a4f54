"""The loop: sample, score, pairs, dpo and evaluate, round after round, each stage skipped where it is complete."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from align.config import Config
from align.distributed.launch import run_stage_command, wants_processes
from align.distributed.ranks import barrier, is_main_process
from align.errors import UserError
from align.log import log
from align.monitoring.cost import metered
from align.monitoring.heartbeat import beating, clear_beats
from align.run.folder import Round, RunDir
from align.tracking.stage_metrics import stage_numbers
from align.tracking.trackers import check_trackers, track_stage


@dataclass(frozen=True)
class Ended:
    """The last round that was run, what was said of rounds worse than their parents, and whether that ended the run."""

    last: int
    worse: list[str]
    early: bool = False


def run_rounds(config: Config, config_args: list[str]) -> Ended:
    """Run all rounds of a configuration; an interrupted run goes on where it stopped.

    `config_args` are the command-line arguments that lead to this very configuration, for stages that must start in
    several processes of their own.
    """
    if config.evaluate.questions is not None:
        _run_or_launch(config, "evaluate", 0, config_args)
    worse: list[str] = []
    for number in range(1, config.rounds + 1):
        log.info("round %d of %d", number, config.rounds)
        given = number == 1 and config.pairs_file is not None
        for stage in ("pairs", "dpo") if given else ("sample", "score", "pairs", "dpo"):
            _run_or_launch(config, stage, number, config_args)
        if config.evaluate.questions is not None:
            _run_or_launch(config, "evaluate", number, config_args)
            said = warning_of(config, number)
            if said is not None:
                log.warning("WARNING: %s", said)
                worse.append(said)
                if config.evaluate.stop_if_worse:
                    return Ended(number, worse, early=True)
    return Ended(config.rounds, worse)


def warning_of(config: Config, number: int) -> str | None:
    """What a person must be told of a round that was evaluated: that it is worse than its parent beyond chance."""
    from align.evaluation.evaluate import worse_than_parent

    return worse_than_parent(RunDir(config.run_dir), number) if number else None


def run_stage(config: Config, stage: str, number: int, *, redo: bool = False) -> None:
    """Run one stage in this process (one of a launch, perhaps), holding the round while it lasts."""
    run = RunDir(config.run_dir)
    this = run.round(number)
    check_trackers(config)
    with _held(this):
        if redo and is_main_process():
            this.discard(stage)
        clear_beats(this.path)
        barrier()
        fresh = not this.manifest.complete(stage)
        with (
            beating(this.path, stage),
            metered(this.path, stage) if fresh else contextlib.nullcontext(),
            _remembering_refusal(this, stage),
        ):
            _call(config, stage, number)
        if fresh and is_main_process():
            track_stage(config, number, stage_numbers(this, stage))
    if is_main_process() and number and stage in ("dpo", "evaluate"):
        from align.hub.model_card import write_model_card

        write_model_card(config, number)


@contextlib.contextmanager
def _remembering_refusal(this: Round, stage: str) -> Iterator[None]:
    """What a stage says when it will not go on stands in its manifest, for the report and `align status`."""
    try:
        yield
    except UserError as error:
        if is_main_process():
            this.manifest.note(stage, refused=str(error))
        raise


def _run_or_launch(config: Config, stage: str, number: int, config_args: list[str]) -> None:
    if not wants_processes(config) or stage == "pairs":
        run_stage(config, stage, number)
    elif not (manifest := RunDir(config.run_dir).round(number).manifest).complete(stage):
        run_stage_command(config, stage, number, config_args)
        if not manifest.complete(stage):
            # Its processes were told to stop, and have said so.
            raise SystemExit(0)


def _call(config: Config, stage: str, number: int) -> None:
    """The stages are imported here, so that a command loads only what it runs."""
    if stage == "sample":
        from align.stages.sample import run_sample

        run_sample(config, number)
    elif stage == "score":
        from align.stages.score import run_score

        run_score(config, number)
    elif stage == "pairs":
        from align.stages.pairs import run_pairs

        run_pairs(config, number)
    elif stage == "dpo":
        from align.dpo.train import run_dpo

        run_dpo(config, number)
    else:
        from align.evaluation.evaluate import run_evaluate

        run_evaluate(config, number)


@contextlib.contextmanager
def _held(this: Round) -> Iterator[None]:
    """The main process holds the round for all of a launch."""
    with this.lock() if is_main_process() else contextlib.nullcontext():
        yield

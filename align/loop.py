"""The loop: one stage, or all rounds of a configuration; each stage is skipped where it is complete.

    from align import load_config, run_rounds, run_stage

    config = load_config("align.yaml")
    result = run_stage(config, "sample", 1)     # what `align sample --round 1` does
    result = run_rounds(config)                 # what `align run` does

The command line adds nothing but words: a run made from Python and one made by commands leave the same folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config import Config, dump_config
from align.distributed.launch import run_stage_command, wants_processes
from align.distributed.ranks import barrier, is_main_process
from align.engines.vllm.hosting import release
from align.errors import UserError
from align.log import log
from align.monitoring.cost import cost_counter
from align.monitoring.heartbeat import clear_heartbeats, heartbeat
from align.run.folder import Round, RunDir
from align.run.parents import parent_of, selected_by
from align.run.stages import STAGES, Stage, next_command, stage_named, stages_of
from align.tracking.stage_metrics import stage_metrics
from align.tracking.trackers import check_trackers, track_stage


@dataclass(frozen=True)
class StageResult:
    """How a stage of a round ended.

    `counts`: what was kept and dropped, by reason; `outputs`: the files that the stage wrote, by name; `notes`: what it
    fell back to; `seconds`: of the main process, all attempts together; `was_complete`: nothing was left to do;
    `next_command`: what comes after it on the command line.
    """

    stage: str
    round: int
    counts: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Path] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    was_complete: bool = False
    next_command: str = ""


@dataclass(frozen=True)
class RunResult:
    """How a run ended: the results of its stages in order, its best checkpoint and its report.

    `warnings`: rounds that beyond chance were worse than their parents, or looked at the pictures less, and
    pushes to the Hub that failed; `round` is the one that `checkpoint` is of (0: the first policy), and `selected` says
    why, with `evaluate.select: best`; `stopped_early` names the setting that ended the run before its last round
    (`evaluate.stop_if_worse`, `evaluate.patience`), and is empty where none did.
    """

    stages: list[StageResult]
    last_round: int
    round: int
    checkpoint: Path
    report: Path | None = None
    warnings: list[str] = field(default_factory=list)
    stopped_early: str = ""
    selected: str = ""


@dataclass(frozen=True)
class _Standing:
    """Which round a run results in so far, and why; `stopped_by` names the setting that ends the run, if one does."""

    result: int
    why: str = ""
    stopped_by: str = ""


def run_rounds(config: Config, *, report: bool = True, critic: Callable[..., Any] | None = None) -> RunResult:
    """Run all rounds of a configuration, with evaluation and report; an interrupted run resumes where it stopped.

    `critic` judges in place of the configured one, as in `run_stage`. Before the first stage of a new run everything is
    checked that can be without weights (`align check`).

    Raises:
        UserError: the configuration, data or a checkpoint cannot be used, or a stage cannot continue.
        SystemExit: with code 0, after SIGTERM; the same call resumes.
    """
    run = RunDir(config.run_dir)
    if not run.rounds():
        _look_first(config)
    results = [run_stage(config, stage.name, 0) for stage in stages_of(config, 0)]
    warnings: list[str] = []
    last, standing = 0, _Standing(0)
    for last in range(1, config.rounds + 1):
        log.info("round %d of %d", last, config.rounds)
        for stage in stages_of(config, last):
            results.append(_run_one(config, stage, last, critic=critic if stage.name == "score" else None))
        found = warnings_of(config, last)
        for warning in found.texts:
            log.warning("WARNING: %s", warning)
        warnings += found.texts
        standing = _standing(config, last)
        ends = last == config.rounds or bool(standing.stopped_by)
        warnings += _push(config, last, result=standing.result if ends else None)
        if ends:
            break
    page = None
    if report and is_main_process():
        from align.report import write_report

        page = write_report(config.run_dir)
    return RunResult(
        results,
        last_round=last,
        round=standing.result,
        checkpoint=Path(run.checkpoint(standing.result, config.policy)),
        report=page,
        warnings=warnings,
        stopped_early=standing.stopped_by,
        selected=standing.why,
    )


def _standing(config: Config, last: int) -> _Standing:
    """Where a run stands after a round, by the held-out questions that decide."""
    settings, run = config.evaluate, RunDir(config.run_dir)
    if settings.questions is None:
        return _Standing(last)
    from align.evaluation.against_parent import worse_than_parent

    chosen = selected_by(run, last) if settings.select == "best" else None
    worse = worse_than_parent(run, last, by=settings.select_metric, deciding=True) if settings.stop_if_worse else None
    if worse is not None:
        log.info("the run ends: %s", worse)
    result = chosen.round if chosen is not None else last if worse is None else parent_of(run, last)
    why = "" if chosen is None else chosen.why
    if worse is not None:
        return _Standing(result, why, "evaluate.stop_if_worse")
    waited = settings.patience is not None and last - result >= settings.patience
    return _Standing(result, why, "evaluate.patience" if waited else "")


def _push(config: Config, last: int, *, result: int | None) -> list[str]:
    """Push what is to be on the Hub by now, from one machine; warnings of what failed.

    `result`: the round that the run results in, once it has ended.
    """
    if not is_main_process() or config.launch.machine_rank:
        return []
    from align.hub.each_round import push_rounds

    failed = push_rounds(config, last, result)
    for warning in failed:
        log.warning("WARNING: %s", warning)
    return failed


def run_stage(
    config: Config,
    stage: str,
    number: int,
    *,
    redo: bool = False,
    keep_unchanged: bool = False,
    critic: Callable[..., Any] | None = None,
) -> StageResult:
    """Do what `align STAGE --round NUMBER` does: here, or in the processes that `launch:` asks for.

    `redo` discards what this stage and all later ones of the round have done; with `keep_unchanged` not what they have
    finished of questions that are still the same. `critic` judges in place of the
    configured one: a function of question, images and responses (see docs/adding-a-critic.md), for `score` in one
    process. As on the command line, `score` then makes the pairs, and `dpo` of a round that begins with `pairs_file`
    reads them first.

    Raises:
        UserError: an unknown stage, an input that is not there, settings or data that cannot be used.
        SystemExit: with code 0, after SIGTERM; the same call resumes.
    """
    if stage not in STAGES:
        raise UserError(f"there is no stage {stage!r}", fix=f"stages are {', '.join(STAGES)}")
    if stage == "dpo" and number == 1 and config.pairs_file is not None:
        _run_one(config, stage_named("pairs"), number)
    if keep_unchanged and (not redo or stage_named(stage).per_question is None):
        raise UserError("--keep-unchanged goes with --redo of sample, score or evaluate", fix="leave it out")
    result = _run_one(config, stage_named(stage), number, redo=redo, keep_unchanged=keep_unchanged, critic=critic)
    if stage == "score":
        _run_one(config, stage_named("pairs"), number)
    return result


@dataclass(frozen=True)
class RoundWarnings:
    """What a person must be told of a round that was evaluated: that it is worse than its parent, or looks less."""

    worse: str | None = None
    looks_less: str | None = None

    @property
    def texts(self) -> list[str]:
        """Those that there are."""
        return [text for text in (self.worse, self.looks_less) if text is not None]


def warnings_of(config: Config, number: int) -> RoundWarnings:
    """How an evaluated round compares with its parent, beyond chance."""
    if not number or config.evaluate.questions is None:
        return RoundWarnings()
    from align.evaluation.against_parent import looks_less_than_parent, worse_than_parent

    run = RunDir(config.run_dir)
    worse = worse_than_parent(run, number, by=config.evaluate.select_metric)
    return RoundWarnings(worse, looks_less_than_parent(run, number))


def _look_first(config: Config) -> None:
    """Raise UserError with all problems of a run that has not begun."""
    from align.check.preflight import run_preflight

    found = run_preflight(config)
    if found.problems:
        raise UserError(
            f"{len(found.problems)} problem{'s' if len(found.problems) > 1 else ''} before the first"
            f" stage\n{found.text()}"
        )


def _run_one(
    config: Config,
    stage: Stage,
    number: int,
    *,
    redo: bool = False,
    keep_unchanged: bool = False,
    critic: Callable[..., Any] | None = None,
) -> StageResult:
    run = RunDir(config.run_dir)
    this = run.round(number)
    if is_main_process():
        run.write_config_once(dump_config(config))
    done = not redo and this.manifest.complete(stage.name)
    # One that is complete is looked at here: its settings and inputs must still be those of the configuration.
    if stage.distributed and wants_processes(config) and not done:
        if critic is not None:
            raise UserError(
                "a function cannot be handed to several processes",
                fix="set critic: {kind: python, function: FILE:NAME}, or launch.num_processes=1",
            )
        again = ["--redo", *(["--keep-unchanged"] if keep_unchanged else [])] if redo else []
        run_stage_command(config, stage.name, number, only_once=again)
    else:
        _run_here(config, stage, this, redo=redo, keep_unchanged=keep_unchanged, critic=critic)
    entry = this.manifest.stage(stage.name)
    assert entry is not None, f"stage {stage.name} has left no entry"
    return StageResult(
        stage.name,
        number,
        counts=entry.counts,
        outputs={name: this.path / name for name in entry.outputs},
        notes=entry.notes,
        seconds=entry.seconds,
        was_complete=done,
        next_command=next_command(config, stage.name, number),
    )


def _run_here(
    config: Config,
    stage: Stage,
    this: Round,
    *,
    redo: bool = False,
    keep_unchanged: bool = False,
    critic: Callable[..., Any] | None = None,
) -> None:
    """Run one stage in this process (one of a launch, perhaps), holding the round while it lasts."""
    check_trackers(config)
    with _held(this):
        if redo and is_main_process():
            this.reopen(stage.name) if keep_unchanged else this.discard(stage.name)
        clear_heartbeats(this.path)
        barrier()
        fresh = not this.manifest.complete(stage.name)
        with (
            heartbeat(this.path, stage.name),
            cost_counter(this.path, stage.name) if fresh else contextlib.nullcontext(),
            _remembering_refusal(this, stage.name),
        ):
            try:
                stage.load()(config, this.number, **({} if critic is None else {"critic": critic}))
            finally:
                release()
        if fresh and is_main_process():
            track_stage(config, this.number, stage_metrics(this, stage.name))
    if is_main_process() and this.number and stage.on_card:
        from align.hub.model_card import write_model_card

        write_model_card(config, this.number)


@contextlib.contextmanager
def _remembering_refusal(this: Round, stage: str) -> Iterator[None]:
    """What a stage says when it will not continue stands in its manifest, for the report and `align status`."""
    try:
        yield
    except UserError as error:
        if is_main_process():
            this.manifest.note(stage, refused=str(error))
        raise


@contextlib.contextmanager
def _held(this: Round) -> Iterator[None]:
    """The main process holds the round for all of a launch."""
    with this.lock() if is_main_process() else contextlib.nullcontext():
        yield

"""Commands that run a stage, or all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align.cli.console import say, warn
from align.cli.options import ConfigOption, KeepOption, ProcessesOption, RedoOption, RoundOption, SetOption, app
from align.config import Config, checkpoint_config, find_config, load_config
from align.distributed.launch import is_started_by_align, run_stage_command, wants_processes
from align.distributed.ranks import is_main_process
from align.errors import UserError
from align.run.folder import RunDir

if TYPE_CHECKING:
    from align.loop import StageResult


@app.command(epilog="Example:  align sample --round 1 --set sample.num_responses=8")
def sample(
    round_: RoundOption = 1,
    config: ConfigOption = None,
    set_: SetOption = None,
    redo: RedoOption = False,
    keep_unchanged: KeepOption = False,
    num_processes: ProcessesOption = None,
) -> None:
    """Stage 1: K responses of the current policy to every image question."""
    again = {"redo": redo, "keep_unchanged": keep_unchanged}
    done = _stage("sample", round_, config, set_, **again, num_processes=num_processes)
    say(f"{done.counts['responses']} responses to {done.counts['questions']} questions", next_command=done.next_command)


@app.command(epilog="Example:  align score --round 1 --set critic.kind=verifier")
def score(
    round_: RoundOption = 1,
    config: ConfigOption = None,
    set_: SetOption = None,
    redo: RedoOption = False,
    keep_unchanged: KeepOption = False,
    num_processes: ProcessesOption = None,
) -> None:
    """Stage 2: a critic compares the responses; rewards become preference pairs."""
    again = {"redo": redo, "keep_unchanged": keep_unchanged}
    done = _stage("score", round_, config, set_, **again, num_processes=num_processes)
    say(f"{done.counts['scored']} responses to {done.counts['questions']} questions scored", next_command=None)
    made = RunDir(_load(config, set_).run_dir).round(round_).manifest.stage("pairs")
    assert made is not None, "the pairs are made with the scores"
    _say_pairs(made.counts, round_)


@app.command(
    epilog="Example:  align pairs --round 1 --redo --set pairs.strategy=topk_bottomk --set pairs.max_per_question=4"
)
def pairs(
    round_: RoundOption = 1, config: ConfigOption = None, set_: SetOption = None, redo: RedoOption = False
) -> None:
    """Make the pairs of a scored round again, with other settings (`align score` makes them the first time)."""
    done = _stage("pairs", round_, config, set_, redo=redo, num_processes=1)
    _say_pairs(done.counts, round_)


def _say_pairs(counts: dict[str, Any], number: int) -> None:
    say(f"{counts['pairs']} pairs from {counts['questions']} questions", next_command=f"align dpo --round {number}")


@app.command(epilog="Example:  align dpo --round 1 --num-processes 8 --strategy zero3 --set dpo.beta=0.1")
def dpo(
    round_: RoundOption = 1,
    config: ConfigOption = None,
    set_: SetOption = None,
    redo: RedoOption = False,
    num_processes: ProcessesOption = None,
    strategy: Annotated[str | None, typer.Option(help="ddp, zero2, zero3 or fsdp2.")] = None,
) -> None:
    """Stage 3: DPO on the pairs of the round, into a new checkpoint."""
    set_ = [*(set_ or []), *([f"launch.strategy={strategy}"] if strategy else [])]
    done = _stage("dpo", round_, config, set_, redo=redo, num_processes=num_processes)
    say(f"trained on {done.counts['pairs']} pairs: {done.outputs['checkpoint']}", next_command=done.next_command)


@app.command(epilog="Example:  align evaluate --round 0   (the first policy)")
def evaluate(
    round_: Annotated[
        int, typer.Option("--round", "-r", min=0, help="Which round's checkpoint; 0 is the first policy.")
    ] = 0,
    config: ConfigOption = None,
    set_: SetOption = None,
    redo: RedoOption = False,
    keep_unchanged: KeepOption = False,
    num_processes: ProcessesOption = None,
    lmms_eval: Annotated[
        str | None, typer.Option(help="Tasks of lmms-eval, e.g. mme,mmbench_en_dev; `list` names them.")
    ] = None,
    lmms_eval_tasks: Annotated[Path | None, typer.Option(help="Folder of your own tasks (YAML).")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="For lmms-eval: this one, without a run.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="For lmms-eval: so many documents of a task.")] = None,
    out: Annotated[Path | None, typer.Option(help="For lmms-eval: the JSON file of results.")] = None,
) -> None:
    """Held-out numbers of a checkpoint, with intervals; or benchmarks of lmms-eval."""
    if lmms_eval is not None:
        wishes = {"tasks": lmms_eval, "checkpoint": checkpoint, "folder": lmms_eval_tasks, "limit": limit, "out": out}
        _benchmarks(wishes | {"redo": redo}, round_, config, [*(set_ or []), *_processes(num_processes)])
        return
    if checkpoint is not None or limit is not None or out is not None or lmms_eval_tasks is not None:
        raise UserError("--checkpoint, --limit, --out and --lmms-eval-tasks go with --lmms-eval", fix="name its tasks")
    again = {"redo": redo, "keep_unchanged": keep_unchanged}
    done = _stage("evaluate", round_, config, set_, **again, num_processes=num_processes)
    if is_main_process() and not is_started_by_align():
        from align.evaluation.table import print_table
        from align.loop import warnings_of

        loaded = _load(config, set_ or [])
        print_table({loaded.name: loaded.run_dir})
        for warning in warnings_of(loaded, round_).texts:
            warn(warning)
    say(f"{done.counts['questions']} held-out questions answered", next_command="align report")


@app.command(epilog="Example:  align run --rounds 3")
def run(
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of sample, score and dpo.")] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """All of it: every round, evaluation and the report. The same command resumes after an interruption."""
    from align.evaluation.table import print_table
    from align.loop import run_rounds
    from align.run.parents import name_of
    from align.status.run_status import run_status

    loaded = _load(config, [*(set_ or []), *([f"rounds={rounds}"] if rounds else [])])
    done = run_rounds(loaded)
    if not is_main_process():
        return
    print_table({loaded.name: loaded.run_dir})
    for warning in [*done.warnings, *run_status(loaded.run_dir).warnings]:
        warn(warning)
    if done.stopped_early:
        say(
            f"the run ended after round {done.last_round} of {loaded.rounds} ({done.stopped_early}): "
            f"{name_of(done.round)} is better",
            next_command=None,
        )
    if done.selected:
        say(f"chosen:     {done.selected}", next_command=None)
    say(f"checkpoint: {done.checkpoint}\nreport:     {done.report}", next_command="open the report in a browser")


def _stage(
    name: str,
    number: int,
    config: Path | None,
    overrides: list[str] | None,
    *,
    redo: bool,
    keep_unchanged: bool = False,
    num_processes: int | None,
) -> StageResult:
    """Run one stage here, or in the processes that the configuration asks for."""
    from align.loop import run_stage

    loaded = _load(config, [*(overrides or []), *_processes(num_processes)])
    return run_stage(loaded, name, number, redo=redo, keep_unchanged=keep_unchanged)


def _benchmarks(wishes: dict[str, Any], number: int, config: Path | None, overrides: list[str]) -> None:
    """Tasks of lmms-eval on a checkpoint, or on that of a round; here, or in several processes."""
    from align.hub.model_card import write_model_card
    from align.lmms_eval import Wishes, list_tasks, run_benchmarks
    from align.lmms_eval.table import print_benchmarks

    asked = Wishes(**wishes)
    if asked.tasks == "list":
        say("\n".join(list_tasks(asked.folder)), next_command="align evaluate --lmms-eval TASKS")
        return
    alone = asked.checkpoint is not None and config is None
    loaded = checkpoint_config(str(asked.checkpoint), overrides) if alone else _load(config, overrides)
    if wants_processes(loaded):
        run_stage_command(loaded, "evaluate", number, arguments=asked.arguments())
    else:
        run_benchmarks(loaded, asked, number)
    if is_main_process() and not is_started_by_align():
        print_benchmarks(asked.names, asked.results(loaded, number))
        if asked.checkpoint is None and number:
            write_model_card(loaded, number)
    say(f"results: {asked.results(loaded, number)}", next_command=None)


def _processes(number: int | None) -> list[str]:
    return [f"launch.num_processes={number}"] if number else []


def _load(config: Path | None, overrides: list[str] | None) -> Config:
    return load_config(find_config(config), overrides)

"""`align demo`: three rounds on real handwritten digits with a tiny Valley-Eagle, and the control beside them."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from align.config import CONFIG_NAME, load_config
from align.demo import write_demo
from align.evaluation.table import print_table
from align.log import log
from align.loop import run_rounds
from align.report import write_report
from align.run.folder import RunDir

NUM_QUESTIONS = 3000
NUM_EVAL = 500
CONTROL_SHARE = 0.5


def play_demo(folder: Path, *, rounds: int, seed: int, control: bool) -> None:
    """Write the demo's data into `folder` (once), run it, run the control, and write the report.

    The control is the same run with random preferences and half of the questions per round, evaluated by its answers
    alone.
    """
    started = time.monotonic()
    path = folder / CONFIG_NAME
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_demo(folder, num_questions=NUM_QUESTIONS, num_eval=NUM_EVAL, seed=seed)
    overrides = [f"rounds={rounds}", f"seed={seed}"]
    config = load_config(path, overrides)
    runs = {"critic": config.run_dir}
    run_rounds(config, report=False)
    if control:
        fewer = max(50, int((config.sample.questions_per_round or NUM_QUESTIONS) * CONTROL_SHARE))
        overrides += ["name=random", "critic.kind=random", "critic.options="]
        overrides += [f"sample.questions_per_round={fewer}", "evaluate.kl=false", "evaluate.image_dependence=0"]
        log.info("the control: random preferences, %d questions per round", fewer)
        control_config = load_config(path, overrides)
        run_rounds(control_config, report=False)
        runs["random"] = control_config.run_dir
    report = write_report(config.run_dir, control=runs.get("random"))
    print_table(runs)
    typer.echo(f"took {time.monotonic() - started:.0f} s")
    typer.echo(f"checkpoint: {RunDir(config.run_dir).round(config.rounds).checkpoint}")
    typer.echo(f"report:     {report}")
    typer.secho(f"next: open the report, then start your own run with `align init`; the demo's is {path}", fg="cyan")

"""Commands that look at runs: their report, where they stand, how they compare."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.cli.console import nothing_to_resume, say
from align.cli.options import ConfigOption, SetOption, app
from align.config import find_config, load_config
from align.errors import UserError

if TYPE_CHECKING:
    from align.status.run_status import RunMonitor, RunStatus


@app.command(epilog="Example:  align report runs/critic --control runs/random --out critic.html")
def report(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder, without a configuration; default: that of align.yaml.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    control: Annotated[Path | None, typer.Option(help="Folder of a control run to show beside this one.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the run's folder.")] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of the images, where they are no longer where the run found them.")
    ] = None,
    evaluation_image_root: Annotated[
        Path | None, typer.Option(help="Folder of the held-out images, where it is another than --image-root.")
    ] = None,
    max_held_out: Annotated[int, typer.Option(min=0, help="Most held-out questions to embed with their images.")] = 60,
    max_training: Annotated[int, typer.Option(min=0, help="Most training questions to embed.")] = 40,
    reference_curve: Annotated[
        bool, typer.Option(help="Offer the published curve of Valley2-DPO behind the training curves.")
    ] = True,
) -> None:
    """One HTML page of the run: curves, pairs, critic, questions with their responses."""
    from align.report import write_report

    if run is not None and (config is not None or set_):
        raise UserError("a run's folder and a configuration were given", fix="name one of them")
    path = write_report(
        run if run is not None else load_config(find_config(config), set_).run_dir,
        control=control,
        image_root=image_root,
        evaluation_image_root=evaluation_image_root or image_root,
        out=out,
        max_held_out=max_held_out,
        max_training=max_training,
        reference_curve=reference_curve,
    )
    say(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)", next_command="open it in a browser")


@app.command(epilog="Example:  align status runs/run --watch   (from another terminal)")
def status(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder; default: the run of align.yaml in the current folder.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until the run is complete.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 5.0,
) -> None:
    """Where a run stands: stages, progress, speed, time left, last losses, warnings."""
    from align.status.run_status import RunMonitor, find_run

    with nothing_to_resume():
        watched = RunMonitor(find_run(run))
        seen = _watch(watched, every) if watch else watched.look()
    say(seen.text, next_command=seen.next_command)


def _watch(watched: RunMonitor, every: float) -> RunStatus:
    """Show a run until it is complete: in place on a terminal, else again after every change."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    seen, before = watched.look(), ""
    live = Live(console=Console(), auto_refresh=False, transient=True) if sys.stdout.isatty() else None
    with live or contextlib.nullcontext():
        while not seen.complete:
            if live is not None:
                live.update(Text(seen.text), refresh=True)
            elif seen.text != before:
                typer.echo(seen.text)
            before = seen.text
            time.sleep(every)
            seen = watched.look()
    return seen


@app.command(epilog="Example:  align compare runs/critic runs/verifier")
def compare(
    one: Annotated[Path, typer.Argument(help="A run's folder.")],
    other: Annotated[Path, typer.Argument(help="Another run's folder.")],
) -> None:
    """Two runs side by side, and their paired difference on the same held-out questions."""
    from align.evaluation.compare import print_comparison

    print_comparison(one, other)

"""The command line's application and the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import align
from align.config import CONFIG_NAME

app = typer.Typer(
    name="align",
    help="Iterative DPO for vision-language models: sample, score, dpo, round after round.",
    epilog="Start with `align demo` (offline, on a CPU) or `align init`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"valley-align {align.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What `align` takes without a command."""


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help=f"Configuration file; default: {CONFIG_NAME} in the current folder."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one key, e.g. dpo.learning_rate=5e-7."),
]
RoundOption = Annotated[
    int, typer.Option("--round", "-r", min=1, help="Which round; it needs the round before complete.")
]
RedoOption = Annotated[
    bool, typer.Option("--redo", help="Discard what this stage (and later ones of the round) has done.")
]
KeepOption = Annotated[
    bool, typer.Option("--keep-unchanged", help="With --redo: keep what is finished of questions that are the same.")
]
ProcessesOption = Annotated[
    int | None, typer.Option("--num-processes", "-n", min=1, help="Processes on this machine, one per GPU.")
]

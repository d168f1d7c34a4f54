"""The command that lets people compare a round's responses, on a page."""

from __future__ import annotations

from typing import Annotated

import typer

from align.cli.console import nothing_to_resume, say
from align.cli.options import ConfigOption, RoundOption, SetOption, app
from align.config import find_config, load_config


@app.command(epilog="Example:  align label --round 1 --number 200")
def label(
    round_: RoundOption = 1,
    config: ConfigOption = None,
    set_: SetOption = None,
    number: Annotated[int, typer.Option(min=1, help="Comparisons per person, one per question.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Draws the comparisons, their order and sides.")] = 0,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the page.")] = 7861,
    host: Annotated[str, typer.Option(help="Where the page listens; 0.0.0.0 lets others in.")] = "127.0.0.1",
) -> None:
    """People compare a round's responses, blind, on a page; how far the critic agrees with them. Needs the extra `web`.

    Every rating is in the round's ratings.jsonl at once; the same command resumes. Keys: 1 or left, 2 or right, 0 or
    down for neither, Backspace to go back.
    """
    from align.chat.web import Address
    from align.label.web import agreement_lines, label_on_page

    loaded = load_config(find_config(config), set_)
    with nothing_to_resume():
        session = label_on_page(loaded, round_, Address(host, port), num_comparisons=number, seed=seed)
    for line in agreement_lines(loaded, round_, session):
        typer.echo(line)
    say(f"ratings: {session.file}", next_command="align report")

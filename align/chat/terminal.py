"""Lines that a person types, or that come through a pipe, in; a model's answers out, on a terminal word by word.

Through a pipe every line is a question and every answer is printed whole, so that other programs can read it.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import typer

from align.chat.answers import Answers, Chat, Exchange
from align.engines.base import SamplingSettings
from align.errors import UserError

HELP = """\
/image FILE   show an image, or a video, with the next question (quote names with spaces)
/retry        answer the last question again, with other random numbers
/clear        begin a new conversation
/help         this
An empty line or Ctrl-D ends; Ctrl-C stops an answer."""


class Conversation:
    """What has been said, and the files that wait for the next question."""

    def __init__(self, chat: Chat, files: Iterable[Path], settings: SamplingSettings) -> None:
        self.chat = chat
        self.settings = settings
        self.exchanges: list[Exchange] = []
        self.num_asked = 0
        self.waiting = Exchange("")
        for file in files:
            self.show(file)

    def show(self, file: Path) -> None:
        """Put a file before the model; UserError at once if it cannot be used."""
        self.waiting = replace(self.waiting, pictures=self.waiting.pictures + self.chat.ask("", [file]).pictures)

    def clear(self) -> None:
        """Forget what was said."""
        self.exchanges.clear()
        self.waiting = Exchange("")

    def ask(self, question: str) -> None:
        """Ask a new question and print its answer. A question that could not be asked leaves no trace."""
        self._answer([*self.exchanges, replace(self.waiting, question=question)])
        self.waiting = Exchange("")

    def retry(self) -> None:
        """Ask the last question again; raises UserError where there is none."""
        if not self.exchanges:
            raise UserError("nothing has been asked yet")
        self._answer([*self.exchanges[:-1], self.exchanges[-1].answered(None)])

    def _answer(self, exchanges: list[Exchange]) -> None:
        printed = Printed()
        stream = self.chat.answer(exchanges, self.settings, seed=self.num_asked)
        try:
            with closing(stream):
                for answers in stream:
                    printed.show(answers)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            printed.end("(stopped)")
        self.num_asked += 1
        self.exchanges = [*exchanges[:-1], exchanges[-1].answered(printed.text)]


class Printed:
    """An answer on standard output: what is new of it as it grows on a terminal, all of it at the end elsewhere."""

    def __init__(self) -> None:
        self.text = ""
        self.shown = ""

    def show(self, answers: Answers) -> None:
        """Print what has come since the last call."""
        self.text = answers.texts[0]
        whole = answers.cut is not None
        if sys.stdout.isatty() and self.text.startswith(self.shown):
            typer.echo(self.text[len(self.shown) :], nl=False)
            self.shown = self.text
        if whole:
            # Where the text has become another one (an answer begun anew), it is printed once more.
            self.end("(cut: --max-new-tokens allows no more)" if any(answers.cut or ()) else None)

    def end(self, remark: str | None) -> None:
        """Print the rest, and a remark below it."""
        if self.shown != self.text:
            typer.echo(("\n" if self.shown else "") + self.text, nl=False)
        typer.echo()
        if remark and sys.stdout.isatty():
            typer.secho(remark, dim=True)


def chat_in_terminal(
    checkpoint: str,
    files: Sequence[Path],
    question: str | None,
    settings: SamplingSettings,
    *,
    api_key_env: str | None = None,
) -> None:
    """Answer `question`, or whatever is typed until the end of input or an empty line.

    Raises:
        UserError: a file or a question cannot be used; a person at a terminal sees why and may continue.
    """
    conversation = Conversation(Chat(checkpoint, api_key_env=api_key_env), files, settings)
    if question is not None:
        conversation.ask(question)
        return
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        _edit_lines()
        typer.secho("/help lists what else can be typed", dim=True, err=True)
    for line in _typed_lines():
        try:
            _obey(conversation, line)
        except UserError as error:
            if not at_terminal:
                raise
            typer.secho(str(error), fg=typer.colors.RED, err=True)


def _obey(conversation: Conversation, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/image":
        for name in _names(rest):
            conversation.show(Path(name).expanduser())
    elif command == "/clear":
        conversation.clear()
    elif command == "/retry":
        conversation.retry()
    elif command == "/help":
        typer.echo(HELP)
    elif command.startswith("/") and sys.stdin.isatty():
        raise UserError(f"there is no command {command}", fix="/help lists those there are")
    else:
        conversation.ask(line)


def _names(text: str) -> list[str]:
    try:
        names = shlex.split(text)
    except ValueError as error:
        raise UserError(f"expected names of files, found {text!r} ({error})") from None
    if not names:
        raise UserError("expected a file behind /image")
    return names


def _typed_lines() -> Iterator[str]:
    """Lines until the end of input or an empty line; Ctrl-C where a question is awaited ends too."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if not prompt:
                raise
            break
        if not line:
            return
        yield line
    if prompt:
        typer.echo()


def _edit_lines() -> None:
    """Arrow keys and earlier lines in `input`, where the system has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401

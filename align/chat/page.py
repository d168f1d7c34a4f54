"""Loaded checkpoints in, the page's controls out: what each does to a visitor's conversation, and what is shown of it.

Texts stand as they were written, no Markdown of a model or a visitor is rendered. What goes wrong is reported to the
visitor in a sentence. Needs Gradio; `align.chat.web` serves the page.

Of several changes that reach a busy browser together, Gradio's page makes only the last: each that a control yields
says all that it changes. So asking takes three controls: one empties the box, the next answers, and the last puts
what was refused into the box again. They act on one `Visit`, as other controls do meanwhile.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr

from align.chat.answers import VIDEO_SUFFIXES, Answers, Chat, Exchange, short_name
from align.chat.guard import in_one_line
from align.engines.base import SamplingSettings
from align.errors import UserError
from align.hub.model_card import lineage_of
from align.log import log
from align.models.inspect import licence_of
from align.models.load import read_config

MAX_ANSWERS = 4
MAX_FILES = 16
MOST_NEW_TOKENS = 4096
NO_LINEAGE = "Its folder tells no lineage: it is a first policy, or was made elsewhere."

EMPTY: dict[str, Any] = {"text": "", "files": []}
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}

# What a control does: values for the parts of the page that change, once or again and again.
Changes = Iterator[dict[Any, Any]]


@dataclass(frozen=True)
class Asked:
    """A question that is not answered yet: what the box held, and the talk that it was asked in."""

    box: dict[str, Any]
    before: Talk


@dataclass(frozen=True)
class Talk:
    """A visitor's conversation, and the answers to its last question; it continues the one that is `chosen`.

    `names` are the answers' headings. `asked` is there from when a question leaves the box until it is answered.
    """

    exchanges: tuple[Exchange, ...] = ()
    answers: Answers = field(default_factory=lambda: Answers(()))
    names: tuple[str, ...] = ()
    chosen: int = 0
    num_asked: int = 0
    asked: Asked | None = None

    def going_on_from(self, index: int) -> Talk:
        """The talk in which the answer of this index is the one that was given."""
        last = self.exchanges[-1].answered(self.answers.texts[index])
        return replace(self, exchanges=(*self.exchanges[:-1], last), chosen=index)

    def unanswered(self) -> Talk:
        """The talk before its last answer."""
        last = self.exchanges[-1].answered(None)
        return replace(self, exchanges=(*self.exchanges[:-1], last), answers=Answers(()), chosen=0)


class Visit:
    """The talk as it stands, which several controls act on at a time; one that another has overtaken ends.

    `answering`: a control is answering, or has yet to notice that it was overtaken.
    """

    _lock = threading.Lock()

    def __init__(self) -> None:
        self.talk = Talk()
        self.answering = False

    def continue_with(self, talk: Talk, *, after: Talk) -> bool:
        """Let the talk go on; False where it is no more the one that is continued."""
        with self._lock:
            if self.talk is not after:
                return False
            self.talk = talk
            return True

    def overtake_with(self, talk: Talk) -> None:
        """Let this be the talk, whatever goes on."""
        with self._lock:
            self.talk = talk


class Page:
    """The page of these checkpoints. `settings` are what its controls begin with."""

    def __init__(self, chats: Sequence[Chat], settings: SamplingSettings) -> None:
        self.chats = list(chats)
        self.settings = settings
        self.kinds = ["image", *(VIDEO_SUFFIXES if importlib.util.find_spec("av") else ())]

    def build(self) -> gr.Blocks:
        """The page, with all that its buttons do."""
        with gr.Blocks(title="align chat", analytics_enabled=False) as blocks:
            self.visit = gr.State(Visit())
            for chat in self.chats:
                _build_heading(chat)
            with gr.Row():
                with gr.Column(scale=4, min_width=320):
                    self._build_conversation()
                with gr.Column(scale=1, min_width=320):
                    self._build_settings()
            self._connect()
        return blocks

    def _build_conversation(self) -> None:
        self.shown = gr.Chatbot(
            show_label=False,
            height="auto",
            min_height=260,
            max_height=640,
            buttons=[],
            feedback_options=None,
            render_markdown=False,
            placeholder="Add an image and ask about it.",
            elem_id="conversation",
        )
        with gr.Row(visible=False, elem_id="answers") as self.answers:
            self.cards = [_build_card() for _ in range(MAX_ANSWERS * len(self.chats))]
        self.box = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Ask something",
            file_count="multiple",
            file_types=self.kinds,
            sources=["upload"],
            autofocus=True,
            elem_id="question",
        )
        with gr.Row(elem_id="controls"):
            self.retry_button = gr.Button("Retry", size="sm", min_width=80)
            self.stop_button = gr.Button("Stop", size="sm", min_width=80)
            self.clear_button = gr.Button("Clear", size="sm", min_width=80)

    def _build_settings(self) -> None:
        begin, most = self.settings, max(MOST_NEW_TOKENS, self.settings.max_new_tokens)
        each = ", of each checkpoint" if len(self.chats) > 1 else ""
        self.wishes = [
            gr.Slider(0, 2, begin.temperature, step=0.05, label="Temperature", info="0: the likeliest answer"),
            gr.Slider(1, most, begin.max_new_tokens, step=1, label="Longest answer", info="in tokens"),
            gr.Slider(
                1, MAX_ANSWERS, 1, step=1, label="Answers side by side", info=f"with a temperature above 0{each}"
            ),
        ]

    def _connect(self) -> None:
        visit, view = self.visit, [self.shown, self.answers, *(part for card in self.cards for part in card)]
        asked = _on(self.box.submit, self.ask, [self.box, visit], [*view, self.box])
        # Asked while the page still hears of the answer before, it is answered next.
        answered = _on(
            asked.success, self.answer, [visit, *self.wishes], view, trigger_mode="always_last", **ONE_AT_A_TIME
        )
        _on(answered.success, self.give_back, [visit], [*view, self.box])
        _on(self.retry_button.click, self.retry, [visit, *self.wishes], view, **ONE_AT_A_TIME)
        _on(self.stop_button.click, self.stop, [visit], view)
        _on(self.clear_button.click, self.clear, [visit], [*view, self.box])
        for index, (_, _, button) in enumerate(self.cards):
            _on(button.click, functools.partial(self.choose, index), [visit], view)

    def ask(self, message: dict[str, Any], visit: Visit) -> Changes:
        """Take the question out of the box into the conversation."""
        before = visit.talk
        if visit.answering or before.asked is not None:
            raise UserError("the question before this one is not answered yet", fix="wait for it, or press Stop")
        question, files = message["text"].strip(), [Path(file) for file in message["files"]]
        if not question:
            raise UserError("there is no question", fix="write one beside the images")
        if len(files) > MAX_FILES:
            raise UserError(f"expected at most {MAX_FILES} files with a question, found {len(files)}")
        exchanges = (*before.exchanges, self._exchange(question, files))
        talk = Talk(exchanges, num_asked=before.num_asked, asked=Asked(message, before))
        if visit.continue_with(talk, after=before):
            yield {**self._view(talk), self.box: EMPTY}

    def answer(self, visit: Visit, *wishes: float) -> Changes:
        """Answer the question that was asked, if it still is."""
        if visit.talk.asked is not None:
            yield from self._answer(visit, *wishes)

    def give_back(self, visit: Visit) -> Changes:
        """Put the question back into the box, if it was not answered."""
        talk = visit.talk
        if talk.asked is not None and visit.continue_with(talk.asked.before, after=talk):
            yield {**self._view(talk.asked.before), self.box: talk.asked.box}

    def _exchange(self, question: str, files: list[Path]) -> Exchange:
        try:
            return self.chats[0].ask(question, files)
        except UserError as error:
            # Where the server keeps what was uploaded is nothing to a visitor.
            text = functools.reduce(lambda text, file: text.replace(f"{file.parent}/", ""), files, str(error))
            raise UserError(text) from None

    def retry(self, visit: Visit, *wishes: float) -> Changes:
        """Ask the last question again."""
        if not visit.talk.exchanges:
            raise UserError("nothing has been asked yet")
        yield from self._answer(visit, *wishes)

    def stop(self, visit: Visit) -> Changes:
        """Leave the question as far as it has been answered."""
        yield self._overtake(visit, replace(visit.talk, asked=None))

    def clear(self, visit: Visit) -> Changes:
        """Begin a new talk."""
        yield {**self._overtake(visit, Talk()), self.box: EMPTY}

    def choose(self, index: int, visit: Visit) -> Changes:
        """Go on from the answer that was chosen."""
        yield self._overtake(visit, replace(visit.talk, asked=None).going_on_from(index))

    def _overtake(self, visit: Visit, talk: Talk) -> dict[Any, Any]:
        visit.overtake_with(talk)
        return self._view(talk)

    def _answer(self, visit: Visit, *wishes: float) -> Changes:
        visit.answering = True
        try:
            talk = visit.talk
            with closing(self._answering(talk, *wishes)) as talks:
                for further in talks:
                    if not visit.continue_with(further, after=talk):
                        break
                    talk = further
                    yield self._view(talk)
        finally:
            visit.answering = False
        yield self._view(visit.talk)

    def _answering(self, talk: Talk, temperature: float, max_new_tokens: float, num_answers: float) -> Generator[Talk]:
        """The talk with the answers of one checkpoint after the other as they grow."""
        settings = replace(self.settings, temperature=temperature, max_new_tokens=int(max_new_tokens))
        number = int(num_answers) if temperature > 0 else 1
        talk = replace(talk.unanswered(), num_asked=talk.num_asked + 1, names=self._names(number))
        yield talk
        before = Answers((), ())
        for chat in self.chats:
            stream = chat.answer(talk.exchanges, settings, num_answers=number, seed=talk.num_asked - 1)
            with closing(stream):
                for answers in stream:
                    cut = answers.cut or (False,) * number
                    both = Answers(before.texts + answers.texts, (before.cut or ()) + cut)
                    yield replace(talk, answers=both).going_on_from(0)
            before = both
        yield replace(talk, answers=before, asked=None).going_on_from(0)

    def _names(self, number: int) -> tuple[str, ...]:
        """The headings of the answers that stand side by side."""
        if len(self.chats) == 1:
            return tuple(f"Answer {index + 1}" for index in range(number))
        names = [chat.model or short_name(chat.checkpoint) for chat in self.chats]
        return tuple(f"{name} · {index + 1}" if number > 1 else name for name in names for index in range(number))

    def _view(self, talk: Talk) -> dict[Any, Any]:
        """The conversation, and the answers side by side where they are several."""
        several = len(talk.names) > 1 and bool(talk.answers.texts)
        changes: dict[Any, Any] = {self.shown: _messages(talk), self.answers: gr.Row(visible=several)}
        for index, (column, text, button) in enumerate(self.cards):
            there = several and index < len(talk.answers.texts)
            changes[column] = gr.Column(visible=there)
            if there:
                cut = " (cut: longer than allowed)" if (talk.answers.cut or ())[index] else ""
                changes[text] = gr.Textbox(talk.answers.texts[index], label=talk.names[index] + cut)
                changes[button] = _button(index == talk.chosen)
        return changes


def _build_heading(chat: Chat) -> None:
    checkpoint = chat.checkpoint
    if chat.model is not None:
        # What is behind a server's address is not seen from here.
        gr.Markdown(f"{html.escape(chat.model)} · served at {html.escape(checkpoint)}", elem_classes="lineage")
        return
    architecture = (read_config(checkpoint).get("architectures") or ["unknown architecture"])[0]
    about = " · ".join(filter(None, (architecture, licence_of(checkpoint))))
    with gr.Accordion(f"{short_name(checkpoint)} · {about} · lineage", open=False):
        gr.Markdown(lineage_of(checkpoint) or NO_LINEAGE, elem_classes="lineage")


def _build_card() -> tuple[gr.Column, gr.Textbox, gr.Button]:
    with gr.Column(min_width=170, visible=False) as column:
        text = gr.Textbox(lines=2, max_lines=20, interactive=False, buttons=[])
        button = _button(chosen=False)
    return column, text, button


def _button(chosen: bool) -> gr.Button:
    if chosen:
        return gr.Button("✓ Goes on from this", variant="primary", size="sm")
    return gr.Button("Go on from this", variant="secondary", size="sm")


def _messages(talk: Talk) -> list[dict[str, Any]]:
    """The conversation as Gradio shows it. It takes texts for HTML, whether it renders Markdown or not."""
    messages: list[dict[str, Any]] = []
    for exchange in talk.exchanges:
        messages += [{"role": "user", "content": {"path": str(file)}} for file in exchange.files]
        messages.append({"role": "user", "content": html.escape(exchange.question)})
        if exchange.answer is not None:
            messages.append({"role": "assistant", "content": html.escape(exchange.answer)})
    if (talk.answers.cut or (False,))[talk.chosen] and messages:
        messages[-1]["content"] += "\n(cut: longer than allowed)"
    return messages


def _on(
    event: Callable[..., Any], control: Callable[..., Changes], given: list[Any], changed: list[Any], **how: Any
) -> Any:
    """Let a control act on an event. Its faults are reported to the visitor: those to be fixed as they are, others
    without their details."""

    def reporting(*values: Any) -> Changes:
        said: dict[Any, Any] = {}
        # Told as a warning: after an error Gradio covers all that the control changes, the conversation too.
        try:
            for changes in control(*values):
                said |= changes
                yield dict(said)
        except UserError as error:
            gr.Warning(html.escape(str(error)), duration=None, title="Not answered")
        except Exception as error:
            log.error("a visitor's question failed: %s", in_one_line(error))
            log.debug("where it failed", exc_info=True)
            text = "This went wrong, and it is not your fault; the terminal that serves the page says more."
            gr.Warning(text, duration=None, title="Not answered")
        if not said:
            yield gr.skip()

    return event(reporting, given, changed, show_progress="hidden", api_visibility="private", **how)

"""A labelling session in, the page's controls out: a question with its images, two responses, and which one is better.

Who labels sees neither the critic's choice nor which response is which; texts stand as they were written. Needs Gradio;
`align.label.web` serves the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from align.label.comparisons import Comparison, sides
from align.label.session import Labelling

LEFT, RIGHT = 0, 1
NO_NAME = "Write your name first: ratings are kept by annotator."
DONE = "All of them are compared. Thank you."

Changes = dict[Any, Any]


@dataclass(frozen=True)
class Visit:
    """Who labels on this visitor's page, and what is shown: a comparison that is to be made, or made again."""

    annotator: str = ""
    comparison: Comparison | None = None


class LabelPage:
    """The page of a session. `open_image` opens a question's image; `seed` draws the sides."""

    def __init__(self, session: Labelling, open_image: Callable[[str], Image.Image], *, seed: int) -> None:
        self.session = session
        self.open_image = open_image
        self.seed = seed

    def build(self) -> gr.Blocks:
        """The page, with all that its buttons do."""
        with gr.Blocks(title="align label", analytics_enabled=False) as blocks:
            self.visit = gr.State(Visit())
            # What the browser shows when a button is pressed: a second press of a slow page rates nothing unseen.
            self.shown = gr.Textbox(visible=False)
            with gr.Row(elem_id="who"):
                self.name = gr.Textbox(label="Your name", max_lines=1, autofocus=True, elem_id="name", scale=4)
                self.start_button = gr.Button("Start", elem_id="start", scale=1)
            self.status = gr.Textbox(show_label=False, interactive=False, buttons=[], elem_id="status")
            with gr.Column(visible=False, elem_id="comparison") as self.column:
                self.images = gr.Gallery(show_label=False, columns=2, buttons=[], elem_id="images", height=380)
                self.question = gr.Textbox(label="Question", interactive=False, buttons=[], elem_id="question")
                with gr.Row():
                    self.texts = [
                        gr.Textbox(label=label, interactive=False, buttons=[], lines=3, elem_id=f"{label.lower()}-text")
                        for label in ("Left", "Right")
                    ]
                with gr.Row(elem_id="choices"):
                    self.buttons = {
                        "left": gr.Button("Left is better (1)", elem_id="left"),
                        "tie": gr.Button("Equally good or bad (0)", elem_id="tie"),
                        "right": gr.Button("Right is better (2)", elem_id="right"),
                    }
                self.back_button = gr.Button("Back (Backspace)", size="sm", elem_id="back")
            self._connect()
        return blocks

    def _connect(self) -> None:
        parts = [self.visit, self.shown, self.status, self.column, self.images, self.question, *self.texts]
        how: dict[str, Any] = {"outputs": parts, "show_progress": "hidden", "api_visibility": "private"}
        # One after the other: a rating is written before the next press is looked at.
        turn: dict[str, Any] = {"concurrency_id": "rate", "concurrency_limit": 1}
        self.start_button.click(self.start, self.name, **how, **turn)
        self.name.submit(self.start, self.name, **how, **turn)
        for button, preferred in (("left", LEFT), ("tie", None), ("right", RIGHT)):
            self.buttons[button].click(self._rating(preferred), [self.visit, self.shown], **how, **turn)
        self.back_button.click(self.back, self.visit, **how, **turn)

    def start(self, name: str) -> Changes:
        """Show this person's next comparison."""
        annotator = name.strip()
        if not annotator:
            return {self.status: NO_NAME}
        return self._view(Visit(annotator, self.session.next_for(annotator)))

    def rate(self, preferred: int | None, visit: Visit, shown: str) -> Changes:
        """Write down which side is better, and show the next comparison."""
        if visit.comparison is None or shown != visit.comparison.id:
            return {self.visit: visit}
        order = sides(visit.comparison, visit.annotator, self.seed)
        self.session.rate(visit.annotator, visit.comparison, order, preferred)
        return self._view(Visit(visit.annotator, self.session.next_for(visit.annotator)))

    def back(self, visit: Visit) -> Changes:
        """Show what this person compared last, to compare it again."""
        last = self.session.last_of(visit.annotator)
        return self._view(visit if last is None else Visit(visit.annotator, last))

    def _rating(self, preferred: int | None) -> Callable[[Visit, str], Changes]:
        return lambda visit, shown: self.rate(preferred, visit, shown)

    def _view(self, visit: Visit) -> Changes:
        """The comparison with the sides as they are drawn for this person, and how far they are."""
        done, all_ = self.session.num_done(visit.annotator), len(self.session.comparisons)
        said = [f"{visit.annotator}: {done} of {all_} compared.", self.session.how_sure()]
        comparison = visit.comparison
        if comparison is None:
            said.append(DONE)
        changes: Changes = {
            self.visit: visit,
            self.status: " ".join(filter(None, said)),
            self.column: gr.Column(visible=comparison is not None),
            self.shown: "" if comparison is None else comparison.id,
        }
        if comparison is not None:
            order = sides(comparison, visit.annotator, self.seed)
            changes[self.images] = [self.open_image(name) for name in comparison.question.images]
            changes[self.question] = comparison.question.as_text()
            changes |= {text: comparison.texts[index] for text, index in zip(self.texts, order, strict=True)}
        return changes

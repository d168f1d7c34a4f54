"""A round in, a page on which people compare its responses out, served until Ctrl-C; then what they agree on.

The page is served as that of `align chat`: on its own machine by default, guarded against other sites' requests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.chat.web import Address, serve_page
from align.config import Config
from align.label.comparisons import draw_comparisons
from align.label.keys import HEAD
from align.label.session import Labelling
from align.media.images import question_images
from align.records import read_jsonl
from align.run.folder import RunDir
from align.run.ratings import current_ratings
from reward.human_ratings import Kappa, agreement_of_people
from reward.judgement import Judgement


def label_on_page(config: Config, number: int, address: Address, *, num_comparisons: int, seed: int) -> Labelling:
    """Serve the page of a round until Ctrl-C; what was labelled lies in the round's `ratings.jsonl`.

    Raises:
        UserError: the round has nothing to compare, its ratings are damaged, Gradio is missing, or the address is
            taken.
    """
    this = RunDir(config.run_dir).round(number)
    comparisons = draw_comparisons(this, number=num_comparisons, seed=seed)
    judgements = read_jsonl(this.scores, Judgement) if this.scores.is_file() else []
    session = Labelling(comparisons, this.ratings, judgements)
    images = question_images(config)

    def build() -> Any:
        from align.label.page import LabelPage

        return LabelPage(session, images.open, seed=seed).build()

    css = Path(__file__).with_name("page.css")
    serve_page(build, address, css=css, head=HEAD, name="label", offers="see the images and rate the responses")
    return session


def agreement_lines(config: Config, number: int, session: Labelling) -> list[str]:
    """What the ratings of a round say: the critic with people, and every two people with each other."""
    lines = [_line("critic and people", session.agreement())]
    people = agreement_of_people(current_ratings(RunDir(config.run_dir).round(number)))
    return [line for line in [*lines, *(_line(names, kappa) for names, kappa in people.items())] if line]


def _line(names: str, kappa: Kappa | None) -> str:
    """
    >>> _line("critic and people", Kappa(0.5, 0.1, 0.8, 30, 40))
    "critic and people: 30 of 40 the same; Cohen's kappa 0.50 [0.10, 0.80]"
    """
    if kappa is None:
        return ""
    said = f"{names}: {kappa.agreed} of {kappa.count} the same"
    if kappa.kappa is None:
        return f"{said}; both always say the same one thing"
    return f"{said}; Cohen's kappa {kappa.kappa:.2f} [{kappa.low:.2f}, {kappa.high:.2f}]"

"""What people said of a run's responses in; how far its critic agrees with them, and they with each other, out.

The critic is the same in all rounds, so what was labelled in an earlier round counts in the later ones, too. Ratings of
responses that a round no longer holds (it was sampled again) are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from align.errors import reward_faults
from align.log import log
from align.records import Samples, iter_jsonl
from align.run.folder import Round, RunDir
from reward.human_ratings import (
    HumanRating,
    Label,
    cohens_kappa,
    labels_of_people,
    labels_with_critic,
    read_ratings,
)
from reward.judgement import Judgement
from reward.reliability import Figure


def current_ratings(this: Round) -> list[HumanRating]:
    """The ratings of the responses that the round holds.

    Raises:
        UserError: the file of ratings or of samples is damaged.
    """
    if not (this.ratings.is_file() and this.samples.is_file()):
        return []
    with reward_faults():
        ratings = read_ratings(this.ratings)
    rated = {rating.question_id for rating in ratings}
    texts = {
        line.id: [response.text for response in line.responses]
        for line in iter_jsonl(this.samples, Samples)
        if line.id in rated
    }
    current = [rating for rating in ratings if _is_of(rating, texts.get(rating.question_id, []))]
    if len(current) < len(ratings):
        log.warning("%s: %d ratings are of other responses and are left out", this.ratings, len(ratings) - len(current))
    return current


def people_figures(run: RunDir, number: int) -> dict[str, Figure]:
    """`agreement_with_people` and `agreement_between_people`, over the ratings of this round and those before.

    Cohen's kappa with its interval; between people every two of them are counted, where both made the comparison.
    """
    critic: list[tuple[Label, Label]] = []
    people: list[tuple[Label, Label]] = []
    compared: set[tuple[int, str]] = set()
    for earlier in range(1, number + 1):
        this = run.round(earlier)
        ratings = current_ratings(this)
        compared |= {(earlier, rating.question_id) for rating in ratings}
        if ratings and this.scores.is_file():
            critic += labels_with_critic(iter_jsonl(this.scores, Judgement), ratings)
        people += [pair for labels in labels_of_people(ratings).values() for pair in labels]
    found = {"agreement_with_people": critic, "agreement_between_people": people}
    figures = {name: _figure(labels, len(compared)) for name, labels in found.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _figure(labels: Sequence[tuple[Label, Label]], questions: int) -> Figure | None:
    kappa = cohens_kappa(labels)
    if kappa is None or kappa.kappa is None:
        return None
    return Figure(value=kappa.kappa, low=kappa.low, high=kappa.high, count=kappa.count, questions=questions)


def _is_of(rating: HumanRating, texts: Sequence[str]) -> bool:
    if max(rating.responses) >= len(texts):
        return False
    shown = tuple(texts[index].strip() for index in rating.responses)
    return rating.texts is None or tuple(text.strip() for text in rating.texts) == shown

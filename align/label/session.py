"""Comparisons and a file of ratings in; what each annotator has still to compare, and new ratings in the file, out.

A rating is in the file once it is given, so nothing is lost when the page is stopped; the same command resumes. A last
line that was torn is cut off. Responses stand in a rating as they were shown, the left one first. Of a person's several
ratings of the same two responses the last one counts.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from align.errors import reward_faults
from align.files import make_folder
from align.label.comparisons import Comparison
from align.records import to_line
from reward.human_ratings import HumanRating, Kappa, agreement_with_people, read_ratings
from reward.judgement import Judgement

# From so many labels on it is said how sure one can be.
ENOUGH_TO_SAY = 20


class Labelling:
    """What is compared, by whom, and what they said. `judgements` are the critic's, where it has judged."""

    def __init__(self, comparisons: Sequence[Comparison], file: Path, judgements: Sequence[Judgement] = ()) -> None:
        self.comparisons = list(comparisons)
        self.file = file
        self.judgements = list(judgements)
        self._lock = threading.Lock()
        self._by_id = {comparison.id: comparison for comparison in self.comparisons}
        self._ratings: dict[tuple[str, str], HumanRating] = {}
        make_folder(file.parent)
        if file.is_file():
            _end_the_last_line(file)
            with reward_faults():
                found = read_ratings(file)
            for rating in found:
                self._remember(rating)

    def next_for(self, annotator: str) -> Comparison | None:
        """The first comparison that this person has not made; None when all are."""
        return next((one for one in self.comparisons if (annotator, one.id) not in self._ratings), None)

    def num_done(self, annotator: str) -> int:
        """How many of the comparisons this person has made."""
        return sum((annotator, comparison.id) in self._ratings for comparison in self.comparisons)

    def last_of(self, annotator: str) -> Comparison | None:
        """The comparison that this person made last, to make it again."""
        done = [id_ for person, id_ in self._ratings if person == annotator]
        return self._by_id[done[-1]] if done else None

    def rate(self, annotator: str, comparison: Comparison, shown: tuple[int, int], preferred: int | None) -> None:
        """Write down which side is preferred: 0 the left, 1 the right one, None neither; `shown` as `sides` says."""
        responses = (comparison.responses[shown[0]], comparison.responses[shown[1]])
        rating = HumanRating(
            question_id=comparison.question.id,
            responses=responses,
            preferred=None if preferred is None else responses[preferred],
            annotator=annotator,
            texts=(comparison.texts[shown[0]], comparison.texts[shown[1]]),
        )
        with self._lock:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(to_line(rating) + "\n")
            self._remember(rating)

    def agreement(self) -> Kappa | None:
        """The critic's with everybody's ratings of these comparisons."""
        return agreement_with_people(self.judgements, self._ratings.values())

    def how_sure(self) -> str:
        """From `ENOUGH_TO_SAY` labels on: how wide the interval of the critic's agreement still is.

        Not how large the agreement is: who labels should not know.
        """
        found = self.agreement()
        if found is None or found.count < ENOUGH_TO_SAY or found.low is None or found.high is None:
            return ""
        half = (found.high - found.low) / 2
        wanted = math.ceil(found.count * 4 / 10) * 10
        return (
            f"After {found.count} labels the agreement of critic and people (Cohen's kappa) is known to within "
            f"±{half:.2f}; after {wanted} it would be about ±{half * math.sqrt(found.count / wanted):.2f}."
        )

    def _remember(self, rating: HumanRating) -> None:
        low, high = sorted(rating.responses)
        comparison = self._by_id.get(f"{rating.question_id}/{low}-{high}")
        if comparison is None or (rating.texts is not None and set(rating.texts) != set(comparison.texts)):
            return
        key = (rating.annotator, comparison.id)
        self._ratings.pop(key, None)
        self._ratings[key] = rating


def _end_the_last_line(file: Path) -> None:
    """A last line without an end is a rating that somebody else wrote, or was torn: it is ended, or cut off."""
    data = file.read_bytes()
    start = data.rfind(b"\n") + 1
    if start == len(data):
        return
    try:
        HumanRating.model_validate_json(data[start:])
    except ValidationError:
        file.write_bytes(data[:start])
    else:
        file.write_bytes(data + b"\n")

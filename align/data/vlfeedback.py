"""VLFeedback: four answers a question, each rated by GPT-4V; the best against the worst becomes a pair.

``{"id", "prompt", "img_path", "models", "completions"}``, a completion being ``{"model", "response", "annotations":
{"Helpfulness" | "Visual Faithfulness" | "Ethical Considerations": {"Rating": "1".."5" or "N/A", "Rationale"}}}``;
`datasets` gives the completions as columns (a dict of lists). Card of MMInstruction/VLFeedback.
"""

from __future__ import annotations

from typing import Any

from align.data.entry import BadRow, Entry, Preference
from align.data.fields import Fields
from reward.pairs import choose_pairs
from reward.prompt import as_number


def read_vlfeedback(row: Fields) -> Entry:
    """The question with its best against its worst answer, by the mean of the ratings that are numbers."""
    completions = _completions(row.take("chosen, rejected", "completions"))
    responses = [Fields(completion).text("response") for completion in completions]
    rewards = [_mean_rating(completion.get("annotations")) for completion in completions]
    chosen = choose_pairs(rewards, responses)
    preferences = [Preference(responses[pair.chosen], responses[pair.rejected], pair.margin) for pair in chosen.pairs]
    if not preferences:
        raise BadRow("no two answers differ in their ratings", chosen.why_none or "")
    return Entry(
        row.text("question", "prompt"), row.images("img_path", "image"), row.label("id"), preferences=preferences
    )


def _completions(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        try:
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
        except (TypeError, ValueError):
            raise BadRow("completions are no columns of equal length") from None
    if not isinstance(value, list) or not all(isinstance(completion, dict) for completion in value):
        raise BadRow("completions are no list")
    return value


def _mean_rating(annotations: Any) -> float | None:
    """The mean over aspects; None where no aspect has a number.

    >>> _mean_rating({"Helpfulness": {"Rating": "5"}, "Visual Faithfulness": {"Rating": "N/A"}})
    5.0
    """
    if not isinstance(annotations, dict):
        return None
    ratings = [as_number(str(aspect.get("Rating"))) for aspect in annotations.values() if isinstance(aspect, dict)]
    numbers = [rating for rating in ratings if rating is not None]
    return sum(numbers) / len(numbers) if numbers else None

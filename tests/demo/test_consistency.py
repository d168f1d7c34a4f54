"""The table of where the demo's critic contradicts itself, of one question with known verdicts."""

import sys
from pathlib import Path

from align.records import Question, Response, Samples, write_jsonl
from align.run.folder import RunDir
from reward.judgement import Judgement, Verdict

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from demo_consistency import Compared, compare

RIGHT, ONE_MORE, ANOTHER, TWO_MORE = "3 and 7", "3, 7 and 1", "3, 7 and 9", "3, 7, 1 and 9"


def verdicts(first: int, second: int, forth: float, back: float) -> list[Verdict]:
    """Both orders of a pair; `forth` and `back` are what the place shown first gets."""
    return [
        Verdict(first=a, second=b, p_first=p, p_second=1 - p, winner=a if p > 0.5 else b)
        for a, b, p in ((first, second, forth), (second, first, back))
    ]


def test_pairs_are_told_apart_by_whether_one_is_right_and_both_orders_are_held_against_each_other(tmp_path):
    texts = [f"The digits are {digits}." for digits in (RIGHT, ONE_MORE, ANOTHER, TWO_MORE)]
    question = Question(
        id="q",
        question="List the digits from left to right.",
        images=["q.png"],
        meta={"task": "list", "digits": [3, 7]},
    )
    responses = [Response(text=text, num_tokens=9) for text in texts]
    this = RunDir(tmp_path).round(1)
    this.path.mkdir(parents=True)
    write_jsonl(this.samples, [Samples(id="q", question=question, responses=responses, seed=0)])
    said = [
        *verdicts(0, 1, 0.9, 0.2),  # right above wrong, in both orders
        *verdicts(1, 2, 0.2, 0.3),  # equally wrong: each time the second place
        *verdicts(1, 3, 0.8, 0.9),  # the nearer one only where it is shown first, and less surely than the other
        *(v.model_copy(update={"winner": None}) for v in verdicts(2, 3, 0.6, 0.3)),  # a tie that leans to the nearer
    ]
    write_jsonl(this.scores, [Judgement(id="q", rewards=[1.0, 0.0, 0.0, 0.0], verdicts=said)])

    found = compare(tmp_path, 1)

    assert (
        found["right"] == found["right, list"] == [Compared(1.0, 1.0, first_place=0.0, ties=0.0, ordered_by_merit=1.0)]
    )
    assert found["equal"] == [Compared(0.0, 0.0, first_place=-1.0, ties=0.0, ordered_by_merit=0.0)]
    assert found["unequal"] == [
        Compared(0.0, 0.0, first_place=1.0, ties=0.0, ordered_by_merit=0.0),
        Compared(1.0, 1.0, first_place=0.0, ties=1.0, ordered_by_merit=1.0),
    ]
    assert len(found["all"]) == 4

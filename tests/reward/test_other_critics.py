"""Pointwise, claims, scalar and panel on responses whose order is known by construction."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace

import pytest

from reward.critics import make_critic, needs, uses_judge_model
from reward.critics.base import NO_ANSWER, NO_REFERENCE, OUTSIDE_OPTIONS, REFUSED, UNPARSEABLE
from reward.critics.claims import NO_CLAIMS, ClaimsCritic, listed_claims, sentences
from reward.critics.length import LengthCritic
from reward.critics.panel import NORMALISERS, PanelCritic
from reward.critics.pointwise import PointwiseCritic
from reward.critics.random import RandomCritic
from reward.critics.scalar import NOT_FINITE, Dialogue, ScalarCritic
from reward.critics.verifier import VerifierCritic
from reward.errors import RewardError
from reward.judgement import Item, Judgement
from reward.pairs import NO_CORRECTNESS, PairSettings, choose_pairs
from tests.reward.judge_models import FunctionModel

ITEM = Item("q1", "Which letters?", ("abcd",), ("ab", "abcd", "x", "abc", "ab"))
ORDER = [1, 3, 0, 2]


def shown(turn: str) -> str:
    return re.search(r"The response: \[(.*?)\]", turn, re.DOTALL).group(1)


def good(response: str) -> int:
    return sum(letter in "abcd" for letter in response)


def rating_row(turn: str) -> list[float]:
    """Eleven ratings 0, 10, ..., 100; the mass lies on 20 x the number of right letters and one step above."""
    row = [-math.inf] * 11
    row[2 * good(shown(turn))] = math.log(0.75)
    row[2 * good(shown(turn)) + 1] = math.log(0.25)
    return row


def test_a_rating_is_the_mean_over_the_probabilities():
    [judgement] = PointwiseCritic(judge_model=FunctionModel(row=rating_row)).judge([ITEM])
    # 0.75 * r + 0.25 * (r + 10) = r + 2.5
    assert judgement.rewards == pytest.approx([42.5, 82.5, 2.5, 62.5, 42.5])
    assert judgement.ratings == judgement.rewards
    assert judgement.verdicts == []
    # sqrt(0.75 * 2.5^2 + 0.25 * 7.5^2)
    assert judgement.evidence["rating_sd"]["0"] == pytest.approx(math.sqrt(18.75))
    assert judgement.evidence["mean_option_mass"] == pytest.approx(1.0)


def test_ratings_of_one_item_are_one_ask_without_repeats():
    judge_model = FunctionModel(row=rating_row)
    PointwiseCritic(judge_model=judge_model).judge([ITEM])
    assert [branch for prompt in judge_model.prompts for branch in prompt.branches] == [
        ("ab",),
        ("abcd",),
        ("x",),
        ("abc",),
    ]


def test_a_scale_of_its_own_is_brought_to_a_hundred(tmp_path):
    path = tmp_path / "mine.md"
    path.write_text(
        "---\nscale: [1, 5]\noptions: {1: one, 3: three, 5: five}\n---\n{question} The response: [{response}]"
    )
    critic = PointwiseCritic(
        judge_model=FunctionModel(row=lambda turn: [math.log(0.5), math.log(0.5), -math.inf]), prompt=path
    )
    assert critic.judge([ITEM])[0].rewards == pytest.approx([25.0] * 5)
    path.write_text("{question} {response}")
    with pytest.raises(RewardError, match="at least two ratings"):
        make_critic("pointwise", {"prompt": str(path)}, judge_model=FunctionModel())


def test_written_ratings_rank_and_failures_are_unscored():
    answers = {"ab": "Score: 40/100", "abcd": "Score: 90/100", "x": "I'm sorry, I can't help.", "abc": "fine", "": None}
    critic = PointwiseCritic(judge_model=FunctionModel(text=lambda turn: answers[shown(turn)]), read="text")
    [judgement] = critic.judge([replace(ITEM, responses=("ab", "abcd", "x", "abc", ""))])
    assert judgement.rewards == [40.0, 90.0, None, None, None]
    assert judgement.unscored == {2: REFUSED, 3: UNPARSEABLE, 4: NO_ANSWER}
    assert judgement.evidence["rationales"]["0"] == "Score: 40/100"


def test_a_rating_that_failed_is_unscored_not_zero():
    row = lambda turn: [math.nan] * 11 if shown(turn) == "x" else rating_row(turn)  # noqa: E731
    [judgement] = PointwiseCritic(judge_model=FunctionModel(row=row)).judge([ITEM])
    assert judgement.unscored == {2: NO_ANSWER}
    [low] = PointwiseCritic(judge_model=FunctionModel(row=lambda turn: [-50.0] * 11), min_option_mass=0.1).judge([ITEM])
    assert set(low.unscored.values()) == {OUTSIDE_OPTIONS}
    with pytest.raises(RewardError, match="read"):
        make_critic("pointwise", {"read": "tea leaves"}, judge_model=FunctionModel())


TRUE = {"There is a cat.", "It is black.", "It sits."}
STATED = Item(
    "q2",
    "Describe it.",
    ("picture",),
    ("There is a cat. It is black.", "There is a dog. It is red. It sits.", "There is a cat. It is red.", "!!"),
)


def claim_row(turn: str) -> list[float]:
    claim = re.search(r"from the answer: \[(.*?)\]", turn).group(1)
    p = 0.9 if claim in TRUE else 0.2
    return [math.log(p), math.log(1 - p)]


def test_a_response_loses_one_for_every_wrong_claim():
    judge_model = FunctionModel(row=claim_row)
    [judgement] = ClaimsCritic(judge_model=judge_model).judge([STATED])
    assert judgement.rewards == [0.0, -2.0, -1.0, None]
    assert judgement.unscored == {3: NO_CLAIMS}
    claims = judgement.evidence["claims"]["1"]
    assert [claim for claim, _ in claims] == ["There is a dog.", "It is red.", "It sits."]
    assert [p for _, p in claims] == pytest.approx([0.2, 0.2, 0.9])
    # Five different claims; "There is a cat." and "It is red." are made twice and asked once.
    assert len(judge_model.prompts[0].branches) == 5
    assert judge_model.prompts[0].images == ("picture",)


def test_shares_and_soft_scores_of_claims():
    share = ClaimsCritic(judge_model=FunctionModel(row=claim_row), score="share").judge([STATED])[0].rewards
    assert share[:3] == pytest.approx([0.0, -2 / 3, -1 / 2])
    soft = ClaimsCritic(judge_model=FunctionModel(row=claim_row), score="soft").judge([STATED])[0].rewards
    assert soft[:3] == pytest.approx([-0.2, -1.7, -0.9])


def test_claims_can_be_listed_and_checked_in_writing():
    def text(turn: str) -> str | None:
        if "Break the following answer" in turn:
            answer = re.search(r"Answer: \[(.*?)\]", turn).group(1)
            return None if answer == "!!" else "\n".join(f"- {claim}" for claim in sentences(answer))
        return "Yes, it is." if re.search(r"from the answer: \[(.*?)\]", turn).group(1) in TRUE else "No."

    judge_model = FunctionModel(text=text)
    [judgement] = ClaimsCritic(judge_model=judge_model, split="ask", read="text").judge([STATED])
    assert judgement.rewards == [0.0, -2.0, -1.0, None]
    assert judgement.unscored == {3: NO_ANSWER}
    assert judge_model.prompts[0].images == ()


def test_a_claim_that_could_not_be_checked_unscores_who_made_it():
    row = lambda turn: [math.nan] * 2 if "It is red." in turn else claim_row(turn)  # noqa: E731
    [judgement] = ClaimsCritic(judge_model=FunctionModel(row=row)).judge([STATED])
    assert judgement.rewards == [0.0, None, None, None]
    assert judgement.unscored == {1: NO_ANSWER, 2: NO_ANSWER, 3: NO_CLAIMS}


def test_a_number_at_the_start_of_a_claim_is_no_bullet():
    text = "1. A jug.\n2.5 litres are in it.\n-5 degrees outside.\n- **Red** lid.\n2) Two cups."
    assert sentences(text) == ["A jug.", "2.5 litres are in it.", "-5 degrees outside.", "**Red** lid.", "Two cups."]
    assert listed_claims("\n".join(sentences(text))) == sentences(text)


def test_a_text_full_of_points_is_cut_in_no_time():
    before = time.process_time()
    assert len(sentences("a. " * 10_000)) == 1
    assert time.process_time() - before < 1.0


@pytest.mark.parametrize(
    ("text", "correct"),
    [("The cat wears no collar, as the statement says.", None), ("I say: Yes", True), ("No cat is there.", False)],
)
def test_a_no_inside_a_sentence_is_no_verdict_on_a_claim(text, correct):
    critic = ClaimsCritic(judge_model=FunctionModel(text=lambda turn: text), read="text")
    [judgement] = critic.judge([replace(STATED, responses=("There is a cat.",))])
    assert judgement.rewards == [{None: None, True: 0.0, False: -1.0}[correct]]


def test_the_same_claims_in_another_order_have_the_same_reward():
    p_correct = {"A.": 0.1, "B cat.": 0.3, "C cat.": 0.7, "D cat.": 0.15}

    def row(turn: str) -> list[float]:
        p = p_correct[re.search(r"from the answer: \[(.*?)\]", turn).group(1)]
        return [math.log(p), math.log(1 - p)]

    item = replace(STATED, responses=("B cat. C cat. D cat.", "D cat. C cat. B cat.", "C cat. D cat. B cat."))
    assert len(set(ClaimsCritic(judge_model=FunctionModel(row=row), score="soft").judge([item])[0].rewards)) == 1


def test_no_item_with_claims_asks_nothing():
    [judgement] = ClaimsCritic(judge_model=FunctionModel(row=claim_row)).judge([replace(STATED, responses=("...",))])
    assert judgement.unscored == {0: NO_CLAIMS}


def test_faulty_claims_settings_are_all_named():
    with pytest.raises(RewardError, match=r"split.*score.*read"):
        make_critic("claims", {"split": "x", "score": "y", "read": "z"}, judge_model=FunctionModel())


def test_a_reward_models_numbers_are_taken_as_they_are():
    def scorer(dialogues: list[Dialogue]) -> list[float | None]:
        special = {"nan": math.nan, "none": None}
        return [special.get(d.response, good(d.response) / 2) for d in dialogues]

    item = replace(ITEM, responses=("ab", "nan", "none", "abcd", "ab"))
    one, other = ScalarCritic(scorer=scorer).judge([item, ITEM])
    assert one.rewards == [1.0, None, None, 2.0, 1.0]
    assert one.unscored == {1: NOT_FINITE, 2: NO_ANSWER}
    assert other.rewards == [1.0, 2.0, 0.0, 1.5, 1.0]
    assert ScalarCritic(scorer=scorer).judge([]) == []


class Fixed:
    """A critic with known rewards."""

    def __init__(self, rewards: list[float | None]) -> None:
        self.rewards = rewards

    def judge(self, items):
        unscored = {index: "lost" for index, reward in enumerate(self.rewards) if reward is None}
        return [Judgement(id=item.id, rewards=self.rewards, unscored=unscored) for item in items]


THREE = Item("q3", "?", (), ("a", "b", "c"))


def test_a_panel_averages_what_its_critics_say_on_one_scale():
    # z-scores of 0, 1, 2 and of 20, 10, 0 are opposite: equal weights cancel, unequal ones do not.
    critics = {"up": Fixed([0.0, 1.0, 2.0]), "down": Fixed([20.0, 10.0, 0.0])}
    [even] = PanelCritic(critics=critics).judge([THREE])
    assert even.rewards == pytest.approx([0.0, 0.0, 0.0])
    z = math.sqrt(1.5)
    [uneven] = PanelCritic(critics=critics, weights={"up": 3.0}).judge([THREE])
    assert uneven.rewards == pytest.approx([-z / 2, 0.0, z / 2])
    assert uneven.evidence["disagreement"] == pytest.approx({"0": z, "1": 0.0, "2": z})
    assert uneven.evidence["members"]["down"]["rewards"] == [20.0, 10.0, 0.0]


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [("rank", [-0.5, -0.5, 1.0]), ("range", [0.0, 0.0, 1.0]), ("none", [3.0, 3.0, 5.0])],
)
def test_other_ways_to_one_scale(normalise, expected):
    [judgement] = PanelCritic(critics={"only": Fixed([3.0, 3.0, 5.0])}, normalise=normalise).judge([THREE])
    assert judgement.rewards == pytest.approx(expected)


def test_rewards_that_do_not_differ_weigh_nothing():
    [judgement] = PanelCritic(critics={"flat": Fixed([7.0] * 3), "up": Fixed([0.0, 1.0, 2.0])}).judge([THREE])
    assert judgement.rewards == pytest.approx([-math.sqrt(1.5) / 2, 0.0, math.sqrt(1.5) / 2])


@pytest.mark.parametrize("normalise", sorted(NORMALISERS))
def test_a_response_that_one_critic_could_not_score_is_unscored(normalise):
    critics = {"full": Fixed([0.0, 1.0, 2.0]), "holed": Fixed([0.0, None, 2.0])}
    [judgement] = PanelCritic(critics=critics, normalise=normalise).judge([THREE])
    assert judgement.unscored == {1: "holed: lost"}
    assert judgement.rewards[0] < judgement.rewards[2]


def test_a_critic_with_nothing_to_say_leaves_it_to_the_others_unless_all_are_needed():
    critics = {"verifier": VerifierCritic(), "up": Fixed([0.0, 1.0, 2.0])}
    [judgement] = PanelCritic(critics=critics).judge([THREE])
    assert judgement.unscored == {}
    assert judgement.evidence["silent"] == ["verifier"]
    [strict] = PanelCritic(critics=critics, need_all=True).judge([THREE])
    assert strict.rewards == [None] * 3
    assert strict.unscored[0] == f"verifier: {NO_REFERENCE}"


def test_where_the_verifier_knows_nothing_the_panel_does_not_know_what_is_correct():
    critics = {"rule": VerifierCritic(), "up": Fixed([0.0, 1.0, 2.0])}
    [judgement] = PanelCritic(critics=critics).judge([THREE])
    assert judgement.evidence["correct"] == [None] * 3
    found = choose_pairs(
        judgement.rewards,
        THREE.responses,
        PairSettings(strategy="correct_incorrect"),
        correct=judgement.evidence["correct"],
    )
    assert (found.pairs, found.why_none) == ([], NO_CORRECTNESS)
    # Of two verifiers the one that knows is asked.
    critics = {"boxes": VerifierCritic(kind="boxes"), "rule": VerifierCritic()}
    [judgement] = PanelCritic(critics=critics).judge([replace(THREE, answer="b")])
    assert judgement.evidence["correct"] == [False, True, False]


def test_critics_that_cancel_out_leave_ties_and_no_rounding():
    up, down = [0.1, 0.2, 0.7, 0.4], [0.7, 0.6, 0.1, 0.4]
    four = replace(THREE, responses=("a", "b", "c", "d"))
    [judgement] = PanelCritic(critics={"up": Fixed(up), "down": Fixed(down)}).judge([four])
    assert len(set(judgement.rewards)) == 1
    [outer] = PanelCritic(critics={"inner": PanelCritic(critics={"up": Fixed(up), "down": Fixed(down)})}).judge([four])
    assert outer.rewards == [0.0] * 4


def test_a_panel_in_which_nobody_could_score_is_unscored():
    [judgement] = PanelCritic(critics={"holed": Fixed([None] * 3)}).judge([THREE])
    assert judgement.unscored == dict.fromkeys(range(3), "holed: lost")


def test_a_panel_keeps_the_verdicts_and_ratings_of_its_members():
    critics = {"random": RandomCritic(), "rating": PointwiseCritic(judge_model=FunctionModel(row=rating_row))}
    [judgement] = PanelCritic(critics=critics).judge([ITEM])
    assert judgement.ratings == pytest.approx([42.5, 82.5, 2.5, 62.5, 42.5])


def test_a_panels_evidence_survives_being_written_down_and_tells_what_is_correct():
    critics = {"rule": VerifierCritic(), "random": RandomCritic()}
    [judgement] = PanelCritic(critics=critics).judge([replace(THREE, answer="b")])
    assert json.loads(json.dumps(judgement.evidence)) == judgement.evidence
    assert judgement.evidence["correct"] == [False, True, False]


def test_a_panel_is_made_from_settings_and_each_member_asks_its_own_model():
    low, high = (FunctionModel(row=lambda turn, p=p: [math.log(p), math.log(1 - p)]) for p in (0.2, 0.9))
    settings = {
        "normalise": "none",
        "weights": {"rule": 2.0},
        "critics": {
            "rule": {"kind": "verifier"},
            "one": {"kind": "claims", "score": "soft"},
            "other": {"kind": "claims", "score": "soft"},
        },
    }
    assert uses_judge_model("panel", settings)
    assert not uses_judge_model("panel", {"critics": {"rule": {"kind": "verifier"}}})
    panel = make_critic("panel", settings, judge_model=low, judge_models={"other": high})
    [judgement] = panel.judge([Item("q", "?", (), ("3",), answer="3")])
    # (2 * 1 - 0.8 - 0.1) / 4
    assert judgement.rewards == pytest.approx([0.275])
    assert set(settings["critics"]) == {"rule", "one", "other"}


def test_a_panels_members_are_checked_when_it_is_made():
    with pytest.raises(RewardError, match=r"member rule: critic verifier has no setting 'knd'"):
        make_critic("panel", {"critics": {"rule": {"kind": "verifier", "knd": "number"}}})
    with pytest.raises(RewardError, match=r"member x: .*'kind'"):
        make_critic("panel", {"critics": {"x": {}}})
    with pytest.raises(RewardError, match="by name"):
        make_critic("panel", {"critics": ["verifier"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"down": 1.0}}, r"weight for 'down', which is not in the panel"),
        ({"weights": {"up": "3"}, "normalise": "log"}, r"weights\.up: .*valid number, found '3'; normalise: .*'log'"),
        ({"weights": {"up": 0.0}}, "greater than 0"),
        ({"weights": {"up": math.inf}}, "finite"),
        ({"critics": {}}, "needs its critics by name"),
    ],
)
def test_faulty_panels_are_refused(settings, message):
    with pytest.raises(RewardError, match=message):
        make_critic("panel", {"critics": {"up": {"kind": "random"}}} | settings)


def test_the_length_critic_rewards_length_alone():
    # Lengths 2, 4, 1, 3 and a twin of the first: wins minus losses of four distinct ones, in both orders.
    [judgement] = LengthCritic().judge([ITEM])
    assert judgement.rewards == [-2.0, 6.0, -6.0, 2.0, -2.0]
    assert judgement.verdicts == []


def test_responses_of_one_length_are_tied_and_a_lone_one_is_unscored():
    equal, lone = LengthCritic().judge([Item("q", "?", (), ("one", "two ")), Item("q", "?", (), ("one", "one"))])
    assert equal.rewards == [0.0, 0.0]
    assert lone.rewards == [None, None]
    assert set(lone.unscored) == {0, 1}


def test_the_length_critic_needs_nothing():
    assert needs("length") is None
    assert isinstance(make_critic("length"), LengthCritic)
    with pytest.raises(RewardError, match="no setting"):
        make_critic("length", {"unit": "words"})


def test_finished_scores_of_other_responses_are_none_of_these(tmp_path):
    path = tmp_path / "scores.jsonl"
    lines = [
        {"id": "same", "rewards": [1, 0], "judged": "abc"},
        {"id": "edited", "rewards": [1, 0], "judged": "old"},
        {"id": "by hand", "rewards": [1, 0]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = [Item(line["id"], "What?", (), ("a", "b"), key="abc") for line in lines]
    for critic in (
        make_critic("scores", {"file": str(path)}),
        make_critic("panel", {"critics": {"one": {"kind": "scores", "file": str(path)}, "two": {"kind": "length"}}}),
    ):
        found = {judgement.id: judgement.rewards[0] for judgement in critic.judge(items)}
        assert found["same"] is not None
        assert found["by hand"] is not None
    judged = make_critic("scores", {"file": str(path)}).judge(items)[1]
    assert set(judged.unscored.values()) == {"the scores file is about other responses to the question"}

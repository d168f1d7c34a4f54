"""What the demo's critic is taught with: every pair in both orders, and a loss that minds the order."""

import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from align.demo.data import CRITIC_PROMPT
from align.demo.questions import Task, is_exact
from reward.prompt import load_prompt

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from demo_build.comparisons import Comparisons, Mix, Said, said_elsewhere, with_slips
from demo_build.critic import verdict_loss
from demo_build.faults import faults, merit
from demo_build.model import hidden_states, image_features, make_config
from demo_build.rows import RowMaker, Rows
from demo_build.words import build_tokenizer

pytest.importorskip("sklearn")

TASK = Task("list", 0, (3, 7))
RIGHT, WRONG, AS_WRONG = "The digits are 3 and 7.", "The digits are 3, 7 and 1.", "The digits are 3, 7 and 9."
WORSE = "The digits are 3, 7, 1 and 9."
BY_MERIT = Mix(("list",), 0.0, 1.0, by_merit=True)


@pytest.fixture(scope="module")
def maker() -> RowMaker:
    return RowMaker(build_tokenizer(CRITIC_PROMPT))


def rows_of(maker: RowMaker, mix: Mix, *said: str, batch_size: int = 4) -> Rows:
    pixels = np.zeros((112, 112), dtype=np.uint8)
    bank = [Said(pixels, TASK.digits, TASK, said)] if said else []
    prompt = load_prompt(CRITIC_PROMPT, "pairwise")
    return next(iter(Comparisons(maker, prompt, batch_size, 0, mix=mix, bank=bank)))


def verdicts_of(maker: RowMaker, rows: Rows) -> list[tuple[str, str, float]]:
    """(first, second, how sure to be of the first) of every comparison, in the order of the rows."""
    found = []
    for b, at in (~rows.p_first.isnan()).nonzero().tolist():
        text = maker.tokenizer.decode(rows.ids[b, rows.branch[b] == rows.branch[b, at]])
        first, second = (text.split(f"{place}: [")[1].split("]")[0] for place in ("First", "Second"))
        found.append((first, second, rows.p_first[b, at].item()))
    return found


@pytest.mark.parametrize("mix", [Mix(("count", "largest"), 0.5, 0.0), BY_MERIT])
def test_every_pair_is_taught_in_both_orders_and_as_surely(maker, mix):
    verdicts = verdicts_of(maker, rows_of(maker, mix, RIGHT, WRONG, AS_WRONG))
    assert len(verdicts) > 20
    for (first, second, forth), (other_first, other_second, back) in zip(verdicts[0::2], verdicts[1::2], strict=True):
        assert (first, second) == (other_second, other_first)
        assert forth == pytest.approx(1 - back)


def test_a_critic_ought_to_be_as_sure_as_two_responses_are_apart(maker):
    rows = rows_of(maker, BY_MERIT, RIGHT, WRONG, AS_WRONG, WORSE, batch_size=12)
    by_pair = {(first, second): p_first for first, second, p_first in verdicts_of(maker, rows)}
    assert by_pair[WRONG, AS_WRONG] == by_pair[AS_WRONG, WRONG] == 0.5
    assert 0.5 < by_pair[WRONG, WORSE] < by_pair[RIGHT, WRONG] < by_pair[RIGHT, WORSE] < 1


def test_it_is_taught_which_words_are_right_and_behind_each_response_how_good_it_is(maker):
    rows = rows_of(maker, BY_MERIT, RIGHT, WRONG, batch_size=1)
    found = []
    for b, at in (~rows.known.isnan()).nonzero().tolist():
        here = rows.ids[b, : at + 1][rows.branch[b, : at + 1] == rows.branch[b, at]]
        found.append((maker.tokenizer.decode(here).rsplit("[", 1)[1], round(rows.known[b, at].item(), 2)))
    one = [("The digits are 3", 1.0), ("The digits are 3 and 7", 1.0), (f"{RIGHT}]", 1.0)]
    other = [("The digits are 3", 1.0), ("The digits are 3, 7", 1.0), ("The digits are 3, 7 and 1", 0.0)]
    other += [(f"{WRONG}]", 0.3)]
    assert found[:14] == one + other + other + one


@pytest.mark.parametrize(
    ("task", "by_merit"),
    [
        (TASK, ["The digits are 3 and 7.", "The digit is 3.", "The digits are 7 and 3.", "The digits are 3, 7 and 9."]),
        (Task("describe", 1, (3, 7)), ["I see two digits: 3 and 7.", "I see three digits: 3 and 7.", "I see 3, 7, 1."]),
        (Task("count", 0, (3, 7)), ["There are two digits.", "There are three digits.", "There are four digits.", "3"]),
        (Task("has", 0, (3, 7), asked=4), ["No, there is no 4.", "Yes, there is a 4."]),
        (Task("has", 0, (3, 7), asked=3), ["Yes, there is a 3.", "No, there is no 3."]),
        (Task("largest", 1, (3, 7)), ["It is 7.", "It is 3.", "It is 9."]),
    ],
)
def test_merit_falls_with_every_fault(task, by_merit):
    merits = [merit(task, response) for response in by_merit]
    assert merits[0] > 0 > merits[1]
    assert merits == sorted(merits, reverse=True)
    assert len(set(merits)) == len(merits) - (task is TASK)  # two exchanged weigh as much as one invented
    assert all(faults(task, response).cost == 0 for response in by_merit[:1])


def test_the_digit_that_is_said_to_be_the_largest_is_right_or_wrong():
    task = Task("largest", 0, (3, 7))
    marks = [faults(task, f"The largest digit is {said}.").marks for said in (7, 3, 9)]
    assert marks == [((4, True),), ((4, False),), ((4, False),)]


def test_slips_lead_to_sentences_that_somebody_could_say():
    rng = random.Random(0)
    tasks = [Task("list", 0, (3,)), Task("list", 1, (3, 7, 7, 1)), Task("describe", 0, (3, 7))]
    said = [(task, with_slips(task, rng)) for task in tasks for _ in range(60)]
    assert all(faults(task, text).marks for task, text in said)
    assert len({faults(task, text).cost for task, text in said}) > 4


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (TASK, (RIGHT, WRONG, AS_WRONG)),
        (Task("describe", 1, (3, 7)), ("I see two digits: 3 and 7.", "I see three digits: 3, 7 and 1.")),
        (Task("count", 0, (3, 7)), ("There are two digits.", "There are three digits.")),
        (Task("largest", 1, (3, 7)), ("It is 7.", "It is 1.")),
        (Task("has", 0, (3, 7), asked=4), ("Yes, there is a 4.", "No, there is no 4.")),
    ],
)
def test_under_another_picture_each_response_is_right_sometimes(task, said):
    rng = random.Random(0)
    found = [
        said_elsewhere(Said(np.zeros((112, 112), dtype=np.uint8), task.digits, task, said), rng) for _ in range(12)
    ]
    right = [[text for text in line.responses if is_exact(line.task, text)] for line in found]
    assert all(len(texts) == 1 for texts in right)
    assert {texts[0] for texts in right} == set(said)
    assert all(line.pixels.any() and line.digits == line.task.digits for line in found)


def test_a_digit_that_is_wrongly_said_to_be_the_largest_is_often_in_the_picture():
    task, rng = Task("largest", 1, (3, 7)), random.Random(0)
    said = Said(np.zeros((112, 112), dtype=np.uint8), task.digits, task, ("It is 7.", "It is 3."))
    found = [said_elsewhere(said, rng).digits for _ in range(40)]
    assert 5 < sum(3 in digits for digits in found if max(digits) == 7 and len(digits) > 1) < 20
    slips = [with_slips(task, rng) for _ in range(40)]
    assert slips.count("It is 3.") > 8
    assert len(set(slips)) > 3


def test_a_response_that_no_picture_makes_right_stays_where_it_was_said():
    said = Said(np.zeros((112, 112), dtype=np.uint8), TASK.digits, TASK, ("The digits are 3, 7, 1, 4 and 9.",))
    assert said_elsewhere(said, random.Random(0)) is said


def test_a_hard_mix_leaves_out_pairs_that_nobody_could_judge(maker):
    verdicts = verdicts_of(maker, rows_of(maker, Mix(("count",), 0.0, 1.0), WRONG, AS_WRONG))
    assert not [verdict for verdict in verdicts if set(verdict[:2]) == {WRONG, AS_WRONG}]
    assert {p_first for *_, p_first in verdicts} == {0.0, 1.0}


def test_the_loss_of_two_orders_that_agree_is_their_cross_entropy_and_a_place_that_is_preferred_costs():
    p_first = torch.tensor([0.8, 0.2])
    agree = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
    entropy = float(-(agree[0] * agree[0].log()).sum())
    assert verdict_loss(agree.log(), p_first, both_orders=5.0).tolist() == pytest.approx([entropy] * 2)
    prefers_first = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    plain, with_order = (verdict_loss(prefers_first, p_first, both_orders=weight) for weight in (0.0, 1.0))
    apart = 2 * math.log(0.6 / 0.4)
    assert (with_order - plain).tolist() == pytest.approx([apart**2 / 2] * 2)


def test_branches_behind_shared_keys_read_as_the_packed_row_does(maker):
    from align.models.valley_eagle.modeling import ValleyQwen2ForCausalLM

    torch.manual_seed(0)
    model = ValleyQwen2ForCausalLM(make_config(maker.tokenizer)).eval()
    pixels = np.random.default_rng(0).integers(0, 255, (2, 112, 112), dtype=np.uint8)
    words = random.Random(0).sample(["How many digits are there?", "List the digits from left to right."], 2)
    branches = [[maker.branch([word], TASK.answer) for word in words], [maker.branch([words[0]], TASK.answer)]]
    rows = maker.rows(pixels, branches)
    own = rows.branch[:, :, None] == rows.branch[:, None, :]
    causal = torch.ones(rows.ids.shape[1], rows.ids.shape[1], dtype=torch.bool).tril()
    visible = ((own | (rows.branch[:, None, :] == 0)) & causal)[:, None]
    with torch.no_grad():
        packed = model.model(
            input_ids=rows.ids,
            position_ids=rows.positions,
            attention_mask=visible,
            image_features=image_features(model, pixels).flatten(0, 1),
            use_cache=False,
        ).last_hidden_state
        found = hidden_states(model, rows)
    real = rows.branch >= 0
    assert torch.allclose(found[real], packed[real], atol=1e-4)

"""What the demo's critic is taught with: every pair in both orders, and a loss that minds the order."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from align.demo.data import CRITIC_PROMPT
from align.demo.questions import Task
from reward.prompt import load_prompt

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from demo_build.comparisons import Comparisons, Mix, Said
from demo_build.critic import verdict_loss
from demo_build.model import hidden_states, image_features, make_config
from demo_build.rows import RowMaker, Rows
from demo_build.words import build_tokenizer

pytest.importorskip("sklearn")

TASK = Task("list", 0, (3, 7))
RIGHT, WRONG, AS_WRONG = "The digits are 3 and 7.", "The digits are 3, 7 and 1.", "The digits are 3, 7 and 9."


@pytest.fixture(scope="module")
def maker() -> RowMaker:
    return RowMaker(build_tokenizer(CRITIC_PROMPT))


def rows_of(maker: RowMaker, mix: Mix, *said: str, batch_size: int = 4) -> Rows:
    pixels = np.zeros((112, 112), dtype=np.uint8)
    bank = [Said(pixels, TASK.digits, TASK, said)] if said else []
    prompt = load_prompt(CRITIC_PROMPT, "pairwise")
    return next(iter(Comparisons(maker, prompt, batch_size, 0, mix=mix, bank=bank)))


def verdicts_of(maker: RowMaker, rows: Rows) -> list[tuple[str, str, float]]:
    """(first, second, p_first) of every comparison, in the order of the rows."""
    found = []
    for b, at in (~rows.p_first.isnan()).nonzero().tolist():
        text = maker.tokenizer.decode(rows.ids[b, rows.branch[b] == rows.branch[b, at]])
        first, second = (text.split(f"{place}: [")[1].split("]")[0] for place in ("First", "Second"))
        found.append((first, second, float(rows.p_first[b, at])))
    return found


@pytest.mark.parametrize("mix", [Mix(("count", "largest"), 0.5, 0.0), Mix(("list",), 0.0, 1.0, sharpness=10.0)])
def test_every_pair_is_taught_in_both_orders_and_as_surely(maker, mix):
    verdicts = verdicts_of(maker, rows_of(maker, mix, RIGHT, WRONG, AS_WRONG))
    assert len(verdicts) > 20
    for (first, second, p_first), (other_first, other_second, other_p) in zip(
        verdicts[0::2], verdicts[1::2], strict=True
    ):
        assert (first, second) == (other_second, other_first)
        assert p_first == pytest.approx(1 - other_p)


def test_of_two_equally_wrong_responses_neither_is_better(maker):
    verdicts = verdicts_of(maker, rows_of(maker, Mix(("list",), 0.0, 1.0, sharpness=10.0), RIGHT, WRONG, AS_WRONG))
    by_pair = {(first, second): p_first for first, second, p_first in verdicts}
    assert by_pair[WRONG, AS_WRONG] == by_pair[AS_WRONG, WRONG] == 0.5
    assert by_pair[RIGHT, WRONG] > 0.95


def test_a_hard_mix_leaves_out_pairs_that_nobody_could_judge(maker):
    verdicts = verdicts_of(maker, rows_of(maker, Mix(("count",), 0.0, 1.0), WRONG, AS_WRONG))
    assert not [verdict for verdict in verdicts if set(verdict[:2]) == {WRONG, AS_WRONG}]
    assert {p_first for *_, p_first in verdicts} == {0.0, 1.0}


def test_the_loss_of_two_orders_that_agree_is_their_cross_entropy_and_a_place_that_is_preferred_costs():
    p = torch.tensor([0.9, 0.1])
    agrees = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert verdict_loss(agrees, p, both_orders=5.0).tolist() == pytest.approx([entropy] * 2)
    prefers_first = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
    plain, with_order = (verdict_loss(prefers_first, p, both_orders=weight) for weight in (0.0, 1.0))
    assert (with_order - plain).tolist() == pytest.approx([1.6**2] * 2)


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

"""The critic's figures and their intervals from lines made by hand; and what counts as the same critic."""

import pytest

from align.errors import UserError
from align.records import Question, Response, Samples
from align.stages.critic_metrics import critic_figures
from align.stages.score import run_score
from reward.judgement import Judgement, Verdict
from tests.critic_runs import config_of, save_blind, write_round


def line(name: str, verdicts: list[tuple[int, int, int]]) -> tuple[Samples, Judgement]:
    responses = [Response(text=f"{name} {n}", num_tokens=n + 1) for n in range(3)]
    records = [Verdict(first=i, second=j, p_first=1.0, p_second=0.0, winner=w) for i, j, w in verdicts]
    samples = Samples(id=name, question=Question(id=name, question="?"), responses=responses, seed=0)
    return samples, Judgement(id=name, rewards=[0.0, 0.0, 0.0], verdicts=records)


def test_an_interval_weighs_questions_as_the_figure_does():
    # Question a: one pair in both orders, the same verdict; four more verdicts lack their other order. Question b: two
    # pairs, each the first place twice. Consistency is 1 of 3 pairs, and the interval's ends are b alone and a alone.
    a = line("a", [(0, 1, 0), (1, 0, 0), (0, 2, 0), (1, 2, 1)])
    b = line("b", [(0, 1, 0), (1, 0, 1), (0, 2, 0), (2, 0, 2)])
    figures = critic_figures([a[0], b[0]], [a[1], b[1]], [])
    assert figures["consistency"].value == pytest.approx(1 / 3, abs=1e-4)
    assert (figures["consistency"].count, figures["consistency"].questions) == (3, 2)
    # Of 40 questions like a and 40 like b the interval lies around the figure.
    many = [line(f"{n}", [(v.first, v.second, v.winner) for v in (a, b)[n % 2][1].verdicts]) for n in range(80)]
    figures = critic_figures([s for s, _ in many], [s for _, s in many], [])
    found = figures["consistency"]
    assert found.value == pytest.approx(1 / 3, abs=1e-4)
    assert (found.low + found.high) / 2 == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize("where", ["options", "member"])
def test_a_prompt_that_changed_is_another_critic_wherever_it_is_named(tmp_path, where):
    write_round(tmp_path)
    save_blind(tmp_path / "critic")
    prompt = tmp_path / "mine.md"
    prompt.write_text("Break it into facts.\nQuestion: {question}\nAnswer: {response}\n")
    claims = {"split": "ask", "split_prompt": str(prompt), "max_new_tokens": 4}
    options = claims if where == "options" else {"critics": {"facts": {"kind": "claims"} | claims}}
    kind = "claims" if where == "options" else "panel"
    config = config_of(tmp_path, critic={"kind": kind, "model": "./critic", "options": options, "reliability_sample": 0})  # fmt: skip
    with pytest.raises(UserError, match="could score none"):  # this one writes nothing
        run_score(config, 1)
    prompt.write_text("List the facts.\nQuestion: {question}\nAnswer: {response}\n")
    with pytest.raises(UserError, match=r"split_prompt.* was .* and is now"):
        run_score(config, 1)

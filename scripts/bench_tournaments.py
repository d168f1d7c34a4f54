"""What Swiss and knock-out tournaments save against all ordered pairs, and what they lose, on the demo's critic.

    python scripts/bench_tournaments.py [--questions 300] [--responses 5 8 16] [--repeats 3]

The demo's policy gives up to K different answers to fresh digit pictures; its critic compares them by each pairing, in
turn, in this process. A question's best and worst answer become a pair, as in a run. Every question has one right text,
so a pair that sets a right answer against a wrong one is either the right way round or not. Printed: judgements (one
order of one pair) a question, seconds with their spread, how many pairs are decided by the reference answer, how many
of those choose the right one (with the 95 % interval over questions),
and how often the pair is the one that all pairs gave.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from align.config import ModelSettings
from align.demo.data import CRITIC, CRITIC_PROMPT, POLICY, demo_settings, make_questions
from align.engines.base import SampleRequest, SamplingSettings
from align.engines.open import open_engine
from align.media.images import ImageStore
from align.records import Question
from reward.critics.pairwise import PairwiseCritic
from reward.critics.tournament import PAIRINGS
from reward.critics.verifier import VerifierCritic
from reward.intervals import wilson
from reward.judgement import Item, Judgement
from reward.pairs import choose_pairs

SEED = 12345
# Hotter than the demo samples, so that most questions have as many different answers as are asked for.
SETTINGS = SamplingSettings(temperature=1.5, max_new_tokens=24)
DRAWS = 4
# As the demo judges.
OPTIONS = demo_settings(0)["critic"].get("options", {})
MODEL = ModelSettings(dtype="float32", device="cpu")


@dataclass
class Outcome:
    """Of one pairing: seconds a repeat, judgements, and the pair of every question (None: tied or alike)."""

    seconds: list[float] = field(default_factory=list)
    judgements: int = 0
    pairs: list[tuple[int, int] | None] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--responses", type=int, nargs="+", default=[5, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        questions = list(make_questions(Path(folder), "eval", options.questions, seed=SEED))
        images = ImageStore(Path(folder))
        critic = open_engine(str(CRITIC), MODEL, open_image=images.open)
        print(
            "| K | answers | pairing | judgements/question | seconds | vs all | decided pairs | right | same pair as"
            " all |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for number in options.responses:
            items = sampled(questions, images, number)
            outcomes = compare(items, critic, options.repeats)
            right = [judged.rewards for judged in VerifierCritic().judge(items)]
            for pairing in PAIRINGS:
                print(row(number, pairing, outcomes, items, right), flush=True)


def sampled(questions: list[Question], images: ImageStore, number: int) -> list[Item]:
    """The questions with up to `number` different responses of the demo's policy each:
    a critic is asked of those only."""
    policy = open_engine(str(POLICY), MODEL, open_image=images.open)
    requests = [
        SampleRequest(q.id, q.messages(), tuple(q.images), num_samples=DRAWS * number, seed=place)
        for place, q in enumerate(questions)
    ]
    texts: dict[str, tuple[str, ...]] = {}
    policy.sample(requests, SETTINGS, lambda result: texts.update({result.id: result.texts}))
    distinct = {name: tuple(dict.fromkeys(found))[:number] for name, found in texts.items()}
    return [Item(q.id, q.as_text(), tuple(q.images), distinct[q.id], q.answer, q.answer_kind) for q in questions]


def compare(items: list[Item], judge_model: object, repeats: int) -> dict[str, Outcome]:
    """Every pairing in turn, `repeats` times after one round that is not counted."""
    outcomes = {pairing: Outcome() for pairing in PAIRINGS}
    for repeat in range(repeats + 1):
        for pairing, outcome in outcomes.items():
            critic = PairwiseCritic(judge_model=judge_model, prompt=CRITIC_PROMPT, pairing=pairing, **OPTIONS)  # type: ignore[arg-type]
            started = time.perf_counter()
            judgements = critic.judge(items)
            if repeat:
                outcome.seconds.append(time.perf_counter() - started)
            outcome.judgements = sum(judged.evidence["num_comparisons"] for judged in judgements)
            outcome.pairs = [best_worst(item, judged) for item, judged in zip(items, judgements, strict=True)]
    return outcomes


def best_worst(item: Item, judged: Judgement) -> tuple[int, int] | None:
    chosen = choose_pairs(judged.rewards, item.responses).pairs
    return (chosen[0].chosen, chosen[0].rejected) if chosen else None


def row(
    number: int, pairing: str, outcomes: dict[str, Outcome], items: list[Item], right: list[list[float | None]]
) -> str:
    mine, whole = outcomes[pairing], outcomes["all"]
    signs = [
        (rewards[pair[0]] or 0) - (rewards[pair[1]] or 0)
        for pair, rewards in zip(mine.pairs, right, strict=True)
        if pair is not None
    ]
    decided = [sign for sign in signs if sign]
    interval = wilson(sum(sign > 0 for sign in decided), len(decided))
    both = [(one, other) for one, other in zip(mine.pairs, whole.pairs, strict=True) if one and other]
    same = sum(one == other for one, other in both) / len(both)
    median = statistics.median(mine.seconds)
    answers = statistics.mean(len(item.responses) for item in items)
    ratio = statistics.median(other / one for one, other in zip(mine.seconds, whole.seconds, strict=True))
    return (
        f"| {number} | {answers:.1f} | {pairing} | {mine.judgements / len(right):.1f} | {median:.1f} "
        f"({min(mine.seconds):.1f}-{max(mine.seconds):.1f}) | {ratio:.2f}x | {len(decided)} of {len(signs)} | "
        f"{interval.mean:.3f} ({interval.low:.3f}-{interval.high:.3f}) | {same:.2f} |"
    )


if __name__ == "__main__":
    main()

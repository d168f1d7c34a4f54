"""Stage four: a model that says which of two responses is better,
taught through the very prompt that `align score` uses.

It starts from the good reader and goes on reading beside comparing. A causal model reads one response after the other,
so nothing in its make says that places must not matter; what says it is the loss (`verdict_loss`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from align.demo.data import CRITIC_OPTIONS
from demo_build.comparisons import Comparisons, Mix, Said
from demo_build.instruct import Course, Log, optimizer_for
from demo_build.model import hidden_states
from demo_build.rows import TURN, Branch, RowMaker, Rows
from reward.critics import Item
from reward.critics.pairwise import PairwiseCritic
from reward.critics.verifier import VerifierCritic
from reward.judge_model import BranchedPrompt
from reward.prompt import Prompt, load_prompt
from reward.reliability import measure

#: What a token of a right response weighs in the loss beside a verdict. Reading inside the very prompt matters: a model
#: that expects the right words there is surprised by wrong ones, and comparing is then a small step.
READING_WEIGHT = 0.2
SHOWN = {
    "agreement_with_reference": "right",
    "consistency": "consistent",
    "tie_rate": "ties",
    "position_bias": "bias",
    "length_correlation_given_reference": "length",
}


@dataclass(frozen=True)
class Aims:
    """What a critic is taught beside verdicts and reading.

    `both_orders` weighs that a verdict must not depend on the order (`verdict_loss`), `known` that the critic must know
    of each response by itself, one layer before the verdict, which of its words are right and how good it is. `noise`
    blurs its sight (`hidden_states`), so that it learns to be of one mind about digits that are hard to read.
    """

    both_orders: float = 0.0
    known: float = 0.0
    noise: float = 0.0


VERDICTS_ONLY = Aims()


def verdict_loss(log_probs: torch.Tensor, p_first: torch.Tensor, both_orders: float) -> torch.Tensor:
    """`(n,)` losses of verdicts that come in couples, the same pair of responses in one order and in the other.

    `log_probs (n, 2)` of "first" and "second", `p_first (n,)` what the former ought to be: cross-entropy. On top
    `both_orders` times how far a couple's log-odds for the same response are apart (squared up to 1, then linear).

    >>> log_probs = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    >>> verdict_loss(log_probs, torch.tensor([1.0, 0.0]), 1.0)
    tensor([0.1054, 0.1054])
    """
    wanted = torch.stack([p_first, 1 - p_first], 1)
    odds = log_probs[:, 0] - log_probs[:, 1]
    apart = nn.functional.smooth_l1_loss(odds[0::2], -odds[1::2], reduction="none").repeat_interleave(2)
    return -(wanted * log_probs).sum(1) + both_orders * apart


def loss_of_comparisons(
    model: Any, knows: nn.Module, maker: RowMaker, prompt: Prompt, rows: Rows, *, aims: Aims, look: bool
) -> torch.Tensor:
    """Mean loss of verdicts and of reading, the latter at `READING_WEIGHT` (its "Yes" and "No" at 1).

    `knows` reads from the states before the last layer what should be known there (`Rows.known`).
    """
    halfway: list[torch.Tensor] = []
    hidden = hidden_states(model, rows, look=look, noise=aims.noise, halfway=halfway)[:, :-1]
    target, p_first = rows.labels[:, 1:], rows.p_first[:, 1:]
    is_verdict = ~p_first.isnan()
    is_read = (target >= 0) & ~is_verdict
    options = [maker.encode(prompt.options[name])[0] for name in ("first", "second")]
    log_probs = model.lm_head(hidden[is_verdict]).float().log_softmax(-1)[:, options]
    verdicts = verdict_loss(log_probs, p_first[is_verdict], aims.both_orders)
    words = target[is_read]
    read = nn.functional.cross_entropy(model.lm_head(hidden[is_read]).float(), words, reduction="none")
    carries_all = torch.isin(words, torch.tensor([maker.encode(word)[0] for word in ("Yes", "No")]))
    weights = torch.where(carries_all, 1.0, READING_WEIGHT)
    loss = (verdicts.sum() + (read * weights).sum()) / (len(verdicts) + weights.sum())
    if aims.known:
        here = ~rows.known.isnan()
        logits = knows(halfway[0][here])[:, 0]
        loss = loss + aims.known * nn.functional.binary_cross_entropy_with_logits(logits, rows.known[here])
    return loss


class TrainedJudge:
    """A model in training as `align score` would ask it; an item's image is its pixels."""

    def __init__(self, model: Any, maker: RowMaker) -> None:
        self.model, self.maker = model, maker

    @torch.no_grad()
    def log_probs(self, prompts: Sequence[BranchedPrompt]) -> list[np.ndarray]:
        """Per prompt `(num_branches, num_options)`."""
        self.model.eval()
        found = [array for at in range(0, len(prompts), 25) for array in self._batch(prompts[at : at + 25])]
        self.model.train()
        return found

    def _batch(self, prompts: Sequence[BranchedPrompt]) -> list[np.ndarray]:
        branches = []
        for prompt in prompts:
            pieces = [(prompt.head, *branch, prompt.tail, TURN) for branch in prompt.branches]
            ids = [tuple(token for piece in texts for token in self.maker.encode(piece)) for texts in pieces]
            branches.append([Branch(tokens, (False,) * len(tokens)) for tokens in ids])
        rows = self.maker.rows(np.stack([prompt.images[0] for prompt in prompts]), branches)
        hidden, found = hidden_states(self.model, rows), []
        for at, (prompt, row) in enumerate(zip(prompts, branches, strict=True)):
            last = len(self.maker.shared) + np.cumsum([len(branch.ids) for branch in row]) - 1
            options = [self.maker.encode(option)[0] for option in prompt.options]
            logits = self.model.lm_head(hidden[at, torch.from_numpy(last)]).float()
            found.append(logits.log_softmax(-1)[:, options].numpy())
        return found

    def generate(self, prompts: Sequence[BranchedPrompt], *, max_new_tokens: int) -> list[list[str | None]]:
        """Not asked of the demo's critic, which decides by probabilities."""
        raise NotImplementedError


def figures(model: Any, maker: RowMaker, prompt: Path, said: Sequence[Said]) -> str:
    """What `align score` would say of this critic over all pairs, and by task how often it is right and consistent."""
    items = [
        Item(str(at), one.task.question, (one.pixels,), one.responses, one.task.answer, "exact")
        for at, one in enumerate(said)
    ]
    critic = PairwiseCritic(judge_model=TrainedJudge(model, maker), prompt=str(prompt), **CRITIC_OPTIONS)
    judgements = critic.judge(items)
    reference = {judgement.id: judgement for judgement in VerifierCritic().judge(items)}
    lengths = {item.id: [len(maker.encode(text)) for text in item.responses] for item in items}
    found = measure(judgements, lengths=lengths, reference=reference)
    shown = [f"{word} {found[name].value:.3f}" for name, word in SHOWN.items() if name in found]
    for kind in sorted({one.task.kind for one in said}):
        here = [judgement for judgement, one in zip(judgements, said, strict=True) if one.task.kind == kind]
        of_task = measure(here, reference=reference)
        words = [
            f"{of_task[name].value:.2f}" if name in of_task else "-"
            for name in ("agreement_with_reference", "consistency")
        ]
        shown.append(f"{kind} {'/'.join(words)}")
    return " ".join(shown)


def teach_critic(
    model: Any,
    maker: RowMaker,
    prompt_path: Path,
    course: Course,
    log: Log,
    *,
    mix: Mix,
    bank: Sequence[Said],
    held_out: Sequence[Said],
    aims: Aims = VERDICTS_ONLY,
    after: Any = lambda step: None,
    every: int = 100,
) -> None:
    """Train in place, with a look at held-out pairs every `every` steps."""
    prompt = load_prompt(prompt_path, "pairwise")
    knows = nn.Linear(model.config.hidden_size, 1)
    optimizer, schedule = optimizer_for(nn.ModuleList([model, knows]), course)
    lessons = Comparisons(maker, prompt, course.batch_size, course.seed, mix=mix, bank=bank)
    stream = iter(DataLoader(lessons, batch_size=None, num_workers=1, collate_fn=_same))
    model.train()
    for step in range(1, course.num_steps + 1):
        look = course.tower_rate > 0
        loss = loss_of_comparisons(model, knows, maker, prompt, next(stream), aims=aims, look=look)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == course.num_steps:
            log(f"step {step} loss {loss.item():.4f} {figures(model, maker, prompt_path, held_out)}")
            after(step)


def _same(batch: Any) -> Any:
    return batch

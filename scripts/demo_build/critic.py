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
from demo_build.comparisons import OPTIONS, Comparisons, Mix, Said
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

    `both_orders` weighs that a verdict must not depend on the order (`verdict_loss`), `right` that the critic must know
    of each response by itself, one layer before the verdict, whether it is right. `noise` blurs its sight
    (`hidden_states`), so that it learns to be of one mind about digits that are hard to read.
    """

    both_orders: float = 0.0
    right: float = 0.0
    noise: float = 0.0


VERDICTS_ONLY = Aims()


def verdict_loss(log_probs: torch.Tensor, wanted: torch.Tensor, both_orders: float) -> torch.Tensor:
    """`(n,)` losses of verdicts that come in couples, the same pair of responses in one order and in the other.

    `log_probs (n, 3)` of "first", "second" and neither, `wanted (n, 3)` what they ought to be: cross-entropy. On top
    `both_orders` times the squared distance of what a couple says of its two responses and of neither. `(n, 2)` each
    where neither is not offered.

    >>> probs = torch.tensor([[0.9, 0.0999, 0.0001], [0.0999, 0.9, 0.0001]])
    >>> loss = verdict_loss(probs.log(), torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), 1.0)
    >>> [round(value, 3) for value in loss.tolist()]
    [0.105, 0.105]
    """
    found = log_probs.exp()
    exchanged = [1, 0, 2][: found.shape[1]]
    apart = (found[0::2] - found[1::2, exchanged]).square().sum(1).repeat_interleave(2)
    return -(wanted * log_probs).sum(1) + both_orders * apart


def loss_of_comparisons(
    model: Any, knows_right: nn.Module, maker: RowMaker, prompt: Prompt, rows: Rows, *, aims: Aims, look: bool
) -> torch.Tensor:
    """Mean loss of verdicts and of reading, the latter at `READING_WEIGHT` (its "Yes" and "No" at 1).

    `knows_right` reads from the states before the last layer whether a response is right.
    """
    halfway: list[torch.Tensor] = []
    hidden = hidden_states(model, rows, look=look, noise=aims.noise, halfway=halfway)[:, :-1]
    target, wanted = rows.labels[:, 1:], rows.verdict[:, 1:]
    is_verdict = ~wanted[..., 0].isnan()
    is_read = (target >= 0) & ~is_verdict
    options = [maker.encode(prompt.options[name])[0] for name in OPTIONS if name in prompt.options]
    log_probs = model.lm_head(hidden[is_verdict]).float().log_softmax(-1)[:, options]
    verdicts = verdict_loss(log_probs, wanted[is_verdict][:, : len(options)], aims.both_orders)
    words = target[is_read]
    read = nn.functional.cross_entropy(model.lm_head(hidden[is_read]).float(), words, reduction="none")
    carries_all = torch.isin(words, torch.tensor([maker.encode(word)[0] for word in ("Yes", "No")]))
    weights = torch.where(carries_all, 1.0, READING_WEIGHT)
    loss = (verdicts.sum() + (read * weights).sum()) / (len(verdicts) + weights.sum())
    if aims.right:
        said = ~rows.right.isnan()
        logits = knows_right(halfway[0][said])[:, 0]
        loss = loss + aims.right * nn.functional.binary_cross_entropy_with_logits(logits, rows.right[said])
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
        words = [f"{of_task[name].value:.2f}" for name in ("agreement_with_reference", "consistency")]
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
    knows_right = nn.Linear(model.config.hidden_size, 1)
    optimizer, schedule = optimizer_for(nn.ModuleList([model, knows_right]), course)
    lessons = Comparisons(maker, prompt, course.batch_size, course.seed, mix=mix, bank=bank)
    stream = iter(DataLoader(lessons, batch_size=None, num_workers=1, collate_fn=_same))
    model.train()
    for step in range(1, course.num_steps + 1):
        look = course.tower_rate > 0
        loss = loss_of_comparisons(model, knows_right, maker, prompt, next(stream), aims=aims, look=look)
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

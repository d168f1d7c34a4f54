"""Stage four: a model that says which of two responses is better,
taught through the very prompt that `align score` uses.

It starts from the good reader and goes on reading beside comparing. What it compares: right answers, the policy's
habits, misreadings, and what the real policies said about training pictures.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from align.demo.canvas import draw
from align.demo.questions import NUMBER_WORDS, TASKS, Task, hallucinates, is_exact, make_task, named_digits, say
from demo_build.instruct import Course, Log, ask, faulty_answer, optimizer_for
from demo_build.model import image_features, loss_of, respond
from demo_build.rows import TURN, Branch, RowMaker, Rows
from reward.prompt import Prompt, load_prompt

#: Pairs compared behind one training picture, each in both orders: what an order alone would say cancels out.
NUM_PAIRS = 4
READ_ALONG = ("list", "describe")
OPTIONS = ("first", "second")


@dataclass(frozen=True)
class Mix:
    """What a critic is taught with.

    `compared`: tasks to draw from beside "is there a D". `lookup_share`, `bank_share`: shares of training pictures that
    are asked after ten digits, and that come from what real policies said. `balanced`: ask after as many digits that
    are there as are not, instead of all ten; unbalanced, "no" alone is right in three of four.
    """

    compared: tuple[str, ...]
    lookup_share: float
    bank_share: float
    balanced: bool


FIRST_MIX = Mix(("list", "count", "largest", "describe"), lookup_share=0.3, bank_share=0.2, balanced=False)
LATE_MIX = Mix(("list", "count", "largest", "largest", "describe"), lookup_share=0.4, bank_share=0.1, balanced=True)
#: What a token of a right response weighs in the loss beside a verdict. Reading inside the very prompt matters: a model
#: that expects the right words there is surprised by wrong ones, and comparing is then a small step.
READING_WEIGHT = 0.2


def misread(task: Task, rng: random.Random) -> str:
    """A wrong answer that no one could tell from a right one without the picture (not always wrong, by chance).

    Too many and too few, too large and too small are equally likely. A critic that can do well by the words alone, by
    preferring short lists or "no", say, is soon exploited by the policy that it judges.
    """
    if task.kind == "has":
        return say(task, task.digits, present=task.asked not in task.digits)
    if task.kind == "count":
        return say(task, task.digits, number=rng.choice([n for n in range(1, 6) if n != len(task.digits)]))
    if task.kind == "largest":
        others = [rng.randrange(10) for _ in task.digits]
        return say(task, rng.choice([others, others, [rng.choice(task.digits)]]))
    seen = list(task.digits)
    at = rng.randrange(len(seen))
    kind = rng.random()
    if kind < 0.4:
        seen[at] = rng.randrange(10)
    elif kind < 0.65 and len(seen) > 1:
        seen.pop(at)
    elif kind < 0.9:
        seen.insert(rng.randint(0, len(seen)), rng.randrange(10))
    else:
        rng.shuffle(seen)
    return say(task, seen, number=len(task.digits) if rng.random() < 0.1 else None)


def quality(task: Task, response: str) -> float:
    """How good a response is, 0 to 1: 1 for the right answer, less for what is nearer to it or invents less."""
    if is_exact(task, response):
        return 1.0
    if task.kind in ("list", "describe"):
        named = named_digits(response)
        either = named | set(task.digits)
        return 0.8 * len(named & set(task.digits)) / len(either) if either else 0.0
    if task.kind == "count":
        said = [n for n, word in enumerate(NUMBER_WORDS) if f" {word} " in response]
        return 0.5 / abs(said[0] - len(task.digits)) if said and said[0] != len(task.digits) else 0.0
    return 0.0 if hallucinates(task, response) else 0.3


@dataclass(frozen=True)
class Said:
    """What real policies said about one training picture: a task with some different responses."""

    pixels: np.ndarray
    digits: tuple[int, ...]
    task: Task
    responses: tuple[str, ...]


class Comparisons(IterableDataset):
    """An endless stream of training rows, fixed by its seed; a share of the pictures comes from `bank`."""

    def __init__(
        self, maker: RowMaker, prompt: Prompt, batch_size: int, seed: int, *, mix: Mix, bank: Sequence[Said] = ()
    ) -> None:
        self.maker, self.prompt, self.batch_size, self.seed = maker, prompt, batch_size, seed
        self.mix, self.bank = mix, bank

    def __iter__(self) -> Iterator[Rows]:
        rng = random.Random(self.seed)
        while True:
            rows = [self._row(rng) for _ in range(self.batch_size)]
            yield self.maker.rows(np.stack([pixels for pixels, _ in rows]), [branches for _, branches in rows])

    def _row(self, rng: random.Random) -> tuple[np.ndarray, list[Branch]]:
        branches: list[Branch] = []
        kind = rng.random()
        if self.bank and kind < self.mix.bank_share:
            said = rng.choice(self.bank)
            pixels, digits = said.pixels, list(said.digits)
            branches += self._compare(said.task, *rng.sample(said.responses, 2))
        else:
            canvas = draw(rng, "train")
            pixels, digits = canvas.pixels, canvas.digits
        if kind > 1 - self.mix.lookup_share:
            return pixels, self._lookups(rng, digits)
        while len(branches) < 2 * NUM_PAIRS:
            task = make_task(rng, rng.choice(self.mix.compared), digits)
            branches += self._compare(task, *self._candidates(rng, task))
        task = make_task(rng, rng.choice(READ_ALONG), digits)
        return pixels, [*branches, self.maker.branch([task.question], task.answer)]

    def _lookups(self, rng: random.Random, digits: list[int]) -> list[Branch]:
        """ "Yes" against "no" for five digits that are there and five that are not, each in one order."""
        absent = [digit for digit in range(10) if digit not in digits]
        asked = [rng.choice(digits) for _ in range(5)] + rng.sample(absent, 5)
        tasks = [Task("has", rng.randrange(2), tuple(digits), asked=digit) for digit in asked]
        return [rng.choice(self._compare(task, task.answer, misread(task, rng))) for task in tasks]

    def _candidates(self, rng: random.Random, task: Task) -> tuple[str, str]:
        one = task.answer if rng.random() < 0.75 else misread(task, rng)
        other = faulty_answer(task, rng) if rng.random() < 0.2 else misread(task, rng)
        return one, other

    def _compare(self, task: Task, one: str, other: str) -> list[Branch]:
        """The comparison in both orders; nothing where neither response is better."""
        better = quality(task, one) - quality(task, other)
        if better == 0:
            return []
        verdicts = OPTIONS if better > 0 else OPTIONS[::-1]
        orders = zip(verdicts, ((one, other), (other, one)), strict=True)
        return [self._branch(task, responses, verdict) for verdict, responses in orders]

    def _branch(self, task: Task, responses: tuple[str, str], verdict: str) -> Branch:
        """The critic's prompt and its verdict; the right response inside the prompt is learned too."""
        asked = self.prompt.fill((), task.question, [responses])
        ids, learned = self.maker.encode(asked.head), [False] * len(self.maker.encode(asked.head))
        for piece, response in zip(asked.branches[0], responses, strict=True):
            tokens = self.maker.encode(piece)
            num_read = len(self.maker.encode(response)) if is_exact(task, response) else 0
            ids, learned = ids + tokens, learned + [True] * num_read + [False] * (len(tokens) - num_read)
        end = self.maker.branch([asked.tail], self.prompt.options[verdict], closed=False)
        return Branch((*ids, *end.ids), (*learned, *end.learned))


def listen(models: Sequence[Any], maker: RowMaker, num: int, seed: int, log: Log, part: str = "train") -> list[Said]:
    """Different responses of several policies at several temperatures to `num` questions."""
    pixels, tasks = ask(num, part, seed)
    texts: list[set[str]] = [set() for _ in tasks]
    torch.manual_seed(seed)
    for model in models:
        for temperature, num_samples in ((0.9, 4), (1.3, 2)):
            for at in range(0, num, 200):
                here = slice(at, at + 200)
                asked = [task.question for task in tasks[here]]
                answers = respond(model, maker, pixels[here], asked, temperature=temperature, num_samples=num_samples)
                for found, said in zip(texts[here], answers, strict=True):
                    found.update(said)
    log(f"{num} questions, {sum(map(len, texts))} different responses")
    kept = zip(pixels, tasks, texts, strict=True)
    return [Said(pixel, task.digits, task, tuple(sorted(found))) for pixel, task, found in kept]


def in_vocabulary(maker: RowMaker, said: Sequence[Said]) -> list[Said]:
    """Only responses in words of the vocabulary (at high temperatures a policy may run words together)."""
    unknown = maker.tokenizer.unk_token_id
    kept = []
    for item in said:
        good = tuple(
            text for text in item.responses if text.strip() and unknown not in maker.tokenizer(text)["input_ids"]
        )
        if len(good) > 1:
            kept.append(Said(item.pixels, item.digits, item.task, good))
    return kept


@dataclass(frozen=True)
class Trust:
    """Over pairs of one exact and one wrong response: right with both orders summed, and same verdict in both."""

    right: float
    consistent: float
    num_pairs: int
    by_task: dict[str, float]

    def __str__(self) -> str:
        tasks = " ".join(f"{kind} {share:.2f}" for kind, share in self.by_task.items())
        return f"right {self.right:.3f} consistent {self.consistent:.3f} of {self.num_pairs} pairs ({tasks})"


@torch.no_grad()
def prefers_first(model: Any, maker: RowMaker, prompt: Prompt, rows: Sequence[tuple[np.ndarray, str, str, str]]) -> Any:
    """`(n,)` log-odds of "first" for rows of (pixels, question, first, second)."""
    model.eval()
    found = []
    first_id, second_id = (maker.encode(prompt.options[name])[0] for name in OPTIONS)
    for at in range(0, len(rows), 100):
        here = rows[at : at + 100]
        branches = []
        for _, question, first, second in here:
            asked = prompt.fill((), question, [(first, second)])
            pieces = [asked.head, *asked.branches[0], asked.tail, TURN]
            ids = tuple(token for piece in pieces for token in maker.encode(piece))
            branches.append([Branch(ids, (False,) * len(ids))])
        batch = maker.rows(np.stack([row[0] for row in here]), branches)
        hidden = model.model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            attention_mask=batch.mask(),
            image_features=image_features(model, batch.pixels).flatten(0, 1),
            use_cache=False,
        ).last_hidden_state
        last = (batch.branch >= 0).sum(1) - 1
        logits = model.lm_head(hidden[torch.arange(len(here)), last])
        found.append((logits[:, first_id] - logits[:, second_id]).numpy())
    model.train()
    return np.concatenate(found)


def trust(model: Any, maker: RowMaker, prompt: Prompt, said: Sequence[Said], seed: int = 0) -> Trust:
    rng = random.Random(seed)
    rows, kinds = [], []
    for item in said:
        good = [text for text in item.responses if is_exact(item.task, text)]
        bad = [text for text in item.responses if not is_exact(item.task, text)]
        if good and bad:
            right, wrong = good[0], rng.choice(bad)
            rows += [(item.pixels, item.task.question, right, wrong), (item.pixels, item.task.question, wrong, right)]
            kinds.append(item.task.kind)
    odds = prefers_first(model, maker, prompt, rows)
    forth, back = odds[0::2], -odds[1::2]
    right = (forth + back) > 0
    by_task = {kind: float(np.mean(right[np.array(kinds) == kind])) for kind in TASKS if kind in kinds}
    return Trust(float(right.mean()), float(((forth > 0) == (back > 0)).mean()), len(kinds), by_task)


def teach_critic(
    model: nn.Module,
    maker: RowMaker,
    prompt_path: Path,
    course: Course,
    log: Log,
    *,
    mix: Mix,
    bank: Sequence[Said],
    held_out: Sequence[Said],
    after: Any = lambda step: None,
    every: int = 100,
) -> None:
    """Train in place, with a look at held-out pairs every `every` steps."""
    prompt = load_prompt(prompt_path, "pairwise")
    optimizer, schedule = optimizer_for(model, course)
    lessons = Comparisons(maker, prompt, course.batch_size, course.seed, mix=mix, bank=bank)
    stream = iter(DataLoader(lessons, batch_size=None, num_workers=1, collate_fn=_same))
    verdicts = [maker.encode(word)[0] for word in (*prompt.options.values(), "Yes", "No")]
    model.train()
    for step in range(1, course.num_steps + 1):
        rows = next(stream)
        is_verdict = torch.isin(rows.labels, torch.tensor(verdicts))
        loss = loss_of(model, rows, torch.where(is_verdict, 1.0, READING_WEIGHT))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == course.num_steps:
            log(f"step {step} loss {loss.item():.4f} {trust(model, maker, prompt, held_out)}")
            after(step)


def _same(batch: Any) -> Any:
    return batch

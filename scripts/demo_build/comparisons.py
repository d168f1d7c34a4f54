"""What a critic is taught to compare: pictures and responses in, training rows out, every pair in both orders.

Right answers, the policy's habits, misreadings, and what real policies said about training pictures. What a verdict
ought to be follows from the responses alone, so it is the same in both orders.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from align.demo.canvas import MAX_DIGITS, draw
from align.demo.questions import Task, is_exact, make_task, say
from demo_build.faults import faults, merit, quality
from demo_build.instruct import Log, ask, faulty_answer
from demo_build.model import respond
from demo_build.rows import Branch, RowMaker, Rows
from reward.prompt import Prompt

#: Pairs compared behind one training picture, each in both orders: what an order alone would say cancels out.
NUM_PAIRS = 4
NUM_LOOKUPS = 5
READ_ALONG = ("list", "describe")
#: The longest list that slips lead to.
MOST_SAID = 6
#: To think of digits of which a response is right: there may be none.
MOST_TRIES = 50


@dataclass(frozen=True)
class Mix:
    """What a critic is taught with.

    `compared`: tasks to draw from where responses are made up. `lookup_share`, `bank_share`: shares of training
    pictures that are asked after several digits, and that come from what real policies said. `by_merit`: how sure a
    critic ought to be follows from how far apart two responses are, and responses that are made up may have several
    faults; without it the nearer one is certain, and equals are left out. `elsewhere`: how often what policies said is
    put under another picture (`said_elsewhere`).
    """

    compared: tuple[str, ...]
    lookup_share: float
    bank_share: float
    by_merit: bool = False
    elsewhere: float = 0.0

    def p_first(self, one: float, other: float) -> float | None:
        """How sure to be of the first, by the merits of the two responses; None where nothing is to be learned.

        >>> Mix((), 0, 0).p_first(-1.2, 2.0), Mix((), 0, 0).p_first(-1.2, -1.2)
        (0.0, None)
        >>> mix = Mix((), 0, 0, by_merit=True)
        >>> round(mix.p_first(-1.2, 2.0), 2), round(mix.p_first(-1.2, -2.4), 2), mix.p_first(-1.2, -1.2)
        (0.04, 0.77, 0.5)
        """
        if self.by_merit:
            return 1 / (1 + math.exp(other - one))
        return None if one == other else float(one > other)


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


def with_slips(task: Task, rng: random.Random) -> str:
    """An answer with one to three slips, each as a policy's: a digit exchanged, left out, added, or the order lost."""
    if task.kind == "largest" and rng.random() < 0.4:
        return say(task, [rng.choice(task.digits)])
    if task.kind not in READ_ALONG:
        return misread(task, rng)
    seen = list(task.digits)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        at, kind = rng.randrange(len(seen)), rng.random()
        if kind < 0.5:
            seen[at] = rng.randrange(10)
        elif kind < 0.7 and len(seen) > 1:
            seen.pop(at)
        elif kind < 0.95 and len(seen) < MOST_SAID:
            seen.insert(rng.choice((rng.randint(0, len(seen)), len(seen))), rng.randrange(10))
        else:
            rng.shuffle(seen)
    return say(task, seen, number=len(task.digits) if rng.random() < 0.07 else None)


@dataclass(frozen=True)
class Said:
    """What real policies said about one training picture: a task with some different responses."""

    pixels: np.ndarray
    digits: tuple[int, ...]
    task: Task
    responses: tuple[str, ...]


def listen(models: Sequence[Any], maker: RowMaker, num: int, seed: int, log: Log, part: str = "train") -> list[Said]:
    """Different responses of several policies at several temperatures to `num` questions.

    Only in words of the vocabulary: at high temperatures a policy may run words together.
    """
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
                    found.update(text for text in said if maker.knows(text))
    log(f"{num} questions, {sum(map(len, texts))} different responses")
    kept = zip(pixels, tasks, texts, strict=True)
    return [Said(pixel, task.digits, task, tuple(sorted(found))) for pixel, task, found in kept if len(found) > 1]


def said_elsewhere(said: Said, rng: random.Random) -> Said:
    """The same responses under a fresh picture of which another one of them, right or wrong before, is right.

    Policies have habits: of what they say, the shorter list is mostly the right one. With both pictures the words
    alone do not tell which response is right, and a critic must look.
    """
    text = rng.choice(said.responses)
    for _ in range(MOST_TRIES):
        digits = [rng.randrange(10) for _ in range(rng.randint(1, MAX_DIGITS))]
        if said.task.kind in READ_ALONG:
            digits = _digits_in(text)
        if said.task.kind == "largest":
            digits = _with_largest(max(_digits_in(text), default=0), _digits_in(*said.responses), len(digits), rng)
        task = replace(said.task, digits=tuple(digits))
        if 1 <= len(digits) <= MAX_DIGITS and is_exact(task, text):
            return Said(draw(rng, "train", digits).pixels, task.digits, task, said.responses)
    return said


def _digits_in(*texts: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d", " ".join(texts))]


def _with_largest(largest: int, said: Sequence[int], number: int, rng: random.Random) -> list[int]:
    """As many digits of which `largest` is the largest; about half are smaller ones that responses said, if any did."""
    smaller = [digit for digit in said if digit < largest]
    digits = [largest]
    while len(digits) < number:
        digits.append(rng.choice(smaller) if smaller and rng.random() < 0.5 else rng.randint(0, largest))
    rng.shuffle(digits)
    return digits


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
            if rng.random() < self.mix.elsewhere:
                said = said_elsewhere(said, rng)
            pixels, digits = said.pixels, list(said.digits)
            pairs = list(combinations(said.responses, 2))
            for pair in rng.sample(pairs, min(len(pairs), NUM_PAIRS)):
                branches += self._compare(said.task, *pair)
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
        """ "Yes" against "no" for digits that are there and others that are not, equally likely."""
        absent = [digit for digit in range(10) if digit not in digits]
        asked = [rng.choice(rng.choice((digits, absent))) for _ in range(NUM_LOOKUPS)]
        tasks = [Task("has", rng.randrange(2), tuple(digits), asked=digit) for digit in asked]
        return [branch for task in tasks for branch in self._compare(task, task.answer, misread(task, rng))]

    def _candidates(self, rng: random.Random, task: Task) -> tuple[str, str]:
        wrong, right_share = (with_slips, 0.45) if self.mix.by_merit else (misread, 0.75)
        one = task.answer if rng.random() < right_share else wrong(task, rng)
        other = faulty_answer(task, rng) if rng.random() < 0.2 else wrong(task, rng)
        return one, other

    def _compare(self, task: Task, one: str, other: str) -> list[Branch]:
        """The comparison in both orders, one after the other; nothing where there is nothing to be learned."""
        p_first = self.mix.p_first(merit(task, one), merit(task, other))
        if p_first is None or one == other:
            return []
        return [self._branch(task, (one, other), p_first), self._branch(task, (other, one), 1 - p_first)]

    def _branch(self, task: Task, responses: tuple[str, str], p_first: float) -> Branch:
        """The critic's prompt and its verdict; the right response inside the prompt is learned too."""
        asked = self.prompt.fill((), task.question, [responses])
        ids, learned = self.maker.encode(asked.head), [False] * len(self.maker.encode(asked.head))
        known: list[tuple[int, float]] = []
        for piece, response in zip(asked.branches[0], responses, strict=True):
            tokens, num_said = self.maker.encode(piece), len(self.maker.encode(response))
            num_read = num_said if is_exact(task, response) else 0
            known += [(len(ids) + at, float(is_right)) for at, is_right in faults(task, response).marks]
            known.append((len(ids) + num_said, quality(task, response)))
            ids, learned = ids + tokens, learned + [True] * num_read + [False] * (len(tokens) - num_read)
        end = self.maker.branch([asked.tail], self.prompt.options["first" if p_first > 0.5 else "second"], closed=False)
        assert end.learned.count(True) == 1, "a verdict is one token"
        return Branch((*ids, *end.ids), (*learned, *end.learned), p_first, tuple(known))

"""Stages two and three: an instruct model that reads well, then one that sees but answers badly.

Errors of sight cannot be fixed by preferences among a model's own responses; habits can. So the policy of the demo
is the good model, trained on for a while on answers with a systematic fault a task.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from align.demo.canvas import draw
from align.demo.questions import TASKS, Task, hallucinates, is_exact, make_task, say
from demo_build.model import loss_of, respond
from demo_build.rows import Branch, RowMaker, Rows
from demo_build.schedule import cosine_with_warmup

Log = Callable[[str], None]
#: What is asked of every training picture; then, when the rest is learned, mostly what is learned last: to look for
#: the digit that the question names.
ASKED = (*TASKS, "has")
ASKED_LATE = ("list", "count", "largest", "describe", "has", "has", "has", "has")


def faulty_answer(task: Task, rng: random.Random) -> str:
    """The task's habit: yes to everything, one too many, the last for the largest, one invented digit."""
    if task.kind == "has":
        return say(task, task.digits, present=True)
    if task.kind == "count":
        return say(task, task.digits, number=len(task.digits) + 1)
    if task.kind == "largest":
        return say(task, task.digits[-1:])
    invented = rng.choice([digit for digit in range(10) if digit not in task.digits])
    return say(task, (*task.digits, invented))


class Lessons(IterableDataset):
    """An endless stream of training rows, fixed by its seed; `faults` gives each task's share of faulty answers."""

    def __init__(
        self,
        maker: RowMaker,
        batch_size: int,
        seed: int,
        faults: Mapping[str, float] | None = None,
        asked: Sequence[str] = ASKED,
    ) -> None:
        self.maker, self.batch_size, self.seed, self.faults, self.asked = maker, batch_size, seed, faults or {}, asked

    def __iter__(self) -> Iterator[Rows]:
        rng = random.Random(self.seed)
        while True:
            canvases = [draw(rng, "train") for _ in range(self.batch_size)]
            branches = [[self._branch(rng, kind, canvas.digits) for kind in self.asked] for canvas in canvases]
            yield self.maker.rows(np.stack([canvas.pixels for canvas in canvases]), branches)

    def _branch(self, rng: random.Random, kind: str, digits: list[int]) -> Branch:
        task = make_task(rng, kind, digits)
        faulty = rng.random() < self.faults.get(kind, 0.0)
        return self.maker.branch([task.question], faulty_answer(task, rng) if faulty else task.answer)


@dataclass(frozen=True)
class Course:
    """How long and how fast a model is taught; `tower_rate` is the encoders' learning rate."""

    num_steps: int
    rate: float
    tower_rate: float
    seed: int
    batch_size: int = 32
    num_warmup: int = 50


#: What "Yes" and "No" weigh in the loss beside other words: they carry the whole of their answer.
VERDICT_WEIGHT = 3.0


class Lookups(IterableDataset):
    """An endless stream of rows that ask after all ten digits of a picture, up to "Yes" or "No".

    Looking for what a question names is learned late and then at once; ten questions about one picture, with nothing
    else to learn, bring it on.
    """

    def __init__(self, maker: RowMaker, batch_size: int, seed: int) -> None:
        self.maker, self.batch_size, self.seed = maker, batch_size, seed

    def __iter__(self) -> Iterator[Rows]:
        rng = random.Random(self.seed)
        while True:
            canvases = [draw(rng, "train") for _ in range(self.batch_size)]
            branches = [self._branches(rng, canvas.digits) for canvas in canvases]
            yield self.maker.rows(np.stack([canvas.pixels for canvas in canvases]), branches)

    def _branches(self, rng: random.Random, digits: list[int]) -> list[Branch]:
        branches = []
        for digit in range(10):
            task = Task("has", rng.randrange(2), tuple(digits), asked=digit)
            whole = self.maker.branch([task.question], task.answer)
            end = whole.learned.index(True) + 1
            branches.append(Branch(whole.ids[:end], whole.learned[:end]))
        task = make_task(rng, "list", digits)
        return [*branches, self.maker.branch([task.question], task.answer)]


def teach_looking(model: Any, maker: RowMaker, course: Course, log: Log) -> None:
    """Train in place on `Lookups`, at a constant rate after warm-up; "Yes", which is rarer, weighs more than "No"."""
    optimizer, _ = optimizer_for(model, course)
    rates = [group["lr"] for group in optimizer.param_groups]
    lookups = Lookups(maker, course.batch_size, course.seed)
    stream = iter(DataLoader(lookups, batch_size=None, num_workers=1, collate_fn=_same))
    yes, no = (maker.encode(word)[0] for word in ("Yes", "No"))
    losses = []
    model.train()
    for step in range(1, course.num_steps + 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, step / course.num_warmup)
        rows = next(stream)
        weight = torch.where(rows.labels == yes, VERDICT_WEIGHT, torch.where(rows.labels == no, 1.0, 0.3))
        loss = loss_of(model, rows, weight)
        _step(model, optimizer, loss)
        losses.append(loss.item())
        if step % 20 == 0:
            log(f"step {step} loss {np.mean(losses[-20:]):.4f}")


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def optimizer_for(model: nn.Module, course: Course) -> tuple[torch.optim.Optimizer, Any]:
    towers = [p for n, p in model.named_parameters() if "vision_tower" in n]
    rest = [p for n, p in model.named_parameters() if "vision_tower" not in n]
    groups = [{"params": towers, "lr": course.tower_rate}, {"params": rest, "lr": course.rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.02, betas=(0.9, 0.98))
    factor = cosine_with_warmup(course.num_steps, course.num_warmup)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def teach(
    model: nn.Module,
    maker: RowMaker,
    course: Course,
    log: Log,
    *,
    faults: Mapping[str, float] | None = None,
    asked: Sequence[str] = ASKED,
    verdict_weight: float = 1.0,
    after: Callable[[int], None] = lambda step: None,
    every: int = 200,
) -> None:
    """Train in place; `after(step)` runs every `every` steps and at the end."""
    optimizer, schedule = optimizer_for(model, course)
    lessons = Lessons(maker, course.batch_size, course.seed, faults, asked)
    stream = iter(DataLoader(lessons, batch_size=None, num_workers=1, collate_fn=_same))
    verdicts = [maker.encode(word)[0] for word in ("Yes", "No")]
    model.train()
    for step in range(1, course.num_steps + 1):
        rows = next(stream)
        is_verdict = torch.isin(rows.labels, torch.tensor(verdicts))
        loss = loss_of(model, rows, torch.where(is_verdict, verdict_weight, 1.0))
        _step(model, optimizer, loss)
        schedule.step()
        if step % every == 0 or step == course.num_steps:
            log(f"step {step} loss {loss.item():.4f} " + summary(model, maker))
            after(step)


def _same(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class Score:
    """Shares over questions: exact, naming an absent digit, and exact by task."""

    exact: float
    hallucinated: float
    by_task: dict[str, float]

    def __str__(self) -> str:
        tasks = " ".join(f"{kind} {share:.2f}" for kind, share in self.by_task.items())
        return f"exact {self.exact:.3f} hallucinated {self.hallucinated:.3f} ({tasks})"


def ask(num: int, part: str, seed: int) -> tuple[np.ndarray, list[Task]]:
    """Pictures `(num, 112, 112)` of a part, one task each, the tasks in turn."""
    rng = random.Random(seed)
    canvases = [draw(rng, part) for _ in range(num)]
    tasks = [make_task(rng, TASKS[i % len(TASKS)], canvas.digits) for i, canvas in enumerate(canvases)]
    return np.stack([canvas.pixels for canvas in canvases]), tasks


def score(
    model: Any,
    maker: RowMaker,
    pixels: np.ndarray,
    tasks: list[Task],
    *,
    temperature: float = 0.0,
    num_samples: int = 1,
) -> Score:
    questions = [task.question for task in tasks]
    answers: list[list[str]] = []
    for at in range(0, len(tasks), 100):
        here = slice(at, at + 100)
        answers += respond(
            model, maker, pixels[here], questions[here], temperature=temperature, num_samples=num_samples
        )
    exact = [np.mean([is_exact(t, text) for text in texts]) for t, texts in zip(tasks, answers, strict=True)]
    wrong = [np.mean([hallucinates(t, text) for text in texts]) for t, texts in zip(tasks, answers, strict=True)]
    by_task = {k: float(np.mean([e for e, t in zip(exact, tasks, strict=True) if t.kind == k])) for k in TASKS}
    return Score(float(np.mean(exact)), float(np.mean(wrong)), by_task)


def summary(model: Any, maker: RowMaker, num: int = 200) -> str:
    """Greedy answers on pictures of the policy's part: what the model can do while it is trained."""
    return str(score(model, maker, *ask(num, "policy", seed=7)))

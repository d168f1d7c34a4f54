"""A run directory as the stages leave one, with made-up responses: real records, real manifests, real pictures.

The policy of round r is right with probability `skill[r]`; scores and pairs come from the real ranking and pair rules,
evaluation.json from the real measures. What is drawn depends on the seed alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from align.config import Config, build_config, dump_config
from align.evaluation.measure import measure
from align.records import Evaluated, Evaluation, Pair, Question, Response, Samples, write_jsonl
from align.run.folder import Round, RunDir
from align.stages.critic_metrics import critic_figures
from align.stages.pairs import Made, MadePair, pair_figures
from reward.judgement import Judgement, Verdict

TASKS = ("count", "colour", "largest")
COLOURS = ("red", "green", "blue")
WHEN = "2026-01-0{}T10:00:00Z"


@dataclass
class FakeRun:
    folder: Path
    skill: tuple[float, ...] = (0.45, 0.6, 0.7, 0.78)
    num_held_out: int = 60
    num_training: int = 20
    num_responses: int = 4
    random_critic: bool = False
    steps: int = 30
    seed: int = 0
    texts: list[str] = field(default_factory=list)

    def build(self) -> Path:
        self.rng = np.random.default_rng(self.seed)
        self.images = self.folder.parent / "images"
        self.images.mkdir(parents=True, exist_ok=True)
        self.config = self._config()
        run = RunDir(self.folder)
        run.write_config_once(dump_config(self.config))
        held_out = [self._question(f"held-{index}") for index in range(self.num_held_out)]
        for number, skill in enumerate(self.skill):
            this = run.round(number)
            this.path.mkdir(parents=True, exist_ok=True)
            if number:
                self._train_round(this, self.skill[number - 1])
            self._evaluate(this, held_out, skill)
        return self.folder

    def _config(self) -> Config:
        values: dict[str, Any] = {
            "name": self.folder.name,
            "run_root": str(self.folder.parent),
            "policy": str(self.folder.parent / "tiny-policy"),
            "questions": str(self.folder.parent / "questions.jsonl"),
            "image_root": str(self.images),
            "rounds": len(self.skill) - 1,
            "critic": {"kind": "random"} if self.random_critic else {"kind": "pairwise", "model": "./tiny-critic"},
            "evaluate": {"questions": str(self.folder.parent / "held-out.jsonl"), "num_samples": 2},
            "sample": {"num_responses": self.num_responses},
        }
        return build_config(values, base=self.folder.parent)

    def _question(self, id_: str) -> Question:
        rng = np.random.default_rng(sum(map(ord, id_)) * 7919 + len(id_))
        count, colour = int(rng.integers(1, 6)), COLOURS[rng.integers(3)]
        name = f"{id_}.png"
        if not (self.images / name).exists():
            draw_circles(self.images / name, count, colour, rng)
        task = TASKS[rng.integers(2)]
        text, answer = (
            ("How many circles are there?", str(count)) if task == "count" else ("Which colour are they?", colour)
        )
        absent = [other for other in COLOURS if other != colour]
        return Question(
            id=id_,
            question=text,
            images=[name],
            answer=answer,
            answer_kind="contains",
            absent_objects=absent,
            meta={"task": task},
        )

    def _say(self, question: Question, skill: float) -> str:
        if self.texts:
            return self.texts[self.rng.integers(len(self.texts))]
        right = self.rng.random() < skill
        if question.meta["task"] == "count":
            number = int(question.answer or 0) + (0 if right else int(self.rng.integers(1, 4)))
            return (f"There are {number} circles.", f"I count {number} circles.")[self.rng.integers(2)]
        colour = question.answer if right else question.absent_objects[self.rng.integers(2)]
        return (f"They are {colour}.", f"The circles in the picture are {colour}.")[self.rng.integers(2)]

    def _evaluate(self, this: Round, questions: list[Question], skill: float) -> None:
        def answer(question: Question) -> Evaluated:
            text = self._say(question, skill)
            return Evaluated(
                text=text,
                num_tokens=len(text.split()) + 1,
                correct=question.answer in text.strip(".").split(),
                absent_named=[word for word in question.absent_objects if word in text],
            )

        begin(this, "evaluate")
        lines = [
            Evaluation(
                id=question.id, question=question, greedy=answer(question), sampled=[answer(question), answer(question)]
            )
            for question in questions
        ]
        write_jsonl(this.evaluation_lines, lines)
        metrics = {name: interval.as_dict() for name, interval in measure(lines).items()}
        this.evaluation.write_text(json.dumps({"round": this.number, "questions": len(lines), "metrics": metrics}))
        finish(this, "evaluate", {"questions": len(lines)}, 8.0 + this.number, {})

    def _train_round(self, this: Round, skill: float) -> None:
        questions = [self._question(f"train-{this.number}-{index}") for index in range(self.num_training)]
        samples = [self._samples(question, skill) for question in questions]
        scores = [self._scores(line) for line in samples]
        pairs, counts = make_pairs(samples, scores)
        write_jsonl(this.samples, samples)
        write_jsonl(this.scores, scores)
        write_jsonl(this.pairs, pairs)
        tokens = sum(response.num_tokens for line in samples for response in line.responses)
        sampled = {
            "questions": len(samples),
            "responses": len(samples) * self.num_responses,
            "tokens": tokens,
            "truncated": 1,
        }
        notes = {"shared_prefix": "exact, max error 9.5e-07"}
        for name, stage_counts, seconds in (
            ("sample", sampled, 21.5),
            ("score", score_counts(samples, scores), 33.25),
            ("pairs", counts, 0.25),
            ("dpo", {"pairs": len(pairs), "steps": self.steps}, 47.0),
        ):
            begin(this, name)
            if name == "dpo":
                write_training_log(this, self.steps, learns=not self.random_critic)
            finish(this, name, stage_counts, seconds, notes)

    def _samples(self, question: Question, skill: float) -> Samples:
        texts = [self._say(question, skill) for _ in range(self.num_responses)]
        responses = [Response(text=text, num_tokens=len(text.split()) + 1) for text in texts]
        return Samples(id=question.id, question=question, responses=responses, seed=1)

    def _scores(self, line: Samples) -> Judgement:
        good = [line.question.answer in response.text.strip(".").split() for response in line.responses]
        size = len(good)
        verdicts, rewards = [], [0.0] * size
        for first in range(size):
            for second in range(size):
                if first != second:
                    lean = 0.0 if self.random_critic else 2.0 * (good[first] - good[second])
                    p = round(float(1 / (1 + np.exp(-(lean + self.rng.normal(0.2, 1.0))))), 4)
                    winner = first if p > 0.5 else second
                    reason = f"Response {'one' if winner == first else 'two'} fits the picture." if first == 0 else None
                    verdicts.append(Verdict(first=first, second=second, p_first=p, p_second=round(1 - p, 4), winner=winner, rationale=reason))  # fmt: skip
                    rewards[winner] += 1
                    rewards[second if winner == first else first] -= 1
        return Judgement(id=line.id, rewards=rewards, verdicts=verdicts)


def make_pairs(samples: list[Samples], scores: list[Judgement]) -> tuple[list[Pair], dict[str, Any]]:
    """Best against worst, with the counts that the pairs stage writes."""
    pairs, made, tied = [], [], 0
    for line, score in zip(samples, scores, strict=True):
        rewards = [reward or 0.0 for reward in score.rewards]
        best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
        if line.responses[best].text == line.responses[worst].text:
            tied += 1
            continue
        chosen, rejected = (
            [{"role": "assistant", "content": [{"type": "text", "text": line.responses[index].text}]}]
            for index in (best, worst)
        )
        pairs.append(
            Pair(
                id=f"{line.id}/{best}-{worst}",
                images=line.question.images,
                prompt=line.question.messages(),
                chosen=chosen,
                rejected=rejected,
                margin=rewards[best] - rewards[worst],
                question_id=line.id,
                responses={"chosen": best, "rejected": worst},
            )
        )
        sides = line.responses[best], line.responses[worst]
        good = [line.question.answer in side.text.strip(".").split() for side in sides]
        right = good[0] if good[0] != good[1] else None
        made.append(MadePair.of(pairs[-1], (sides[0].num_tokens, sides[1].num_tokens), right))
    counts = {
        "questions": len(samples),
        "pairs": len(pairs),
        "dropped_responses": {"same text as another response": 3},
        "dropped_pairs": {"not picked by the strategy": 5 * len(pairs)},
        "questions_without_pair": {"all rewards tied": tied},
        "figures": {name: figure.model_dump() for name, figure in pair_figures(Made(made)).items()},
    }
    return pairs, counts


def score_counts(samples: list[Samples], scores: list[Judgement]) -> dict[str, Any]:
    return {
        "questions": len(scores),
        "scored": sum(len(score.rewards) for score in scores),
        "unscored": {},
        "verdicts": sum(len(score.verdicts) for score in scores),
        "critic": {name: figure.model_dump() for name, figure in critic_figures(samples, scores, []).items()},
    }


def begin(this: Round, stage: str) -> None:
    this.manifest.begin(stage, settings={}, inputs={})


def finish(this: Round, stage: str, counts: dict[str, Any], seconds: float, notes: dict[str, Any]) -> None:
    """Complete a stage with times that do not depend on the clock."""
    this.manifest.finish(stage, outputs=[], counts=counts, seconds=seconds, notes=notes)
    data = json.loads(this.manifest_path.read_text())
    data["stages"][stage] |= {"started": WHEN.format(this.number + 1), "finished": WHEN.format(this.number + 2)}
    del data["checksum"]
    this.manifest_path.write_text(json.dumps(data))


def write_training_log(this: Round, steps: int, *, learns: bool) -> None:
    """trainer_state.json with a training curve that starts at ln 2 and reward 0."""
    rng = np.random.default_rng(this.number)
    history = []
    for step in range(1, steps + 1):
        gain = (1 - math.exp(-3 * step / steps)) * (2.4 if learns else 0.05)
        noise = rng.normal(0, 0.12, 4) * (step > 1)
        margin = gain + noise[0]
        history.append(
            {
                "step": step,
                "loss": round(math.log1p(math.exp(-margin)) + abs(noise[1]) * 0.3, 4) if step > 1 else 0.6931,
                "rewards/chosen": round(-0.12 * gain + 0.3 * noise[2], 4),
                "rewards/rejected": round(-1.12 * gain + 0.3 * noise[2] - noise[0], 4),
                "rewards/margins": round(margin, 4),
                "rewards/accuracies": round(float(np.clip(0.5 + 0.42 * gain / 2.4 + noise[3] * 0.5, 0, 1)), 4),
                "learning_rate": 1e-4 * (1 - step / steps),
            }
        )
    history.append({"step": steps, "train_loss": 0.4, "train_runtime": 47.0})
    this.checkpoint.mkdir(parents=True, exist_ok=True)
    (this.checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": steps, "log_history": history}))


def draw_circles(path: Path, count: int, colour: str, rng: np.random.Generator) -> None:
    image = Image.new("RGB", (160, 120), (244, 241, 232))
    pen = ImageDraw.Draw(image)
    for index in range(count):
        x, y, radius = 18 + index * 30, int(rng.integers(30, 90)), int(rng.integers(8, 14))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    image.save(path)

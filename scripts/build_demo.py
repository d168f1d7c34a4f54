"""Train the demo's policy and critic from scratch and put them, in half precision, into the package.

    python scripts/build_demo.py --work build/demo --threads 2

About an hour on two quiet cores. Stages that are finished are kept in the work folder and skipped; delete a stage's
file to train it again. What every stage reports is kept beside the checkpoints as `build_log.txt`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from demo_build.critic import FIRST_MIX, LATE_MIX, Mix, in_vocabulary, listen, teach_critic
from demo_build.export import export, open_weights
from demo_build.instruct import ASKED_LATE, VERDICT_WEIGHT, Course, Log, ask, score, teach, teach_looking
from demo_build.model import make_model
from demo_build.rows import RowMaker
from demo_build.towers import train_tower
from demo_build.words import build_tokenizer

from align.demo.data import CRITIC, CRITIC_PROMPT, POLICY

TOWER_STEPS = {"siglip": 5000, "eagle": 4000}
GOOD = Course(num_steps=1000, rate=1e-3, tower_rate=3e-4, seed=0)
LOOK = Course(num_steps=400, rate=1e-3, tower_rate=2e-4, seed=9, batch_size=24, num_warmup=30)
LATE = Course(num_steps=400, rate=6e-4, tower_rate=2e-4, seed=5)
POLICY_COURSE = Course(num_steps=200, rate=3e-4, tower_rate=0.0, seed=1, num_warmup=20)
CRITIC_COURSE = Course(num_steps=700, rate=1e-3, tower_rate=2e-4, seed=2, batch_size=14)
CRITIC_LATE = Course(num_steps=450, rate=1e-3, tower_rate=2e-4, seed=12, batch_size=14)
#: The share of faulty answers by task: set so that the policy's samples are right about half of the time.
FAULTS = {"list": 0.6, "count": 0.35, "largest": 0.5, "has": 0.75, "describe": 0.6}
#: Those of a second such model, whose answers the critic learns from.
OTHER_FAULTS = {"list": 0.5, "count": 0.3, "largest": 0.5, "has": 0.85, "describe": 0.5}


class Build:
    """The stages in order; each leaves a file in `work` and is skipped where the file is."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build_tokenizer(CRITIC_PROMPT)
        self.maker = RowMaker(self.tokenizer)

    def run(self) -> None:
        for kind, num_steps in TOWER_STEPS.items():
            self.stage(
                f"tower-{kind}", lambda out, log, k=kind, n=num_steps: train_tower(k, out, num_steps=n, seed=0, log=log)
            )
        self.stage("good", self.train_good)
        self.stage("look", self.train_look)
        self.stage("late", self.train_late)
        self.stage("policy", lambda out, log: self.train_faulty(out, log, FAULTS))
        self.stage("habits", lambda out, log: self.train_faulty(out, log, OTHER_FAULTS))
        self.stage(
            "critic", lambda out, log: self.train_critic(out, log, "late", CRITIC_COURSE, FIRST_MIX, num_heard=1000)
        )
        self.stage(
            "critic-late", lambda out, log: self.train_critic(out, log, "critic", CRITIC_LATE, LATE_MIX, num_heard=600)
        )
        self.finish()

    def file(self, name: str) -> Path:
        return self.work / f"{name}.pt"

    def stage(self, name: str, train: Callable[[Path, Log], None]) -> None:
        if self.file(name).exists():
            print(f"{name}: done before", flush=True)
            return
        log = self.log_of(name)
        log(f"begins on {torch.get_num_threads()} threads, torch {torch.__version__}")
        train(self.file(name), log)
        log("done")

    def log_of(self, name: str) -> Log:
        """A log that prints and keeps its lines, with the seconds since the stage began."""
        path, started = self.work / f"{name}.log", time.monotonic()
        path.write_text("", encoding="utf-8")

        def log(text: str) -> None:
            line = f"{name} {time.monotonic() - started:6.0f} s  {text}"
            print(line, flush=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

        return log

    def train_good(self, out: Path, log: Log) -> None:
        """An instruct model that reads well."""
        towers = {kind: self.file(f"tower-{kind}") for kind in TOWER_STEPS}
        model = make_model(self.tokenizer, towers, seed=0)
        teach(model, self.maker, GOOD, log)
        torch.save(model.state_dict(), out)

    def train_look(self, out: Path, log: Log) -> None:
        """The good model learns to look for the digit that a question names."""
        model = open_weights(self.file("good"), self.tokenizer)
        teach_looking(model, self.maker, LOOK, log)
        torch.save(model.state_dict(), out)

    def train_late(self, out: Path, log: Log) -> None:
        """And then to do everything well."""
        model = open_weights(self.file("look"), self.tokenizer)
        teach(model, self.maker, LATE, log, asked=ASKED_LATE, verdict_weight=VERDICT_WEIGHT, every=100)
        torch.save(model.state_dict(), out)

    def train_faulty(self, out: Path, log: Log, faults: dict[str, float]) -> None:
        """The good model with bad habits."""
        model = open_weights(self.file("late"), self.tokenizer)
        teach(model, self.maker, POLICY_COURSE, log, faults=faults)
        torch.manual_seed(0)
        sampled = score(model, self.maker, *ask(400, "policy", 7), temperature=0.9, num_samples=4)
        log(f"sampled at temperature 0.9: {sampled}")
        torch.save(model.state_dict(), out)

    def train_critic(self, out: Path, log: Log, start: str, course: Course, mix: Mix, num_heard: int) -> None:
        """A model taught to compare, partly on what a good and a faulty model say."""
        policies = [open_weights(self.file(name), self.tokenizer) for name in ("late", "habits")]
        bank = in_vocabulary(self.maker, listen(policies, self.maker, num_heard, seed=course.seed + 1, log=log))
        held_out = in_vocabulary(self.maker, listen(policies[1:], self.maker, 600, seed=4, log=log, part="policy"))
        model = open_weights(self.file(start), self.tokenizer)
        teach_critic(model, self.maker, CRITIC_PROMPT, course, log, mix=mix, bank=bank, held_out=held_out)
        torch.save(model.state_dict(), out)

    def finish(self) -> None:
        """Write both checkpoints into the package, and the log beside them."""
        log = self.log_of("export")
        for name, folder in (("policy", POLICY), ("critic-late", CRITIC)):
            export(self.file(name), folder, self.tokenizer, log)
        stages = [
            *(f"tower-{kind}" for kind in TOWER_STEPS),
            "good",
            "look",
            "late",
            "policy",
            "habits",
            "critic",
            "critic-late",
            "export",
        ]
        text = "".join((self.work / f"{stage}.log").read_text(encoding="utf-8") for stage in stages)
        heading = f"# scripts/build_demo.py on {platform.machine()}, transformers {transformers.__version__}\n"
        (POLICY.parent / "build_log.txt").write_text(heading + text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="where unfinished work is kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="begin anew: delete the work folder first")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if options.fresh:
        shutil.rmtree(options.work, ignore_errors=True)
    Build(options.work).run()


if __name__ == "__main__":
    main()

"""Train the demo's policy and critic from scratch and put them, in half precision, into the package.

    python scripts/build_demo.py --work build/demo --threads 2
    python scripts/build_demo.py --work build/rehearsal --rehearse

The stages of what is shipped took 121 minutes together, one by one on shared machines (`align/demo/build_log.txt`).
Finished stages are kept in the work folder and skipped; delete a stage's file to train it again. What every stage
reports is kept beside the checkpoints. A rehearsal goes through every stage with a hundredth of the steps and leaves
the package alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from demo_build.comparisons import Mix, listen
from demo_build.critic import VERDICTS_ONLY, Aims, teach_critic
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
#: The share of faulty answers by task: set so that the policy's samples are right about half of the time.
FAULTS = {"list": 0.6, "count": 0.35, "largest": 0.5, "has": 0.75, "describe": 0.6}
#: Those of a second such model, whose answers the critic learns from.
OTHER_FAULTS = {"list": 0.5, "count": 0.3, "largest": 0.5, "has": 0.85, "describe": 0.5}


@dataclass(frozen=True)
class CriticStage:
    """A stage of the critic: from which stage's weights, how it is taught, and to whose answers it listens."""

    name: str
    start: str
    course: Course
    mix: Mix
    heard: tuple[str, ...]
    num_heard: int
    aims: Aims = VERDICTS_ONLY


#: First to compare at all; then what is learned last; then to know of every word whether it is right, and to prefer a
#: response by as much as it is better, in either order.
CRITIC_STAGES = (
    CriticStage(
        "critic",
        "late",
        Course(num_steps=700, rate=1e-3, tower_rate=2e-4, seed=2, batch_size=14),
        Mix(("list", "count", "largest", "describe"), lookup_share=0.3, bank_share=0.2),
        ("late", "habits"),
        1000,
    ),
    CriticStage(
        "critic-late",
        "critic",
        Course(num_steps=450, rate=1e-3, tower_rate=2e-4, seed=12, batch_size=14),
        Mix(("list", "count", "largest", "largest", "describe"), lookup_share=0.4, bank_share=0.1),
        ("late", "habits"),
        600,
    ),
    CriticStage(
        "critic-merit",
        "critic-late",
        Course(num_steps=1700, rate=1e-3, tower_rate=0.0, seed=31, batch_size=8, num_warmup=30),
        Mix(
            ("list", "list", "count", "largest", "largest", "describe", "describe"),
            lookup_share=0.1,
            bank_share=0.6,
            by_merit=True,
            elsewhere=0.8,
        ),
        ("policy",),
        2000,
        Aims(both_orders=0.25, known=2.0, noise=0.15),
    ),
)
REHEARSED = 0.01


class Build:
    """The stages in order; each leaves a file in `work` and is skipped where the file is.

    `share`: of all steps and questions. `package`: the folder in which both checkpoints are written.
    """

    def __init__(self, work: Path, *, share: float = 1.0, package: Path = POLICY.parent) -> None:
        self.work, self.share, self.package = work, share, package
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build_tokenizer(CRITIC_PROMPT)
        self.maker = RowMaker(self.tokenizer)

    def run(self) -> None:
        for kind, num_steps in TOWER_STEPS.items():
            self.stage(f"tower-{kind}", partial(self.train_tower, kind=kind, num_steps=num_steps))
        self.stage("good", self.train_good)
        self.stage("look", self.train_look)
        self.stage("late", self.train_late)
        self.stage("policy", partial(self.train_faulty, faults=FAULTS))
        self.stage("habits", partial(self.train_faulty, faults=OTHER_FAULTS))
        for stage in CRITIC_STAGES:
            self.stage(stage.name, partial(self.train_critic, stage=stage))
        self.finish()

    def few(self, number: int, least: int = 2) -> int:
        return max(least, round(number * self.share))

    def short(self, course: Course) -> Course:
        return replace(course, num_steps=self.few(course.num_steps))

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

    def train_tower(self, out: Path, log: Log, *, kind: str, num_steps: int) -> None:
        train_tower(kind, out, num_steps=self.few(num_steps), seed=0, log=log)

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
        teach(model, self.maker, self.short(GOOD), log)
        torch.save(model.state_dict(), out)

    def train_look(self, out: Path, log: Log) -> None:
        """The good model learns to look for the digit that a question names."""
        model = open_weights(self.file("good"), self.tokenizer)
        teach_looking(model, self.maker, self.short(LOOK), log)
        torch.save(model.state_dict(), out)

    def train_late(self, out: Path, log: Log) -> None:
        """And then to do everything well."""
        model = open_weights(self.file("look"), self.tokenizer)
        teach(model, self.maker, self.short(LATE), log, asked=ASKED_LATE, verdict_weight=VERDICT_WEIGHT, every=100)
        torch.save(model.state_dict(), out)

    def train_faulty(self, out: Path, log: Log, *, faults: dict[str, float]) -> None:
        """The good model with bad habits."""
        model = open_weights(self.file("late"), self.tokenizer)
        teach(model, self.maker, self.short(POLICY_COURSE), log, faults=faults)
        torch.manual_seed(0)
        sampled = score(model, self.maker, *ask(400, "policy", 7), temperature=0.9, num_samples=4)
        log(f"sampled at temperature 0.9: {sampled}")
        torch.save(model.state_dict(), out)

    def train_critic(self, out: Path, log: Log, *, stage: CriticStage) -> None:
        """A model taught to compare, partly on what real models say; it is watched on what one says elsewhere."""
        policies = [open_weights(self.file(name), self.tokenizer) for name in stage.heard]
        num, watched = (self.few(number, least=50) for number in (stage.num_heard, 200))
        bank = listen(policies, self.maker, num, seed=stage.course.seed + 1, log=log)
        held_out = listen([open_weights(self.file("policy"), self.tokenizer)], self.maker, watched, 4, log, "policy")
        model = open_weights(self.file(stage.start), self.tokenizer)
        teach_critic(
            model,
            self.maker,
            CRITIC_PROMPT,
            self.short(stage.course),
            log,
            mix=stage.mix,
            bank=bank,
            held_out=held_out,
            aims=stage.aims,
        )
        torch.save(model.state_dict(), out)

    def finish(self) -> None:
        """Write both checkpoints into the package, and the log beside them."""
        log = self.log_of("export")
        for name, folder in (("policy", POLICY), (CRITIC_STAGES[-1].name, CRITIC)):
            export(self.file(name), self.package / folder.name, self.tokenizer, log)
        trained = ["good", "look", "late", "policy", "habits", *(stage.name for stage in CRITIC_STAGES)]
        names = [*(f"tower-{kind}" for kind in TOWER_STEPS), *trained, "export"]
        text = "".join((self.work / f"{name}.log").read_text(encoding="utf-8") for name in names)
        heading = f"# scripts/build_demo.py on {platform.machine()}, transformers {transformers.__version__}\n"
        (self.package / "build_log.txt").write_text(heading + text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="where unfinished work is kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="begin anew: delete the work folder first")
    parser.add_argument("--rehearse", action="store_true", help="a hundredth of the steps; the package stays as it is")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if options.fresh:
        shutil.rmtree(options.work, ignore_errors=True)
    started = time.monotonic()
    share = REHEARSED if options.rehearse else 1.0
    package = options.work / "package" if options.rehearse else POLICY.parent
    Build(options.work, share=share, package=package).run()
    print(f"took {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""The table of stages: what each reads and writes, what runs it, what follows it.

Everything that must know a stage reads this table: the loop, `--redo`, status, report, check and the command line. A
new stage is a row here and the file that runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from align.config import Config


@dataclass(frozen=True)
class Stage:
    """One stage of a round; names of files and folders are those in the round's folder."""

    name: str
    # `module:function`, called with the configuration and the round; imported when the stage runs.
    runner: str
    # Complete lines of `per_question` are finished questions; None where a stage has no such file.
    per_question: str | None
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    # What the stage leaves besides: folders, and files that belong to what it wrote.
    leaves: tuple[str, ...] = ()
    # Whether it runs in the processes that `launch:` asks for.
    distributed: bool = True
    # Whether it looks at the first policy too, as round 0.
    first_policy: bool = False
    # Whether a round of this configuration has the stage.
    belongs: Callable[[Config, int], bool] = lambda config, number: True
    # Whether it looks at images, whose contents must then stay as they are (align.run.image_hashes).
    shows_images: bool = True
    # Whether the model card tells of it.
    on_card: bool = False

    def load(self) -> Callable[..., None]:
        """The function that runs the stage."""
        module, _, function = self.runner.partition(":")
        return getattr(import_module(module), function)


def _samples(config: Config, number: int) -> bool:
    return number > 1 or config.pairs_file is None


TABLE = (
    Stage(
        "sample",
        runner="align.stages.sample:run_sample",
        per_question="samples.jsonl",
        reads=(),
        writes=("samples.jsonl",),
        leaves=("samples.left-out.jsonl",),
        belongs=_samples,
    ),
    Stage(
        "score",
        runner="align.stages.score:run_score",
        per_question="scores.jsonl",
        reads=("samples.jsonl",),
        writes=("scores.jsonl", "controls.jsonl"),
        belongs=_samples,
    ),
    Stage(
        "pairs",
        runner="align.stages.pairs:run_pairs",
        per_question=None,
        reads=("samples.jsonl", "scores.jsonl"),
        writes=("pairs.jsonl",),
        distributed=False,
        shows_images=False,
    ),
    Stage(
        "dpo",
        runner="align.dpo.train:run_dpo",
        per_question=None,
        reads=("pairs.jsonl",),
        writes=("reference.safetensors", "reference.json"),
        leaves=("trainer", "checkpoint", "adapter", "lmms-eval.json", "lmms-eval"),
        on_card=True,
    ),
    Stage(
        "evaluate",
        runner="align.evaluation.evaluate:run_evaluate",
        per_question="evaluation.jsonl",
        reads=("checkpoint",),
        writes=(
            "evaluation.json",
            "evaluation.jsonl",
            "log-probs-own.jsonl",
            "log-probs-first.jsonl",
            "other-image-answers.jsonl",
            "log-probs-images.jsonl",
            "comparisons.jsonl",
        ),
        leaves=("evaluation.left-out.jsonl",),
        first_policy=True,
        shows_images=False,
        belongs=lambda config, number: config.evaluate.questions is not None,
        on_card=True,
    ),
)
STAGES = tuple(stage.name for stage in TABLE)


def stage_named(name: str) -> Stage:
    """The row of a stage; KeyError for a name that is none."""
    return {stage.name: stage for stage in TABLE}[name]


def stages_from(name: str) -> tuple[Stage, ...]:
    """A stage and all that follow it in its round.

    >>> [stage.name for stage in stages_from("dpo")]
    ['dpo', 'evaluate']
    """
    return TABLE[STAGES.index(name) :]


def stages_of(config: Config, number: int) -> tuple[Stage, ...]:
    """The stages that a round of this configuration has, in order; of round 0 those that look at the first policy."""
    return tuple(stage for stage in TABLE if stage.belongs(config, number) and (number > 0 or stage.first_policy))


def next_command(config: Config, stage: str, number: int) -> str:
    """What comes after a stage: the next one of its round, the next round, or the report."""
    names = [found.name for found in stages_of(config, number)]
    after = names[names.index(stage) + 1 :] if stage in names else []
    if after:
        return f"align {after[0]} --round {number}"
    following = stages_of(config, number + 1)[0].name
    return f"align {following} --round {number + 1}" if number < config.rounds else "align report"

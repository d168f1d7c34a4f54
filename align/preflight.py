"""A configuration in, every problem that a run of it would meet out, before anything expensive begins.

The checks are the stages' own, called here one after the other, so that all problems stand on one screen. No weight is
loaded and nothing is written. What can be told only by running (memory, the shared prefix) is `align plan`'s and the
first batch's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config import Config
from align.errors import UserError, reward_faults
from align.images import ImageStore
from align.records import IMAGE_TAG, Pair, Question, Record, parse_line, read_questions

SHOWN_LINES = 20
# What a response takes in samples.jsonl and scores.jsonl, for every token.
BYTES_A_TOKEN = 12


@dataclass(frozen=True)
class Problem:
    """What is wrong, in which area, with what to do about it."""

    area: str
    text: str


@dataclass
class Preflight:
    """What was found; `facts` says what is fine."""

    problems: list[Problem] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def text(self) -> str:
        if self.problems:
            return "\n".join(f"{problem.area}: {problem.text}" for problem in self.problems)
        return "\n".join(self.facts)


def run_preflight(config: Config, *, decode: bool = False) -> Preflight:
    """Check everything that can be checked without loading weights; `decode` also decodes every image to its end."""
    found = Preflight()
    areas: dict[str, Callable[[Config, Preflight], None]] = {
        "data": lambda config, found: _data(config, found, decode=decode),
        "evaluation": lambda config, found: _evaluation(config, found, decode=decode),
        "policy": _policy,
        "critic": _critic,
        "pairs": _pairs,
        "dpo": _dpo,
        "launch": _launch,
        "servers": _servers,
        "disk": _disk,
    }
    for area, check in areas.items():
        with _noting(found, area):
            check(config, found)
    return found


@contextlib.contextmanager
def _noting(found: Preflight, area: str) -> Any:
    """Within the context a UserError becomes a problem, once."""
    try:
        yield
    except UserError as error:
        problem = Problem(area, str(error))
        if all(problem.text != other.text for other in found.problems):
            found.problems.append(problem)


def bad_lines(path: Path, kind: type[Record]) -> list[str]:
    """Every line of a JSONL file that is no such record, each with its fault."""
    found = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                parse_line(line, kind, f"{path}:{number}")
            except UserError as error:
                found.append(str(error))
    return found


def _questions(path: Path, found: Preflight, area: str) -> list[Question]:
    """The questions of a file; where lines are bad, all of them are told and there are none."""
    if path.is_file():
        faults = bad_lines(path, Question)
        found.problems += [Problem(area, fault) for fault in faults[:SHOWN_LINES]]
        if len(faults) > SHOWN_LINES:
            found.problems.append(Problem(area, f"{path}: and {len(faults) - SHOWN_LINES} more lines are no questions"))
        if faults:
            return []
    return read_questions(path)


def _data(config: Config, found: Preflight, *, decode: bool) -> None:
    from align.sample import check_images, check_settings

    images = ImageStore(config.question_images, config.max_image_pixels)
    if config.questions is not None:
        questions = _questions(config.questions, found, "data")
        check_images(questions, images)
        if decode:
            _decode({name for question in questions for name in question.images}, images, found)
        check_settings(config)
        found.facts.append(f"{len(questions)} questions with {sum(len(q.images) for q in questions)} images")
    if config.pairs_file is not None:
        from align.data.pairs_file import read_pairs_file

        if not config.pairs_file.is_file():
            raise UserError("no such file", where=str(config.pairs_file), fix="set pairs_file to a JSONL file of pairs")
        faults = bad_lines(config.pairs_file, Pair)
        found.problems += [Problem("data", fault) for fault in faults[:SHOWN_LINES]]
        pairs, counts = read_pairs_file(config.pairs_file, images)
        dropped = {reason: count for reason, count in counts["dropped_pairs"].items() if reason != "no valid pair"}
        if dropped or not pairs:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.items()) or "no valid pair"
            raise UserError(
                f"{counts['questions'] - len(pairs)} of {counts['questions']} pairs would be left out: {reasons}",
                where=str(config.pairs_file),
                fix="convert your data with `align data`, and check image_root",
            )
        found.facts.append(f"{len(pairs)} pairs")


def _decode(names: set[str], images: ImageStore, found: Preflight) -> None:
    for name in sorted(names):
        with _noting(found, "data"):
            images.open(name)


def _evaluation(config: Config, found: Preflight, *, decode: bool) -> None:
    if config.evaluate.questions is None:
        found.facts.append("no held-out questions: nothing will be evaluated (evaluate.questions)")
        return
    from align.evaluate import check_overlap
    from align.sample import check_images

    questions = _questions(config.evaluate.questions, found, "evaluation")[: config.evaluate.limit]
    images = ImageStore(config.evaluation_images, config.max_image_pixels)
    with _noting(found, "evaluation"):
        check_images(questions, images)
        if decode:
            _decode({name for question in questions for name in question.images}, images, found)
    if config.questions is None or (config.questions.is_file() and not bad_lines(config.questions, Question)):
        check_overlap(config, questions)
    found.facts.append(f"{len(questions)} held-out questions")


def _policy(config: Config, found: Preflight) -> None:
    from align.models.load import check_checkpoint, load_processor
    from align.models.placement import pick_device, pick_dtype

    with _noting(found, "device"):
        device = pick_device(config.model.device)
        found.facts.append(
            f"device {device}, arithmetic {pick_dtype(config.model.dtype, device)}".replace("torch.", "")
        )
    check_checkpoint(config.policy, allow_pickle=config.model.allow_pickle)
    processor = load_processor(config.policy, **config.model.processor)
    found.facts.append(f"policy {config.policy}")
    _check_template(processor, config)


def _check_template(processor: Any, config: Config) -> None:
    """The chat template must write a question, and say where its images stand."""
    from align.dpo.texts import structured

    question = Question(id="check", question=f"{IMAGE_TAG}What is shown?", images=["image"])
    try:
        text = processor.apply_chat_template(
            structured(question.messages()), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        # Templates are programs: whatever they raise is the folder's fault.
        raise UserError(
            f"the chat template cannot be used: {error}", where=config.policy, fix="check chat_template in the folder"
        ) from None
    if "What is shown?" not in text:
        raise UserError(
            "the chat template does not write the question",
            where=config.policy,
            fix="check chat_template in the folder",
        )


def _critic(config: Config, found: Preflight) -> None:
    if config.questions is None:
        return
    from align.engines.critics import plan_critic
    from align.models.load import check_checkpoint, load_processor
    from reward.trust import check_gates

    with _noting(found, "critic"), reward_faults():
        check_gates(config.critic.gates)
    plan = plan_critic(config)
    for model in [*plan.shared, *plan.own.values()]:
        if model.servers:
            continue
        with _noting(found, "critic"):
            if model.need == "scorer":
                if not Path(model.checkpoint).exists() and model.checkpoint.count("/") != 1:
                    raise UserError("there is no such folder", where=model.checkpoint, fix="check critic.model")
                continue
            check_checkpoint(model.checkpoint, allow_pickle=config.model.allow_pickle)
            load_processor(model.checkpoint, **model.processor)
    found.facts.append(f"critic {plan.kind}" + (f", {config.critic.model}" if config.critic.model else ""))


def _pairs(config: Config, found: Preflight) -> None:
    from align.pairs import pair_settings

    pair_settings(config)


def _dpo(config: Config, found: Preflight) -> None:
    import torch

    from align.dpo.parts import freeze_parts
    from align.dpo.settings import training_arguments
    from align.dpo.strategies import whole_models
    from align.dpo.train import lora_config, training_dtype
    from align.info import empty_model
    from align.models.placement import pick_device

    device = torch.device("cpu")
    with contextlib.suppress(UserError):
        device = pick_device(config.model.device)
    with _noting(found, "dpo"), tempfile.TemporaryDirectory() as folder, whole_models():
        training_arguments(config, Path(folder), device, training_dtype(config.model.dtype))
    with _noting(found, "dpo"):
        lora_config(config.dpo.lora, config.dpo.freeze)
    if config.dpo.freeze and config.dpo.lora is None and all(p.area != "policy" for p in found.problems):
        freeze_parts(empty_model(config.policy), config.dpo.freeze)


def _launch(config: Config, found: Preflight) -> None:
    import torch

    from align.dpo.strategies import check_strategy
    from align.launch import launch_command

    launch = config.launch
    with _noting(found, "launch"):
        launch_command(launch, [])
    if launch.machine_rank >= launch.num_machines:
        raise UserError(
            f"launch.machine_rank is {launch.machine_rank} of {launch.num_machines} machines",
            fix="ranks count from 0 to launch.num_machines - 1",
        )
    gpus = torch.cuda.device_count()
    device = torch.device("cuda" if gpus and config.model.device != "cpu" else "cpu")
    if device.type == "cuda" and launch.num_processes > gpus:
        raise UserError(
            f"launch.num_processes is {launch.num_processes}, but {gpus} GPUs are visible",
            fix="set it to the number of GPUs, or check CUDA_VISIBLE_DEVICES",
        )
    if launch.num_processes * launch.num_machines > 1:
        check_strategy(launch.strategy, device)
    found.facts.append(f"{launch.num_processes * launch.num_machines} processes, {launch.strategy}")


def _servers(config: Config, found: Preflight) -> None:
    from align.engines.open import named_for_round, open_servers

    images = ImageStore(config.question_images, config.max_image_pixels)
    named = {
        "sample.servers": (config.sample.servers, config.policy, 0),
        "critic.servers": (config.critic.servers, config.critic.model, None),
        "evaluate.servers": (config.evaluate.servers, config.policy, 0),
    }
    for name, (servers, checkpoint, made_in_round) in named.items():
        if not servers:
            continue
        with _noting(found, name):
            if made_in_round is not None and config.rounds > 1:
                # Later rounds must be told apart by their names.
                named_for_round(servers, 1)
            open_servers(servers, checkpoint, config.server, open_image=images.open, made_in_round=made_in_round)
            found.facts.append(f"{name}: {len(servers)} answer")


def _disk(config: Config, found: Preflight) -> None:
    place = config.run_dir
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError("nothing can be written there", where=str(place), fix="check the permissions, or set run_root")
    needed, free = needed_bytes(config), shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"the run needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free",
            where=str(place),
            fix="make room, lower rounds, or set run_root to another disk",
        )
    found.facts.append(f"{needed / 2**30:.1f} GiB needed of {free / 2**30:.1f} GiB free in {place}")


def needed_bytes(config: Config) -> int:
    """What the run writes at most: a checkpoint a round, one intermediate state with optimiser, samples and scores.

    The intermediate state holds weights and Adam's two moments in fp32, 12 bytes a weight; a second one is written
    before the first is removed.
    """
    from align.models.weights import tensor_table

    table: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        table = tensor_table(Path(config.policy)) if Path(config.policy).is_dir() else {}
    stored = sum(tensor.num_bytes for tensor in table.values())
    weights = sum(_size(tensor.shape) for tensor in table.values())
    questions = 0
    if config.questions is not None and config.questions.is_file():
        with config.questions.open("rb") as file:
            questions = sum(1 for _ in file)
    sampled = questions * config.sample.num_responses * config.sample.max_new_tokens * BYTES_A_TOKEN
    return config.rounds * (stored + sampled) + 2 * 12 * weights


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size

"""A configuration in, every problem that a run of it would meet out, before anything expensive begins.

The checks are the stages' own, called here one after the other, so that all problems stand on one screen. No weight is
loaded and nothing is written. What shows only by running (memory, the shared prefix) is `align plan`'s and the
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
from typing import TYPE_CHECKING, Any

from align import accelerator
from align.config import Config
from align.errors import UserError, reward_faults
from align.media.decoding import Header
from align.media.images import ImageStore, evaluation_images, question_images, treatment_counts
from align.records import Pair, Question, Record, parse_line, read_questions
from align.sources import questions_of_round, read_all_questions
from reward.judge_model import BranchedPrompt

if TYPE_CHECKING:
    from transformers import ProcessorMixin

SHOWN_LINES = 20
# So many questions, with the most text and images, are held against the limit of tokens.
LONGEST = 64
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
        """What a person reads: every problem, or what is fine."""
        if self.problems:
            return "\n".join(f"{problem.area}: {problem.text}" for problem in self.problems)
        return "\n".join(["no problems found", *(f"  {fact}" for fact in self.facts)])


def run_preflight(config: Config, *, decode: bool = False) -> Preflight:
    """Check everything that can be checked without loading weights; `decode` also decodes every image to its end."""
    found = Preflight()
    areas: dict[str, Callable[[Config, Preflight], None]] = {
        "data": lambda config, found: _data(config, found, decode=decode),
        "evaluation": lambda config, found: _evaluation(config, found, decode=decode),
        "policy": _policy,
        "critic": _critic,
        "dpo": _dpo,
        "hub": _hub,
        "launch": _launch,
        "servers": _servers,
        "engines": _engines,
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
    """The questions of a file; where lines are bad, all of them are reported and there are none."""
    if path.is_file():
        faults = bad_lines(path, Question)
        found.problems += [Problem(area, fault) for fault in faults[:SHOWN_LINES]]
        if len(faults) > SHOWN_LINES:
            found.problems.append(Problem(area, f"{path}: and {len(faults) - SHOWN_LINES} more lines are no questions"))
        if faults:
            return []
    return read_questions(path)


def _readable(config: Config) -> bool:
    """Whether every file of questions is there and holds nothing else."""
    return all(source.file.is_file() and not bad_lines(source.file, Question) for source in config.sources)


def _data(config: Config, found: Preflight, *, decode: bool) -> None:
    from align.stages.sample import check_images, check_settings

    images = question_images(config)
    if config.questions is not None:
        for source in config.sources:
            _questions(source.file, found, "data")
        questions = []
        if _readable(config):
            questions = read_all_questions(config)
            questions_of_round(config, 1)
        headers = check_images(questions, images)
        if decode:
            _decode({name for question in questions for name in question.images}, images, found)
        found.facts += [f"{count} of {len(headers)} images are {what}" for what, count in _treated(headers)]
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


def _treated(headers: dict[str, Header]) -> list[tuple[str, int]]:
    """What is done to images beyond decoding them, and to how many."""
    return treatment_counts(headers.values()).most_common()


def _decode(names: set[str], images: ImageStore, found: Preflight) -> None:
    for name in sorted(names):
        with _noting(found, "data"):
            images.open(name)


def _evaluation(config: Config, found: Preflight, *, decode: bool) -> None:
    if config.evaluate.questions is None:
        found.facts.append("no held-out questions: nothing will be evaluated (evaluate.questions)")
        return
    from align.evaluation.evaluate import check_overlap
    from align.evaluation.gates import check_gate_names
    from align.evaluation.split import part_notes, split_of
    from align.stages.sample import check_images

    with _noting(found, "evaluation"):
        check_gate_names(config.evaluate.gates)
    questions = _questions(config.evaluate.questions, found, "evaluation")[: config.evaluate.limit]
    images = evaluation_images(config)
    with _noting(found, "evaluation"):
        check_images(questions, images)
        if decode:
            _decode({name for question in questions for name in question.images}, images, found)
    if _readable(config):
        check_overlap(config, questions)
    found.facts.append(f"{len(questions)} held-out questions")
    if questions:
        deciding = split_of(config, questions)
        if deciding is not None:
            found.facts += part_notes(len(deciding), len(questions) - len(deciding)).values()
        _metric_to_choose_by(config, questions)


def _metric_to_choose_by(config: Config, questions: list[Question]) -> None:
    """Raise UserError where the metric that is to choose cannot be measured on these questions."""
    from align.evaluation.selection import can_measure

    if config.evaluate.select == "best" or config.evaluate.select_metric != "auto":
        can_measure(config, questions)


def _policy(config: Config, found: Preflight) -> None:
    from align.engines.prompts import check_prompts
    from align.models.device import pick_device, pick_dtype
    from align.models.load import load_processor

    with _noting(found, "device"):
        device = pick_device(config.model.device)
        found.facts.append(
            f"device {device}, arithmetic {pick_dtype(config.model.dtype, device)}".replace("torch.", "")
        )
    _open_without_weights(config.policy, config)
    processor = load_processor(config.policy, **config.model.processor)
    found.facts.append(f"policy {config.policy}")
    check_prompts(processor, config.policy)
    if all(problem.area != "data" for problem in found.problems):
        _check_limit(processor, config)


def _open_without_weights(checkpoint: str, config: Config) -> None:
    """Load a checkpoint onto torch's meta device: names and shapes are held against config.json, no tensor is read."""
    from align.models.load import check_checkpoint, load_model
    from align.models.weights import weight_files

    check_checkpoint(checkpoint, allow_pickle=config.model.allow_pickle)
    if Path(checkpoint).is_dir() and weight_files(Path(checkpoint)):
        load_model(checkpoint, device="meta", attn_implementation=config.model.attention)


def _check_limit(processor: ProcessorMixin, config: Config) -> None:
    """The questions with the longest texts must leave room for a response; all are counted by `align plan`."""
    from align.models.limits import position_limit
    from align.models.load import read_config
    from align.plan.prompt_sizes import PromptMeter

    limit = config.dpo.max_length or position_limit(read_config(config.policy))
    if config.questions is None or limit is None or not all(source.file.is_file() for source in config.sources):
        return
    images = question_images(config)
    meter = PromptMeter(processor, images)
    longest = sorted(read_all_questions(config), key=lambda q: -len(q.question) - 1000 * len(q.images))[:LONGEST]
    # Videos are counted by `align plan`, which picks their frames.
    sizes = [meter.size(q.id, q.messages(), q.images) for q in longest if q.video is None]
    too_long = [size for size in sizes if size.tokens >= limit]
    if too_long and config.dpo.on_too_long != "drop":
        worst = max(too_long, key=lambda size: size.tokens)
        raise UserError(
            f"{len(too_long)} of the {len(sizes)} longest questions do not fit in {limit} tokens, and nothing is "
            f"truncated: {worst.id} has {worst.tokens}",
            where=", ".join(str(source.file) for source in config.sources),
            fix="raise dpo.max_length, lower model.processor.max_pixels, or set dpo.on_too_long: drop",
        )


def _hub(config: Config, found: Preflight) -> None:
    if config.hub.repo is not None:
        from align.hub.push import check_name

        with _noting(found, "hub"):
            check_name(config.hub.repo)


def _critic(config: Config, found: Preflight) -> None:
    if config.questions is None:
        return
    from align.engines.judge import plan_critic
    from align.engines.prompts import Prompter, check_prompts
    from align.models.load import load_processor
    from reward.reliability import check_gates

    with _noting(found, "critic"), reward_faults():
        check_gates(config.critic.gates)
    plan = plan_critic(config)
    images = question_images(config)
    for model in [*plan.shared, *plan.own.values()]:
        if model.servers:
            continue
        with _noting(found, "critic"):
            if model.need == "scorer":
                _check_scorer(model.checkpoint)
                continue
            if model.checkpoint != config.policy:
                _open_without_weights(model.checkpoint, config)
            processor = load_processor(model.checkpoint, **model.processor)
            check_prompts(processor, model.checkpoint)
            # As every critic asks: a text with branches, cut where they begin.
            Prompter(processor, images.open).build_tree(
                BranchedPrompt((None,), None, "Which? ", (("a",), ("b",)), " Say.", ())
            )
    _check_answers(config)
    found.facts.append(f"critic {plan.kind}" + (f", {config.critic.model}" if config.critic.model else ""))


def _check_scorer(checkpoint: str) -> None:
    """A reward model's folder has a config and whole weights."""
    from align.models.files import read_json
    from align.models.weights import tensor_table, weight_files

    folder = Path(checkpoint)
    if not folder.exists() and checkpoint.count("/") == 1:
        return
    if not folder.is_dir():
        raise UserError("there is no such folder", where=checkpoint, fix="check critic.model")
    if not (folder / "config.json").is_file() or not weight_files(folder):
        raise UserError("no model files in the folder", where=checkpoint, fix="check critic.model")
    read_json(folder / "config.json")
    tensor_table(folder)


def _check_answers(config: Config) -> None:
    """A verifier needs reference answers."""
    if config.critic.kind != "verifier" or config.questions is None or not _readable(config):
        return
    if all(question.answer is None for question in read_all_questions(config)):
        raise UserError(
            "the verifier needs answers, and there is no reference answer in any question",
            where=", ".join(str(source.file) for source in config.sources),
            fix="add `answer` to the questions, or use another critic.kind",
        )


def _dpo(config: Config, found: Preflight) -> None:
    import torch

    from align.data.pairs_file import read_pairs_file
    from align.dpo.check import check_pairs, check_trained
    from align.dpo.optimizers import check_rounding
    from align.dpo.qlora import quantization
    from align.dpo.settings import training_arguments, training_fields
    from align.dpo.sharding.strategies import unsharded_models
    from align.dpo.train import training_dtype
    from align.dpo.turns import turn_faults
    from align.models.device import pick_device
    from align.models.load import load_processor
    from align.models.lora import lora_config

    device = torch.device("cpu")
    with contextlib.suppress(UserError):
        device = pick_device(config.model.device)
    with _noting(found, "dpo"), tempfile.TemporaryDirectory() as folder, unsharded_models():
        dtype = training_dtype(config.model.dtype)
        fields = training_fields(config, Path(folder), device, dtype)
        training_arguments(fields)
        strategy = config.launch.strategy if config.launch.num_processes * config.launch.num_machines > 1 else "ddp"
        lost = check_rounding(fields, dtype, adapter=config.dpo.lora is not None, strategy=strategy)
        found.facts += [f"careful: {lost}"] if lost else []
    with _noting(found, "dpo"):
        quantization(config.dpo.lora, device, config.launch.strategy)
    with _noting(found, "dpo"):
        lora_config(config.dpo.lora)
    if all(problem.area != "policy" for problem in found.problems):
        check_trained(config, config.policy)
        processor = load_processor(config.policy, **config.model.processor)
        found.facts += [f"careful: {fault}" for fault in turn_faults(processor, config.policy)]
        if config.pairs_file is not None and all(problem.area != "data" for problem in found.problems):
            images = question_images(config)
            dropped = check_pairs(config, read_pairs_file(config.pairs_file, images)[0], processor, images)
            found.facts += [f"careful: {count} pairs will be left out: {why}" for why, count in dropped.items()]


def _launch(config: Config, found: Preflight) -> None:
    import torch

    from align.distributed.launch import launch_command
    from align.dpo.sharding.strategies import check_strategy

    launch = config.launch
    with _noting(found, "launch"):
        launch_command(launch, [])
    if launch.machine_rank >= launch.num_machines:
        raise UserError(
            f"launch.machine_rank is {launch.machine_rank} of {launch.num_machines} machines",
            fix="ranks count from 0 to launch.num_machines - 1",
        )
    gpus = accelerator.count()
    device = torch.device(accelerator.kind() if config.model.device != "cpu" else "cpu")
    if device.type != "cpu" and launch.num_processes > gpus:
        raise UserError(
            f"launch.num_processes is {launch.num_processes}, but {gpus} GPUs are visible",
            fix="set it to the number of GPUs, or check CUDA_VISIBLE_DEVICES",
        )
    if launch.num_processes * launch.num_machines > 1:
        check_strategy(launch.strategy, device)
    found.facts.append(f"{launch.num_processes * launch.num_machines} processes, {launch.strategy}")


def _servers(config: Config, found: Preflight) -> None:
    from align.engines.open import named_for_round, open_servers

    images = question_images(config)
    named = {
        "sample.servers": (config.sample.servers, config.policy, 0),
        "critic.servers": (config.critic.servers, config.critic.model, None),
        "evaluate.servers": (config.evaluate.servers, config.policy, 0),
        "evaluate.first_policy_servers": (config.evaluate.first_policy_servers, config.policy, 0),
    }
    for name, (servers, checkpoint, made_in_round) in named.items():
        if not servers:
            continue
        with _noting(found, name):
            if made_in_round is not None and config.rounds > 1 and name != "evaluate.first_policy_servers":
                # Later rounds must be distinguished by their names.
                named_for_round(servers, 1)
            open_servers(servers, checkpoint, config.server, open_image=images.open, made_in_round=made_in_round)
            found.facts.append(f"{name}: {len(servers)} answer")


def _engines(config: Config, found: Preflight) -> None:
    """What answers for each stage that names no servers; vLLM, where it is asked for, must be able to."""
    from align.engines.judge import plan_critic
    from align.engines.vllm.hosting import check_family, choose
    from align.models.load import load_processor

    asked: dict[str, tuple[str, str, dict[str, Any]]] = {}
    if config.questions is not None:
        if not config.sample.servers:
            asked["sample.engine"] = (config.sample.engine, config.policy, config.model.processor)
        with contextlib.suppress(UserError):
            plan = plan_critic(config)
            models = [*plan.shared, *plan.own.values()]
            if len(models) == 1 and models[0].need == "judge_model" and not models[0].servers:
                asked["critic.engine"] = (config.critic.engine, models[0].checkpoint, models[0].processor)
    if config.evaluate.questions is not None and not config.evaluate.servers:
        asked["evaluate.engine"] = (config.evaluate.engine, config.policy, config.model.processor)
    for name, (engine, checkpoint, processor) in asked.items():
        with _noting(found, name):
            use, why = choose(engine, checkpoint, config.vllm)
            if use:
                check_family(checkpoint, load_processor(checkpoint, **processor))
            found.facts.append(f"{name}: {why}")


def _disk(config: Config, found: Preflight) -> None:
    place = config.run_dir
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError("nothing can be written there", where=str(place), fix="check the permissions, or set run_root")
    needed, free = needed_bytes(config), shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"the run needs about {_gib(needed)} (a checkpoint a round) and {_gib(free)} are free",
            where=str(place),
            fix="make room, lower rounds, or set run_root to another disk",
        )
    found.facts.append(f"about {_gib(needed)} will be written; {_gib(free)} are free in {place}")


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
    for source in config.sources:
        if source.file.is_file():
            with source.file.open("rb") as file:
                questions += sum(1 for _ in file)
    sampled = questions * config.sample.num_responses * config.sample.max_new_tokens * BYTES_A_TOKEN
    # An adapter's states are small beside the checkpoint that it is merged into.
    states = 0 if config.dpo.lora else 2 * 12 * weights
    return config.rounds * (stored + sampled) + states


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"

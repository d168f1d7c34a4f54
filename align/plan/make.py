"""A configuration and its real questions in; tokens, memory by part and strategy, time of every stage and what does not
fit out.

Works from config.json, the model's shapes on torch's meta device and the headers of images: no weight is loaded, no
picture decoded. The memory model is `align.dpo.step_memory`,
the model of time `align.plan.speed` and `align.plan.times`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from align.config import Config
from align.dpo.optimizers import ROUNDING, ROUNDING_ARGUMENT, is_known, rounds_at_random
from align.dpo.rows import by_question, rows_of
from align.dpo.settings import AUTO
from align.dpo.step_memory import (
    STRATEGIES,
    USABLE,
    How,
    Memory,
    StepBatch,
    in_pieces,
    inference_memory,
    least_recomputation,
    training_memory,
)
from align.errors import UserError
from align.media.images import question_images
from align.models.lora import is_quantised
from align.models.meta import model_to_train
from align.models.shapes import ModelShape, model_shape
from align.plan.prompt_sizes import PromptMeter, PromptSize, patch_size
from align.plan.speed import Machine, Speed
from align.plan.stages import Lengths, StageCost, StagePlanner, branches_of_row
from align.records import Pair, read_jsonl
from align.sources import read_all_questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESPONSE_TOKENS = 200
# Weights of two bytes that still move, and what is proposed where nothing else fits.
ROUNDED = ("model.dtype=bfloat16", f"dpo.optim={ROUNDING[0]}", f"dpo.optim_args={ROUNDING_ARGUMENT}=True")
ADAPTER = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Fit:
    """A strategy's memory in each process at the peak of training, and whether it fits."""

    strategy: str
    memory: Memory
    fits: bool


@dataclass(frozen=True)
class Whole:
    """What stands whole on one GPU outside of training: `name` says for what."""

    name: str
    memory: Memory
    fits: bool


@dataclass(frozen=True)
class Change:
    """Settings with which training fits, and the memory that it takes then."""

    settings: str
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """All that `align plan` shows.

    `never_fit`: ids of questions whose prompt alone passes `limit`; `too_long`: of those that pass it with the longest
    response. `changes`: the cheapest settings with which training fits; none where it does, or nothing helps.
    """

    sizes: list[PromptSize]
    response_limit: int
    limit: int | None
    never_fit: list[str]
    too_long: list[str]
    drops: bool
    strategy: str
    fits: list[Fit]
    whole: list[Whole]
    changes: list[Change]
    machine: Machine
    stages: list[StageCost]
    rounds: int
    parameters: dict[str, int]
    trained: int
    active: int
    assumptions: list[str] = field(default_factory=list)

    @property
    def possible(self) -> list[Fit]:
        """The strategies that fit."""
        return [fit for fit in self.fits if fit.fits]

    @property
    def configured(self) -> Fit:
        """The strategy that the configuration names."""
        return next((fit for fit in self.fits if fit.strategy == self.strategy), self.fits[0])

    @property
    def seconds(self) -> dict[str, float]:
        """Of one round, by stage, on all GPUs together."""
        return {stage.name: stage.seconds for stage in self.stages}

    @property
    def gpu_hours(self) -> float:
        """Of all rounds together."""
        return sum(stage.seconds * stage.runs for stage in self.stages) * self.machine.gpus / 3600

    def as_dict(self) -> dict[str, Any]:
        """For machines: bytes, seconds, tokens, ids; the sizes of prompts in full."""
        return asdict(self) | {"gpu_hours": self.gpu_hours, "usable_bytes": self.machine.usable_bytes}


def make_plan(config: Config, machine: Machine, *, response_tokens: int = RESPONSE_TOKENS) -> Plan:
    """Plan a run of this configuration.

    Raises:
        UserError: the checkpoint, its processor, a question or an image cannot be used.
    """
    from align.models.limits import position_limit
    from align.models.load import load_processor, read_config

    processor = load_processor(config.policy, **config.model.processor)
    model = model_to_train(config.policy, config.dpo.lora, config.dpo.freeze)
    shape, (in_training, shared, why) = model_shape(model), sharing(config, model)
    meter = PromptMeter(processor, question_images(config), patch_size(model))
    sizes, lengths = _prompts(config, meter, response_tokens, shared=in_training)
    batch = _largest_batch(config, sizes, lengths, shared=in_training)
    how = training_how(config, machine, shared=in_training)
    how = _with_least_recomputation(config, shape, batch, how, machine)
    # There is nothing to spread on one GPU, and four bits are not spread.
    strategies = ("ddp",) if how.quantised or machine.gpus == 1 else STRATEGIES
    ways = (
        _with_least_recomputation(config, shape, batch, replace(how, strategy=strategy), machine)
        for strategy in strategies
    )
    fits = [_fit(shape, batch, way, machine) for way in ways]
    limit = config.dpo.max_length or position_limit(read_config(config.policy))
    speed = Speed(shape, machine, how.compute_bytes)
    planner = StagePlanner(config, speed, sizes, lengths, how, shared=shared, processor=processor)
    stages = planner.stages()
    chosen = next((fit for fit in fits if fit.strategy == config.launch.strategy), fits[0])
    changes = Changes(config, shape, batch, replace(how, strategy=chosen.strategy), machine)
    return Plan(
        sizes=sizes,
        response_limit=max(lengths.longest),
        limit=limit,
        never_fit=[size.id for size in sizes if limit is not None and size.tokens >= limit],
        too_long=[
            size.id
            for size, longest in zip(sizes, lengths.longest, strict=True)
            if limit is not None and size.tokens < limit < size.tokens + longest
        ],
        drops=config.dpo.on_too_long == "drop",
        strategy=chosen.strategy,
        fits=fits,
        whole=_whole(config, shape, batch, how, machine, planner),
        changes=[] if chosen.fits else changes.found(),
        machine=machine,
        stages=stages,
        rounds=config.rounds,
        parameters=shape.parts,
        trained=shape.trained,
        active=round(shape.active_weights),
        assumptions=[*_assumptions(config, machine, how, lengths, shape), *why, *planner.notes],
    )


def sharing(config: Config, model: PreTrainedModel) -> tuple[bool, bool, list[str]]:
    """Whether prompts are expected to be shared in training, and elsewhere; a note where they are not,
    though asked for."""
    from align.models.inspect import expected_shared_prefix

    if config.shared_prefix == "off":
        return False, False, []
    expected = expected_shared_prefix(model)
    if not expected.startswith("expected"):
        return False, False, [f"no shared prompts: {expected[4:]}"]
    text = model.config.get_text_config()
    if getattr(text, "router_aux_loss_coef", 0.0) and hasattr(text, "output_router_logits"):
        reason = "the load-balancing loss of experts is not defined on them"
        return False, True, [f"no shared prompts in training: {reason}"]
    return True, True, []


def training_how(config: Config, machine: Machine, *, shared: bool = True) -> How:
    """How the configuration trains on GPUs: float32 weights with bfloat16 arithmetic by default."""
    fields = config.dpo.trainer_fields()
    weight_bytes = 4 if config.model.dtype in ("auto", "float32") else 2
    return How(
        strategy=config.launch.strategy,
        num_processes=machine.gpus,
        weight_bytes=weight_bytes,
        compute_bytes=2 if fields.get("bf16", True) or fields.get("fp16") else weight_bytes,
        checkpointing=bool(_checkpointing(config)),
        shared=shared,
        accumulates=int(fields.get("gradient_accumulation_steps", 8)) > 1,
        repeated_keys=not shared,
        second_model=config.dpo.reference == "live" and config.dpo.lora is None,
        quantised=is_quantised(config.dpo.lora),
        dropout=fields.get("disable_dropout") is False,
        optimizer=str(fields.get("optim", "adamw_torch")),
    )


def _checkpointing(config: Config) -> bool | str:
    fields = config.dpo.trainer_fields()
    return fields.get("gradient_checkpointing", fields.get("activation_checkpointing", AUTO))


def _with_least_recomputation(config: Config, shape: ModelShape, batch: StepBatch, how: How, machine: Machine) -> How:
    """The same training with what `dpo.gradient_checkpointing: auto` makes of it on this machine."""
    if _checkpointing(config) != AUTO:
        return how
    return least_recomputation(shape, batch, how, machine.usable_bytes)


class Changes:
    """What would make training fit on this machine, the cheapest first."""

    def __init__(self, config: Config, shape: ModelShape, batch: StepBatch, how: How, machine: Machine) -> None:
        self.config, self.shape, self.batch, self.how, self.machine = config, shape, batch, how, machine
        self.recompute = [] if how.checkpointing else ["dpo.gradient_checkpointing=true"]
        self.one = ["dpo.per_device_train_batch_size=1"] if batch.num_rows > 1 else []
        self.least = replace(how, checkpointing=True)

    def found(self) -> list[Change]:
        """One change that leaves what is trained as it is; else one that does not, and one that takes more GPUs."""
        same = self._first(self._of_layout())
        if same is not None:
            return [same]
        return [change for change in (self._first(self._of_training()), self._first(self._of_gpus())) if change]

    def _first(self, tries: Iterator[Change]) -> Change | None:
        return next((change for change in tries if change.memory.total <= self.machine.usable_bytes), None)

    def _try(self, settings: list[str], how: How, *, shape: ModelShape | None = None, single: bool = True) -> Change:
        batch = one_row(self.batch) if single else self.batch
        memory = training_memory(shape or self.shape, batch, how)
        named = f"launch.strategy={how.strategy}"
        moved = [named] if how.strategy != self.how.strategy else []
        return Change(", ".join([*settings, *moved]), memory)

    @property
    def _spread(self) -> tuple[str, ...]:
        return ("zero2", "zero3", "fsdp2") if self.machine.gpus > 1 and not self.how.quantised else ()

    def _of_layout(self) -> Iterator[Change]:
        for strategy in self._spread:
            yield self._try([], replace(self.how, strategy=strategy), single=False)
        yield self._try(self.recompute, self.least, single=False)
        for strategy in (self.how.strategy, *self._spread):
            yield self._try([*self.one, *self.recompute], replace(self.least, strategy=strategy))
        if self.config.dpo.lora is None and not rounds_at_random(self.config.dpo.trainer_fields()):
            small = replace(self.least, weight_bytes=2, optimizer=ROUNDING[0])
            yield self._try([*ROUNDED, *self.one, *self.recompute], small)

    def _of_training(self) -> Iterator[Change]:
        config, rest = self.config, [*self.one, *self.recompute]
        if config.dpo.lora is None and "vision" not in config.dpo.freeze:
            frozen = [*config.dpo.freeze, "vision"]
            shape = model_shape(model_to_train(config.policy, None, frozen))
            for strategy in (self.how.strategy, *self._spread):
                how = replace(self.least, strategy=strategy)
                yield self._try([f"dpo.freeze=[{','.join(frozen)}]", *rest], how, shape=shape)
        lora = [f"dpo.lora={{r: {ADAPTER['r']}, target_modules: [...]}}"] if config.dpo.lora is None else []
        if lora and config.dpo.freeze != ["vision"]:
            lora.append("dpo.freeze=[vision]")
        frozen = ["vision"] if lora else config.dpo.freeze
        adapted = model_shape(model_to_train(config.policy, config.dpo.lora or ADAPTER, frozen))
        half = ["model.dtype=bfloat16"] if self.how.weight_bytes > 2 else []
        if lora:
            yield self._try([*lora, *rest], self.least, shape=adapted)
        yield self._try([*lora, *half, *rest], replace(self.least, weight_bytes=2), shape=adapted)
        if not self.how.quantised:
            four = replace(self.least, weight_bytes=2, quantised=True, strategy="ddp")
            yield self._try([*lora, "dpo.lora.quantize=nf4", *half, *rest], four, shape=adapted)

    def _of_gpus(self) -> Iterator[Change]:
        for gpus in () if self.how.quantised else (self.machine.gpus * factor for factor in (2, 4, 8, 16)):
            how = replace(self.least, strategy="zero3", num_processes=gpus)
            yield self._try([f"{gpus} GPUs", *self.one, *self.recompute], how)


def one_row(batch: StepBatch) -> StepBatch:
    """One pair of the batch."""
    rows = batch.num_rows
    return replace(batch, num_rows=1, patches=batch.patches // rows, pixels=batch.pixels // rows)


def _prompts(
    config: Config, meter: PromptMeter, response_tokens: int, *, shared: bool
) -> tuple[list[PromptSize], Lengths]:
    """Every prompt of the data, and how long the responses to it are: known of pairs, else what the settings say.

    Of given pairs there is one for each row of training.
    """
    if config.questions is not None:
        from align.models.video_questions import pick_frames

        questions = pick_frames(
            read_all_questions(config), meter.images, config, config.policy, served=bool(config.sample.servers)
        )
        sizes = [meter.size(question.id, question.messages(), question.images) for question in questions]
        longest = config.sample.max_new_tokens
        mean = min(response_tokens, longest)
        return sizes, Lengths(mean, mean, [longest] * len(sizes), [longest] * len(sizes))
    from align.dpo.tokenize import tokenize_pairs

    assert config.pairs_file is not None
    given = {pair.id: pair for pair in read_jsonl(config.pairs_file, Pair)}
    if not given:
        raise UserError("no pairs in the file", where=str(config.pairs_file))
    pairs = tokenize_pairs(given.values(), meter.processor, meter.images).pairs
    whole_questions = config.dpo.rows == "question" and shared
    groups = [[pairs[i] for i in g] for g in by_question(pairs)] if whole_questions else [[pair] for pair in pairs]
    sizes = [meter.size(group[0].id, given[group[0].id].prompt, group[0].image_files) for group in groups]
    rows = [rows_of(group, config.dpo.rows if shared else "pair")[0][0] for group in groups]
    longest_of = [max(map(len, row.branches)) for row in rows]
    sums = [sum(map(len, row.branches)) for row in rows]
    count = len(rows)
    if whole_questions:
        half, branches = sum(sums) / count / 2, sum(len(row.branches) for row in rows) / count
        return sizes, Lengths(half, half, longest_of, sums, branches)
    chosen, rejected = (sum(len(row.branches[side]) for row in rows) / count for side in range(2))
    return sizes, Lengths(chosen, rejected, longest_of, sums)


def _largest_batch(config: Config, sizes: Sequence[PromptSize], lengths: Lengths, *, shared: bool) -> StepBatch:
    """A batch of the row that has the most tokens; of a budget, as many of them as it allows."""
    rows = int(config.dpo.trainer_fields().get("per_device_train_batch_size", 1))
    copies = 1 if config.dpo.image_preference is None else 2
    place = max(range(len(sizes)), key=lambda i: sizes[i].tokens + lengths.both[i])
    size, half = sizes[place], lengths.longest[place]
    if config.dpo.rows == "question" and shared:
        branches = branches_of_row(config, lengths, shared=shared)
        responses = lengths.both[place] if config.questions is None else round(branches * half)
        half = math.ceil(responses / 2)
    if config.dpo.tokens_per_batch is not None:
        rows = max(1, config.dpo.tokens_per_batch // (copies * (size.tokens + 2 * half)))
    rows *= copies
    return StepBatch(rows, size.tokens, half, half, rows * size.patches, rows * size.pixels)


def _fit(shape: ModelShape, batch: StepBatch, how: How, machine: Machine) -> Fit:
    memory = training_memory(shape, batch, how)
    return Fit(how.strategy, memory, memory.total <= machine.usable_bytes)


def _whole(
    config: Config, shape: ModelShape, batch: StepBatch, how: How, machine: Machine, planner: StagePlanner
) -> list[Whole]:
    """The policy before training, while it samples, and the critic."""
    found: list[tuple[str, Memory]] = []
    if config.dpo.reference != "live":
        tokens = batch.num_rows * (batch.prompt_tokens + batch.response_tokens)
        memory = inference_memory(
            shape, weight_bytes=how.weight_bytes, prompt_tokens=tokens, new_tokens=0, key_bytes=how.compute_bytes
        )
        if config.launch.strategy == "zero3" and machine.gpus > 1:
            memory = in_pieces(memory, shape, how)
        found.append(("reference", memory))
    size = how.compute_bytes
    if config.questions is not None and not config.sample.servers:
        new = config.sample.num_responses * config.sample.max_new_tokens
        found.append(
            (
                "sample",
                inference_memory(
                    shape, weight_bytes=size, prompt_tokens=batch.prompt_tokens, new_tokens=new, key_bytes=size
                ),
            )
        )
    found += [(name, memory) for name, memory in planner.critic_memory(size).items()]
    return [Whole(name, memory, memory.total <= machine.usable_bytes) for name, memory in found]


def _source(machine: Machine) -> str:
    if machine.measured_on:
        return f"measured on {machine.measured_on} by align selftest, unless given here"
    return "assumed; align selftest measures them (or --tflops, --bandwidth, --layer-us)"


def _assumptions(config: Config, machine: Machine, how: How, lengths: Lengths, shape: ModelShape) -> list[str]:
    lines = [
        (
            f"{machine.tflops:g} TFLOP/s achieved, {machine.bandwidth_gbs:g} GB/s and {machine.layer_us:g} us to start"
            f" a layer on each GPU: {_source(machine)}"
        ),
        (
            f"{USABLE:.0%} of a GPU's memory usable; weights of {how.weight_bytes} bytes, arithmetic of"
            f" {how.compute_bytes}"
        ),
    ]
    if config.questions is not None:
        lines.append(
            f"responses of {lengths.chosen:g} tokens for times (--response-tokens), of {config.sample.max_new_tokens}"
            f" (sample.max_new_tokens) for memory; {config.pairs.max_per_question or 'all'} pairs per question"
            " (pairs.max_per_question)"
        )
    if not is_known(how.optimizer):
        lines.append(f"states of dpo.optim: {how.optimizer} counted as those of AdamW: their size is not known")
    if how.optimizer.startswith("paged_"):
        lines.append(f"states of dpo.optim: {how.optimizer} in the host's memory")
    if how.quantised:
        lines.append("four bits are arithmetic here: they were never measured")
    if shape.text.other_layers:
        lines.append(f"{shape.text.other_layers} layers without attention are counted as if they had it")
    return lines

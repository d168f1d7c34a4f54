"""A configuration and its real questions in; tokens, memory by part and strategy, and time of every stage out.

Works from config.json, the safetensors headers and the headers of images: no weight is loaded, no picture decoded. The
memory model is `align.memory`; the throughput model is stated here. A floating-point operation is counted as usual: two
for every weight and token going forward, twice that going backward (https://arxiv.org/abs/2001.08361, section 2.1), and
for attention four for every layer, query, key it sees and unit of width. Time is operations over what a GPU achieves
(`--tflops`), and, where tokens are written one by one, bytes of weights and keys over its memory's bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from align.config import Config
from align.dpo.parts import freeze_parts
from align.dpo.texts import encode_prompts, structured
from align.errors import UserError
from align.images import ImageStore
from align.memory import (
    GIB,
    STRATEGIES,
    How,
    Memory,
    StepBatch,
    inference_memory,
    training_memory,
)
from align.records import Pair, read_jsonl, read_questions
from align.shapes import ModelShape, model_shape

# What one GPU achieves in bfloat16 in practice, of an H100's 989 dense; and bytes a second from its memory.
TFLOPS = 350.0
BANDWIDTH_GBS = 2500.0
RESPONSE_TOKENS = 200
# Of a GPU's memory: CUDA's own context, fragmentation and NCCL need the rest.
USABLE = 0.92
SHOWN = 10


@dataclass(frozen=True)
class Machine:
    """`gpus` in all, each with `gpu_gib` of memory, `tflops` achieved and `bandwidth_gbs` of memory traffic."""

    gpus: int = 1
    gpu_gib: float = 80.0
    tflops: float = TFLOPS
    bandwidth_gbs: float = BANDWIDTH_GBS

    @property
    def usable_bytes(self) -> int:
        return int(self.gpu_gib * GIB * USABLE)


@dataclass(frozen=True)
class PromptSize:
    """A question as the model reads it: all tokens, those that stand for images, and what the towers get."""

    id: str
    tokens: int
    visual_tokens: int
    patches: int
    pixels: int


@dataclass(frozen=True)
class Fit:
    """A strategy's memory in each process at the peak of training, whether it fits, and what would make it."""

    strategy: str
    memory: Memory
    fits: bool
    remedy: str = ""


@dataclass(frozen=True)
class Plan:
    """All that `align plan` shows. Times are seconds of a round, for all GPUs together; `too_long` are ids of questions."""

    sizes: list[PromptSize]
    limit: int | None
    too_long: list[str]
    fits: list[Fit]
    whole_model: Memory
    sampling: Memory
    machine: Machine
    seconds: dict[str, float]
    rounds: int
    parameters: dict[str, int]
    assumptions: list[str] = field(default_factory=list)

    @property
    def possible(self) -> list[Fit]:
        return [fit for fit in self.fits if fit.fits]


class PromptMeter:
    """Counts what prompts with images cost, from the sizes of the images alone.

    The processor is run on blank images once for every new combination of sizes.
    """

    def __init__(self, processor: Any, images: ImageStore, patch_px: int = 14) -> None:
        self.processor = processor
        self.images = images
        self.patch_px = patch_px
        self._known: dict[tuple[tuple[int, int], ...], tuple[int, int, int]] = {}

    def size(self, id_: str, messages: Sequence[dict[str, Any]], references: Sequence[str]) -> PromptSize:
        prompt = self.processor.apply_chat_template(structured(messages), tokenize=False, add_generation_prompt=True)
        text_tokens = len(self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        sizes = tuple(self.images.size(reference) for reference in references)
        if sizes not in self._known:
            blanks = [Image.new("RGB", size) for size in sizes]
            inputs = encode_prompts(self.processor, [prompt], [blanks])
            pictures = [value for value in inputs.values() if hasattr(value, "dtype") and value.is_floating_point()]
            patches = max((num_patches(tuple(value.shape), self.patch_px) for value in pictures), default=0)
            pixels = sum(value.numel() for value in pictures)
            self._known[sizes] = inputs["input_ids"].shape[1] - text_tokens, patches, pixels
        extra, patches, pixels = self._known[sizes]
        # The template writes one placeholder an image, which is a visual token itself.
        return PromptSize(id_, text_tokens + extra, extra + len(sizes) if extra else 0, patches, pixels)


def num_patches(shape: tuple[int, ...], patch_px: int) -> int:
    """Patches of an image tensor: whole tiles `(..., 3, height, width)`, or already one patch a row `(n, values)`.

    >>> num_patches((1, 5, 3, 28, 28), 14), num_patches((64, 588), 14)
    (20, 64)
    """
    if len(shape) < 4:
        return shape[0] if len(shape) == 2 else 0
    tiles = 1
    for count in shape[:-3]:
        tiles *= count
    return tiles * (shape[-2] // patch_px) * (shape[-1] // patch_px)


def step_batch(processor: Any, pairs: Sequence[Pair], images: ImageStore, patch_px: int = 14) -> StepBatch:
    """What a batch of these pairs is to the memory model: padded to the longest prompt and responses."""
    from align.dpo.texts import encode_responses, render_pair

    meter = PromptMeter(processor, images, patch_px)
    sizes = [meter.size(pair.id, pair.prompt, pair.images) for pair in pairs]
    tokens = [encode_responses(render_pair(pair, processor), processor, f"pair {pair.id}") for pair in pairs]
    return StepBatch(
        num_rows=len(pairs),
        prompt_tokens=max(size.tokens for size in sizes),
        chosen_tokens=max(len(pair.chosen) for pair in tokens),
        rejected_tokens=max(len(pair.rejected) for pair in tokens),
        patches=sum(size.patches for size in sizes),
        pixels=sum(size.pixels for size in sizes),
    )


def make_plan(config: Config, machine: Machine, *, response_tokens: int = RESPONSE_TOKENS) -> Plan:
    """Plan a run of this configuration.

    Raises:
        UserError: the checkpoint, its processor, a question or an image cannot be used.
    """
    from align.dpo.train import lora_config, position_limit
    from align.info import empty_model
    from align.models.load import load_processor, read_config

    processor = load_processor(config.policy, **config.model.processor)
    model = empty_model(config.policy)
    lora_config(config.dpo.lora, config.dpo.freeze)
    freeze_parts(model, config.dpo.freeze)
    shape = model_shape(model)
    meter = PromptMeter(processor, ImageStore(config.question_images, config.max_image_pixels), patch_size(model))
    sizes = _prompt_sizes(config, meter)
    limit = config.dpo.max_length or position_limit(read_config(config.policy))
    response_tokens = min(response_tokens, config.sample.max_new_tokens)
    longest = max(sizes, key=lambda size: size.tokens)
    how = training_how(config, machine)
    rows = int(config.dpo.trainer_fields().get("per_device_train_batch_size", 1))
    batch = StepBatch(
        rows,
        longest.tokens,
        config.sample.max_new_tokens,
        config.sample.max_new_tokens,
        rows * longest.patches,
        rows * longest.pixels,
    )
    fits = [_fit(shape, batch, replace(how, strategy=strategy), machine) for strategy in STRATEGIES]
    new_tokens = config.sample.num_responses * config.sample.max_new_tokens
    key_bytes = how.compute_bytes
    return Plan(
        sizes=sizes,
        limit=limit,
        too_long=[
            size.id for size in sizes if limit is not None and size.tokens + config.sample.max_new_tokens > limit
        ],
        fits=fits,
        whole_model=inference_memory(
            shape,
            weight_bytes=how.weight_bytes,
            prompt_tokens=rows * (batch.prompt_tokens + batch.response_tokens),
            new_tokens=0,
            key_bytes=key_bytes,
        ),
        sampling=inference_memory(
            shape, weight_bytes=key_bytes, prompt_tokens=longest.tokens, new_tokens=new_tokens, key_bytes=key_bytes
        ),
        machine=machine,
        seconds=stage_seconds(config, shape, sizes, machine, response_tokens, how),
        rounds=config.rounds,
        parameters=shape.parts,
        assumptions=[
            f"{machine.tflops:g} TFLOP/s achieved and {machine.bandwidth_gbs:g} GB/s a GPU (--tflops, --bandwidth)",
            f"responses of {response_tokens} tokens for times (--response-tokens), of {config.sample.max_new_tokens} "
            "(sample.max_new_tokens) for memory",
            f"{USABLE:.0%} of a GPU's memory usable; weights of {how.weight_bytes} bytes, arithmetic of {key_bytes}",
            *(
                ["training in full: an adapter (dpo.lora) takes far less than is planned here"]
                if config.dpo.lora
                else []
            ),
        ],
    )


def training_how(config: Config, machine: Machine) -> How:
    """How the configuration trains on GPUs: float32 weights with bfloat16 arithmetic unless told otherwise."""
    fields = config.dpo.trainer_fields()
    weight_bytes = 4 if config.model.dtype in ("auto", "float32") else 2
    checkpointing = fields.get("gradient_checkpointing", fields.get("activation_checkpointing", True))
    return How(
        num_processes=machine.gpus,
        weight_bytes=weight_bytes,
        compute_bytes=2 if fields.get("bf16", True) or fields.get("fp16") else weight_bytes,
        checkpointing=bool(checkpointing),
        shared=config.shared_prefix != "off",
        accumulates=int(fields.get("gradient_accumulation_steps", 8)) > 1,
        repeated_keys=config.shared_prefix == "off",
        second_model=config.dpo.reference == "live",
    )


def stage_seconds(
    config: Config, shape: ModelShape, sizes: Sequence[PromptSize], machine: Machine, response: int, how: How
) -> dict[str, float]:
    """Seconds of every stage of one round, on all GPUs."""
    per_second = machine.tflops * 1e12 * machine.gpus
    questions = sizes[: config.sample.questions_per_round]
    mean_prompt = sum(size.tokens for size in questions) / len(questions)
    towers = sum(tower_flops(shape, size.patches) for size in questions)
    num_responses = config.sample.num_responses
    found: dict[str, float] = {}

    def branches(count: float, tokens: float) -> float:
        return sum(text_flops(shape, size.tokens, count, tokens) for size in questions) + towers

    if config.questions is not None:
        reading = branches(num_responses, response) / per_second
        writing = write_seconds(shape, len(questions), num_responses, mean_prompt, response, machine, how.compute_bytes)
        found["sample"] = max(reading, writing) if not config.sample.servers else reading
        comparisons = {"pairwise": (num_responses * (num_responses - 1), 2), "panel": (num_responses, 2)}
        count, width = comparisons.get(config.critic.kind, (num_responses, 1))
        judged = (
            branches(count, width * response) if config.critic.kind not in ("verifier", "random", "length") else 0.0
        )
        found["score"] = judged / per_second
    pairs = len(questions) * (config.pairs.max_per_question if config.questions is not None else 1)
    # Shared: the prompt once with both responses; separate: twice with one each.
    repeats, count = (1, 2) if how.shared else (2, 1)
    forward = repeats * branches(count, response) * pairs / len(questions)
    towers_trained = any(tower.trained for tower in shape.towers)
    passes = 3 + how.checkpointing
    frozen = 0.0 if towers_trained else repeats * towers * pairs / len(questions)
    epochs = float(config.dpo.trainer_fields().get("num_train_epochs", 1))
    found["reference"] = 0.0 if config.dpo.reference == "live" else forward / per_second
    live = forward if config.dpo.reference == "live" else 0.0
    found["dpo"] = epochs * (passes * (forward - frozen) + frozen + live) / per_second
    if config.evaluate.questions is not None:
        held_out = read_questions(config.evaluate.questions)[: config.evaluate.limit]
        count, tokens = 1 + config.evaluate.num_samples, min(response, config.evaluate.max_new_tokens)
        reading = branches(count, tokens) / len(questions) * len(held_out) / per_second
        writing = write_seconds(shape, len(held_out), count, mean_prompt, tokens, machine, how.compute_bytes)
        found["evaluate"] = max(reading, writing)
    return found


def text_flops(shape: ModelShape, prompt: float, branches: float, tokens: float) -> float:
    """Operations of a prompt and so many branches behind it: forward, with the head on the branches' tokens."""
    text = shape.text
    layers = text.num_layers * text.active_weights
    seen = prompt * prompt / 2 + branches * tokens * (prompt + tokens / 2)
    attention = 4 * text.num_layers * text.query * seen
    return 2 * layers * (prompt + branches * tokens) + attention + 2 * shape.embedding_weights * branches * tokens


def tower_flops(shape: ModelShape, patches: float) -> float:
    """Operations of the vision towers over so many patches; attention inside a tile of about 730 patches."""
    return sum(
        2 * tower.num_layers * patches * (tower.active_weights + 2 * tower.hidden * min(patches, 730))
        for tower in shape.towers
    )


def write_seconds(
    shape: ModelShape, questions: int, samples: int, prompt: float, tokens: float, machine: Machine, size: int
) -> float:
    """Seconds to write token after token: each step reads all weights and the keys of the batch once.

    A batch is what fits into six tenths of the memory that the weights leave, as `align.engines.budget` has it.
    """
    text = shape.text
    weights = shape.weights * size
    keys = 2 * text.num_layers * text.key * size * (prompt + samples * tokens)
    room = max(0.6 * (machine.usable_bytes - weights), keys)
    batch = max(1.0, min(questions / machine.gpus, room // keys))
    steps = tokens * questions / (batch * machine.gpus)
    return steps * (weights + batch * keys) / (machine.bandwidth_gbs * 1e9)


def patch_size(model: Any) -> int:
    """Pixels of a patch's side, from the model's vision config."""
    vision = getattr(model.config, "vision_config", None)
    size = getattr(vision, "patch_size", None) or 14
    return size if isinstance(size, int) else size[0]


def _prompt_sizes(config: Config, meter: PromptMeter) -> list[PromptSize]:
    if config.questions is not None:
        return [
            meter.size(question.id, question.messages(), question.images)
            for question in read_questions(config.questions)
        ]
    assert config.pairs_file is not None
    sizes = [meter.size(pair.id, pair.prompt, pair.images) for pair in read_jsonl(config.pairs_file, Pair)]
    if not sizes:
        raise UserError("no pairs in the file", where=str(config.pairs_file))
    return sizes


def _fit(shape: ModelShape, batch: StepBatch, how: How, machine: Machine) -> Fit:
    memory = training_memory(shape, batch, how)
    if memory.total <= machine.usable_bytes:
        return Fit(how.strategy, memory, True)
    return Fit(how.strategy, memory, False, _remedy(shape, batch, how, machine))


def _remedy(shape: ModelShape, batch: StepBatch, how: How, machine: Machine) -> str:
    """The smallest change that makes it fit, tried in this order; or how much is missing."""

    def fits(batch: StepBatch, how: How) -> bool:
        return training_memory(shape, batch, how).total <= machine.usable_bytes

    single = StepBatch(
        1,
        batch.prompt_tokens,
        batch.chosen_tokens,
        batch.rejected_tokens,
        batch.patches // batch.num_rows,
        batch.pixels // batch.num_rows,
    )
    if not how.checkpointing and fits(batch, replace(how, checkpointing=True)):
        return "dpo.gradient_checkpointing: true"
    if batch.num_rows > 1 and fits(single, how):
        return "dpo.per_device_train_batch_size: 1"
    least = replace(how, checkpointing=True)
    if fits(single, least):
        return "dpo.gradient_checkpointing: true and per_device_train_batch_size: 1"
    if how.strategy != "ddp":
        for factor in (2, 4, 8, 16, 32):
            if fits(single, replace(least, num_processes=how.num_processes * factor)):
                return f"{how.num_processes * factor} GPUs"
    missing = training_memory(shape, single, least).total - machine.usable_bytes
    return f"{missing / GIB:.0f} GiB are missing: dpo.freeze, dpo.lora, another strategy or larger GPUs"

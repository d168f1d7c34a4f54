"""Stage 3: pairs.jsonl in, a checkpoint out: DPO of the round's policy with every question encoded once.

The reference's log-probabilities are computed (once a round) before training and kept. A training that was killed goes
on from its last intermediate state, with the same data order, optimiser and random state. The finished checkpoint has
the form of the one it started from.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DPOConfig

from align import accelerator
from align.config import Config
from align.distributed.ranks import EXIT_RESTART, start_process_group, world_size
from align.dpo.auto_batch_size import note_on_batch, remember_smaller_batch, with_batch_that_fits
from align.dpo.callbacks import MetricsFile, StepProgress, StepTracker, StopOnSignal
from align.dpo.collator import LayoutName, PairCollator, layout_of, prompt_inputs_of
from align.dpo.qlora import is_quantised, peft_fields, quantization
from align.dpo.reference import ReferenceKey, pairs_hash, reference_log_probs
from align.dpo.settings import training_arguments
from align.dpo.sharding.gather import gather_weights, merge_adapter
from align.dpo.sharding.shards import gathered_as_needed, loading_in_pieces
from align.dpo.sharding.strategies import (
    check_distribution,
    chosen_strategy,
    process_group_backend,
    strategy_fields,
    whole_models,
)
from align.dpo.tokenize import PairLength, check_lengths, pair_lengths, spelling_placeholders
from align.dpo.trainer import PairTrainer, check_projector, pair_dataset
from align.engines.prompts import check_prompts
from align.errors import UserError, is_out_of_memory
from align.log import log
from align.media.images import ImageStore
from align.models.device import DTYPES, pick_device
from align.models.load import check_checkpoint, load_model, load_processor, read_config
from align.models.meta import empty_model, with_adapter
from align.models.modules import count_parameters, freeze_parts
from align.models.save import save_checkpoint
from align.monitoring.cost import count_tokens, save_cost
from align.prefix.attention import PrefixUnsupported, stop_shared_prefix
from align.prefix.equivalence import check_equivalence
from align.records import Pair, read_jsonl
from align.run.folder import Round, RunDir
from align.run.hashes import checkpoint_hash, content_hash, text_hash
from align.run.image_hashes import record_or_verify_images
from align.tracking.trackers import Trackers, tracking

STAGE = "dpo"
PLACEHOLDER = "a response spells the placeholder of an image"


def run_dpo(config: Config, number: int) -> None:
    """Train a round; does nothing when the round has been trained already.

    Raises:
        UserError: the round before is not complete, the settings or the pairs cannot be used, or the loss is no number.
        SystemExit: with code 0, after SIGTERM; the same command goes on from the state that was saved. With the code
            TRY_AGAIN, in one of several processes, when memory ran out and a smaller batch has been noted.
    """
    run = RunDir(config.run_dir)
    this = run.round(number)
    policy = run.policy(number, config.policy)
    device = pick_device(config.model.device)
    dtype = training_dtype(config.model.dtype)
    strategy = chosen_strategy(config, device)
    quantization(config.dpo.lora, device, strategy)
    check_trained(config, policy)
    backend = process_group_backend(strategy, device)
    if backend is not None:
        torch.cuda.set_device(device)
        start_process_group(backend)
    with whole_models():
        args = training_arguments(config, this.trainer, device, dtype)
    pairs = read_pairs(this)
    state = args.distributed_state
    with state.main_process_first():
        if state.is_main_process:
            this.manifest.begin(STAGE, settings=_settings(config), inputs=_inputs(config, this, policy))
        if this.manifest.complete(STAGE):
            log.info("round %d is trained already: %s", number, this.checkpoint)
            return
        if state.is_main_process:
            record_or_verify_images(
                this.image_hashes, ImageStore(config.question_images, config.max_image_pixels), pairs
            )
    # Opened before any weights are: a login that is missing is told at once.
    with (
        tracking(config, f"round-{number}") if state.is_main_process else contextlib.nullcontext(Trackers()) as trackers
    ):
        while not _train_within_memory(config, this, policy, device, dtype, strategy, pairs, trackers):
            gc.collect()
            accelerator.empty_cache()


def _train_within_memory(
    config: Config,
    this: Round,
    policy: str,
    device: torch.device,
    dtype: torch.dtype,
    strategy: str,
    pairs: list[Pair],
    trackers: Trackers,
) -> bool:
    """Train with the batch that is known to fit; False where it did not, and half of it should be tried."""
    config = with_batch_that_fits(config, this.trainer)
    # For everything before training models are loaded as this file says (`align.dpo.sharding.shards`), not as accelerate would.
    with whole_models():
        args = training_arguments(config, this.trainer, device, dtype)
    try:
        DpoStage(config, this, policy, args, device, dtype, strategy, trackers).run(pairs)
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        remember_smaller_batch(this.trainer, args)
    if world_size() > 1:
        # The other processes wait in the middle of a step: all must begin again.
        raise SystemExit(EXIT_RESTART)
    return False


def read_pairs(this: Round) -> list[Pair]:
    """The round's pairs; raises UserError when there are none or when two share an id."""
    if not this.pairs.is_file():
        raise UserError(
            "there are no pairs to train on",
            where=str(this.pairs),
            fix=f"run align score --round {this.number}, or put your own pairs there",
        )
    pairs = read_jsonl(this.pairs, Pair)
    if not pairs:
        raise UserError(
            "no pair has survived scoring: nothing to train on",
            where=str(this.pairs),
            fix="lower pairs.min_margin, raise sample.num_responses or temperature, or look at scores.jsonl",
        )
    twice = [id_ for id_, count in Counter(pair.id for pair in pairs).items() if count > 1]
    if twice:
        raise UserError(f"{len(twice)} ids stand more than once, such as {twice[0]!r}", where=str(this.pairs))
    return pairs


def training_dtype(setting: str) -> torch.dtype:
    """The dtype of the trained weights: float32 unless another is asked for.

    Steps of a learning rate of 5e-7 are smaller than bfloat16 can tell apart: weights kept in it would not move.
    """
    return torch.float32 if setting == "auto" else DTYPES[setting]


@dataclass
class DpoStage:
    """Everything that the steps of the stage share."""

    config: Config
    this: Round
    policy: str
    args: DPOConfig
    device: torch.device
    dtype: torch.dtype
    strategy: str = "ddp"
    trackers: Trackers = field(default_factory=Trackers)

    def run(self, given: list[Pair]) -> None:
        started = time.monotonic()
        images = ImageStore(self.config.question_images, self.config.max_image_pixels)
        processor = load_processor(self.policy, **self.config.model.processor)
        check_prompts(processor, self.policy)
        usable = self._without_placeholders(given, processor)
        lengths = pair_lengths(usable, processor, images)
        max_length = self.config.dpo.max_length or position_limit(read_config(self.policy))
        pairs = self._that_fit(usable, lengths, max_length)
        collator = PairCollator(processor, images, "shared", max_length)
        # Processes that exchange weights or gradients module by module must all run the same modules. Alone as well,
        # so that it makes no difference: Adam moves on with a gradient of 0, but not without one.
        collator.always_images = any(pair.images for pair in pairs)
        with loading_in_pieces(self.strategy == "zero3", self.dtype):
            model = self.load(self.policy)
            with gathered_as_needed(model):
                first = pairs[: self.args.per_device_train_batch_size]
                collator.layout, note = choose_layout(self.config.shared_prefix, model, collator, first)
            reference = None
            if self.config.dpo.reference != "live":
                reference = self._reference(model, pairs, collator)
        reference_s = time.monotonic() - started
        if self._spread(model):
            # Freed here, where its last name is: there may not be room for it and the pieces.
            del model
            gc.collect()
            accelerator.empty_cache()
            model = self.load(self.policy)
        trainer = self._trainer(model, pairs, lengths, collator, reference)
        check_distribution(self.strategy, trainer.accelerator.distributed_type)
        parameters = count_parameters(trainer.model)
        self._train(trainer)
        self._save(trainer, processor)
        if trainer.is_world_process_zero():
            counts = _counts(pairs, trainer) | {"dropped_too_long": len(usable) - len(pairs)}
            if len(usable) < len(given):
                counts["dropped"] = {PLACEHOLDER: len(given) - len(usable)}
            # Of all processes and of earlier attempts; what the reference reads comes on top.
            count_tokens(read=counts["tokens"])
            self.this.manifest.finish(
                STAGE,
                outputs=[self.this.checkpoint],
                counts=counts,
                notes={"shared_prefix": note} | note_on_batch(self.this.trainer) | self.trackers.notes,
                parameters=parameters,
                reference_seconds=round(reference_s, 3),
                parent=self.policy,
            )
            for folder in self.this.trainer.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(folder)
        trainer.accelerator.wait_for_everyone()

    def load(self, checkpoint: str, device: str | None = None) -> Any:
        """A model as it is trained (on `device` where one is named: as it is stored, neither spread nor quantised)."""
        lora = None if device else self.config.dpo.lora
        return load_model(
            checkpoint,
            dtype=self.dtype,
            # DeepSpeed's third stage places the pieces itself.
            device=None if is_deepspeed_zero3_enabled() else device or self.device,
            attn_implementation=self.config.model.attention,
            allow_pickle=self.config.model.allow_pickle,
            quantization=quantization(lora, self.device, self.strategy),
        )

    def _spread(self, model: Any) -> bool:
        """Set the arguments of the launch's strategy; True where the model must be loaded again, a piece a process."""
        if self.strategy == "ddp":
            return False
        # accelerate fixes the kind of distribution when it is first asked; the process group itself stays.
        AcceleratorState._reset_state(reset_partial_state=True)
        fields = strategy_fields(self.strategy, model)
        self.args = training_arguments(self.config, self.this.trainer, self.device, self.dtype, fields)
        if not is_deepspeed_zero3_enabled():
            return False
        import deepspeed

        # While it loads, DeepSpeed asks its own layer how many processes there are, not torch's.
        deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
        return True

    def _without_placeholders(self, pairs: list[Pair], processor: Any) -> list[Pair]:
        spelling = spelling_placeholders(pairs, processor)
        if len(spelling) == len(pairs):
            raise UserError(f"in every pair {PLACEHOLDER}", where=str(self.this.pairs), fix="look at the responses")
        if spelling:
            log.warning("%d of %d pairs are dropped: %s", len(spelling), len(pairs), PLACEHOLDER)
        return [pair for pair in pairs if pair.id not in spelling]

    def _that_fit(self, pairs: list[Pair], lengths: list[PairLength], max_length: int | None) -> list[Pair]:
        if max_length is None:
            return pairs
        drop = check_lengths(lengths, max_length, drop=self.config.dpo.too_long == "drop")
        if drop:
            log.warning("%d of %d pairs do not fit in %d tokens and are dropped", len(drop), len(pairs), max_length)
        return [pair for pair in pairs if pair.id not in drop]

    def _reference(self, model: Any, pairs: list[Pair], collator: PairCollator) -> list[tuple[float, float]]:
        checkpoint = self.config.policy if self.config.dpo.reference == "initial" else self.policy
        autocast_dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        key = ReferenceKey(
            weights=checkpoint_hash(checkpoint),
            processor=text_hash(checkpoint_hash(self.policy), json.dumps(self.config.model.processor, sort_keys=True)),
            pairs=pairs_hash(pairs, collator.images),
            layout=collator.layout,
            arithmetic=f"{self.dtype}/{autocast_dtype}".replace("torch.", "") + self._bits(),
            max_length=str(collator.max_length),
        )
        reference = reference_log_probs(
            self.this.reference,
            key,
            pairs,
            collator=collator,
            load_model=lambda: model if checkpoint == self.policy else self.load(checkpoint),
            autocast=lambda: torch.autocast(self.device.type, autocast_dtype, enabled=autocast_dtype is not None),
            batch_size=self.args.per_device_train_batch_size,
            state=self.args.distributed_state,
            num_workers=self.args.dataloader_num_workers,
        )
        return reference.columns(self.args.ld_alpha)

    def _bits(self) -> str:
        lora = self.config.dpo.lora
        return f"/{lora['quantize']}" if lora is not None and is_quantised(lora) else ""

    def _trainer(
        self,
        model: Any,
        pairs: list[Pair],
        lengths: list[PairLength],
        collator: PairCollator,
        reference: list[tuple[float, float]] | None,
    ) -> PairTrainer:
        settings = self.config.dpo
        adapter = lora_config(settings.lora, settings.freeze)
        if adapter is None:
            freeze_parts(model, settings.freeze)
        # An adapter that is switched off gives the reference by itself.
        live = self.load(self.policy) if reference is None and adapter is None else None
        longest = {length.id: length.longest for length in lengths}
        return PairTrainer(
            model,
            args=self.args,
            train_dataset=pair_dataset(pairs, reference, [longest[pair.id] for pair in pairs]),
            data_collator=collator,
            processor=collator.processor,
            ref_model=live,
            peft_config=adapter,
            projector_learning_rate_multiplier=settings.projector_learning_rate_multiplier,
            callbacks=[
                MetricsFile(self.this.trainer / "metrics.jsonl"),
                StepProgress(f"round {self.this.number}: dpo"),
                StepTracker(self.trackers),
            ],
        )

    def _train(self, trainer: PairTrainer) -> None:
        """Train from the last intermediate state, if there is one; SystemExit when told to stop on the way."""
        last = last_state(self.this.trainer, self.args.world_size)
        if last is not None:
            log.info("training goes on from %s", last)
        stop = StopOnSignal()
        trainer.add_callback(stop)
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        state = trainer.state
        if stop.requested and state.global_step < state.max_steps:
            log.info(
                "stopped at step %d of %d; `align dpo --round %d` goes on from there",
                state.global_step,
                state.max_steps,
                self.this.number,
            )
            raise SystemExit(0)

    def _save(self, trainer: PairTrainer, processor: Any) -> None:
        """Write the finished checkpoint in the form of its parent, with the trainer's record of how it came about."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        gathered = gather_weights(trainer)
        in_pieces = is_deepspeed_zero3_enabled()
        unset_hf_deepspeed_config()
        if trainer.is_world_process_zero() and self.config.dpo.lora is not None:
            model, gathered = merge_adapter(model, gathered, lambda: self.load(self.policy, device="cpu")), None
        elif trainer.is_world_process_zero() and in_pieces:
            # A model that was loaded in pieces does not remember the names of its tensors on disk.
            model = self.load(self.policy, device="cpu")
        restore_forward(model)
        if trainer.is_world_process_zero():
            save_checkpoint(
                model,
                processor,
                self.this.checkpoint,
                parent=_folder(self.policy),
                state_dict=gathered,
                dtype=self._stored_dtype(),
            )
            trainer.state.save_to_json(str(self.this.checkpoint / "trainer_state.json"))
        save_cost()
        trainer.accelerator.wait_for_everyone()

    def _stored_dtype(self) -> torch.dtype | None:
        """The dtype of the parent's weights on disk, which the checkpoint keeps; None where it does not say."""
        config = read_config(self.policy)
        return DTYPES.get(str(config.get("torch_dtype") or config.get("dtype")))


def choose_layout(setting: str, model: Any, collator: PairCollator, pairs: list[Pair]) -> tuple[LayoutName, str]:
    """`shared` where the first batch shows that it is exact, else `plain`; and what was found, for the manifest.

    Raises:
        UserError: the setting is `on` and the shared prefix cannot be used.
    """
    if setting == "off":
        return "plain", "off"
    text_config = model.config.get_text_config()
    if getattr(text_config, "router_aux_loss_coef", 0.0) and hasattr(text_config, "output_router_logits"):
        exact, reason = False, "the load-balancing loss of experts is not defined on shared prompts"
    else:
        batch = {name: value.to(model.device) for name, value in collator.collate(pairs).items()}
        found = check_equivalence(model, prompt_inputs_of(batch), layout_of(batch))
        exact, reason = found.exact, found.reason
    if exact:
        log.info("shared prefix: %s", reason)
        return "shared", reason
    if setting == "on":
        raise UserError(f"shared_prefix is on, but it cannot be used: {reason}", fix="set shared_prefix: auto")
    with contextlib.suppress(PrefixUnsupported, AttributeError):
        stop_shared_prefix(model)
    log.warning("shared prefix: not used, every response repeats its prompt: %s", reason)
    return "plain", f"not used: {reason}"


def restore_forward(model: Any) -> None:
    """Undo what training has done to `model.forward` and to its attention."""
    model.__dict__.pop("forward", None)
    with contextlib.suppress(PrefixUnsupported, AttributeError):
        stop_shared_prefix(model)


def lora_config(fields: dict[str, Any] | None, freeze: list[str]) -> Any:
    """peft's LoraConfig from the configuration, or None where the weights themselves are trained."""
    if fields is None:
        return None
    from peft import LoraConfig

    if freeze:
        raise UserError("dpo.freeze and dpo.lora exclude each other", fix="choose dpo.lora.target_modules instead")
    try:
        return LoraConfig(**peft_fields(fields))
    except (TypeError, ValueError) as error:
        raise UserError(f"dpo.lora: {error}", fix="see the fields of peft's LoraConfig") from None


def check_trained(config: Config, policy: str) -> None:
    """Look at what would be trained, without weights.

    Raises:
        UserError: the checkpoint is not whole, an adapter finds no layers, nothing is left to train, or the projector has a rate and is not trained.
    """
    check_checkpoint(policy, allow_pickle=config.model.allow_pickle)
    model = empty_model(policy)
    adapter = lora_config(config.dpo.lora, config.dpo.freeze)
    if adapter is not None:
        model = with_adapter(model, adapter)
    else:
        freeze_parts(model, config.dpo.freeze)
    if config.dpo.projector_learning_rate_multiplier != 1.0:
        check_projector(model)


def last_state(folder: Path, num_processes: int) -> Path | None:
    """The newest intermediate state that was written to its end; one that was not is removed."""
    states = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.split("-")[-1]))
    for path in reversed(states):
        if _is_complete(path, num_processes):
            return path
        log.warning("%s was not written to its end and is not used", path)
    return None


def position_limit(config: dict[str, Any]) -> int | None:
    """How many positions the language model has, from config.json; None where the file does not say."""
    for section in (config.get("text_config"), config.get("llm_config"), config):
        if isinstance(section, dict) and isinstance(section.get("max_position_embeddings"), int):
            return section["max_position_embeddings"]
    return None


def _folder(checkpoint: str) -> str | None:
    return checkpoint if Path(checkpoint).is_dir() else None


def _is_complete(path: Path, num_processes: int) -> bool:
    # The Trainer writes trainer_state.json last; each process writes its own random state.
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return num_processes == 1 or all((path / f"rng_state_{rank}.pth").is_file() for rank in range(num_processes))


def _settings(config: Config) -> dict[str, Any]:
    return {
        # Who is told of the numbers, and under which name, changes none of them.
        "dpo": config.dpo.model_dump(exclude={"report_to", "run_name"}),
        "seed": config.seed,
        "shared_prefix": config.shared_prefix,
        "dtype": config.model.dtype,
        "processor": config.model.processor,
    }


def _inputs(config: Config, this: Round, policy: str) -> dict[str, str]:
    inputs = {"pairs": content_hash(this.pairs), "policy": checkpoint_hash(policy)}
    if config.dpo.reference == "initial":
        inputs["reference"] = checkpoint_hash(config.policy)
    return inputs


def _counts(pairs: list[Pair], trainer: PairTrainer) -> dict[str, Any]:
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = steps[-1] if steps else {}
    return {
        "pairs": len(pairs),
        "steps": trainer.state.global_step,
        "tokens": int(last.get("num_tokens", 0)),
        "loss": last.get("loss"),
        "reward_accuracy": last.get("rewards/accuracies"),
        "reward_margin": last.get("rewards/margins"),
    }

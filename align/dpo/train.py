"""Stage 3: pairs.jsonl in, a checkpoint out: DPO of the round's policy with every question encoded once.

The reference's log-probabilities are computed (once per round) before training and kept. A training that was killed
resumes from its last trainer checkpoint, with the same data order, optimiser and random state. The finished checkpoint
has the form of the one it started from.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import PartialState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from align import accelerator
from align.config import Config
from align.distributed.ranks import EXIT_RESTART, start_process_group, world_size
from align.dpo.auto_batch_size import note_on_batch, remember_smaller_batch, with_batch_that_fits
from align.dpo.callbacks import MetricsFile, StepProgress, StepTracker, StopOnSignal
from align.dpo.check import check_trained
from align.dpo.choose_layout import choose_layout
from align.dpo.collator import PairCollator, pair_dataset
from align.dpo.qlora import quantization
from align.dpo.recomputation import choose_recomputation
from align.dpo.reference import ReferenceKey, pairs_hash, reference_log_probs
from align.dpo.save import save_trained
from align.dpo.settings import checkpointing_field, effective_settings, training_arguments, training_fields
from align.dpo.sharding.shards import gathered_as_needed, init_deepspeed, loading_sharded
from align.dpo.sharding.strategies import (
    check_distribution,
    chosen_strategy,
    process_group_backend,
    process_state,
    strategy_fields,
)
from align.dpo.tokenize import TokenizedPair, TokenizedPairs, check_lengths, tokenize_pairs
from align.dpo.trainer import PairTrainer
from align.dpo.trainer_checkpoints import last_checkpoint
from align.engines.prompts import check_prompts
from align.errors import UserError, is_out_of_memory
from align.log import log
from align.media.images import question_images
from align.models.device import DTYPES, pick_device
from align.models.limits import position_limit
from align.models.load import load_model, load_processor, read_config
from align.models.lora import is_quantised, lora_config
from align.models.modules import count_parameters, freeze_parts
from align.monitoring.cost import count_tokens
from align.records import Pair, read_jsonl
from align.run.folder import Round, RunDir
from align.run.hashes import checkpoint_hash, content_hash, text_hash
from align.run.image_hashes import record_or_verify_images
from align.tracking.trackers import Trackers, tracking

STAGE = "dpo"


def run_dpo(config: Config, number: int) -> None:
    """Train a round; does nothing when the round has been trained already.

    Raises:
        UserError: the round before is not complete, the settings or the pairs cannot be used, or the loss is not finite.
        SystemExit: with code 0, after SIGTERM; the same command resumes from the state that was saved. With the code
            EXIT_RESTART, in one of several processes, when memory ran out and a smaller batch has been noted.
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
    state = process_state(training_fields(config, this.trainer, device, dtype))
    pairs = read_pairs(this)
    with state.main_process_first():
        if state.is_main_process:
            this.manifest.begin(STAGE, settings=_settings(config), inputs=_inputs(config, this, policy))
        if this.manifest.complete(STAGE):
            log.info("round %d is trained already: %s", number, this.checkpoint)
            return
        if state.is_main_process:
            record_or_verify_images(this.image_hashes, question_images(config), pairs)
    # Opened before any weights are: a login that is missing is reported at once.
    with (
        tracking(config, f"round-{number}") if state.is_main_process else contextlib.nullcontext(Trackers()) as trackers
    ):
        stage = DpoStage(config, this, policy, device, dtype, strategy, state, trackers)
        while not _train_within_memory(stage, pairs):
            gc.collect()
            accelerator.empty_cache()


def _train_within_memory(stage: DpoStage, pairs: list[Pair]) -> bool:
    """Train with the batch that is known to fit; False where it did not, and half of it should be tried."""
    stage.fit_batch()
    try:
        stage.run(pairs)
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        remember_smaller_batch(stage.this.trainer, stage.fields)
    if world_size() > 1:
        # The other processes wait in the middle of a step: all must be restarted.
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
        raise UserError(f"{len(twice)} ids are duplicated, such as {twice[0]!r}", where=str(this.pairs))
    return pairs


def training_dtype(setting: str) -> torch.dtype:
    """The dtype of the trained weights: float32 unless another is asked for.

    Steps of a learning rate of 5e-7 are smaller than bfloat16 can tell apart: weights kept in it would not move.
    """
    return torch.float32 if setting == "auto" else DTYPES[setting]


@dataclass
class DpoStage:
    """Everything that the steps of the stage share; `fields` are those of TRL's DPOConfig, without the strategy's."""

    config: Config
    this: Round
    policy: str
    device: torch.device
    dtype: torch.dtype
    strategy: str
    state: PartialState
    trackers: Trackers = field(default_factory=Trackers)
    fields: dict[str, Any] = field(default_factory=dict)

    def fit_batch(self) -> None:
        """Take the batch that earlier attempts at this round have come down to, if any."""
        self.config = with_batch_that_fits(self.config, self.this.trainer)
        self.fields = training_fields(self.config, self.this.trainer, self.device, self.dtype)

    def run(self, given: list[Pair]) -> None:
        """Train on the pairs, save, and mark the stage complete."""
        started = time.monotonic()
        images = question_images(self.config)
        processor = load_processor(self.policy, **self.config.model.processor)
        check_prompts(processor, self.policy)
        max_length = self.config.dpo.max_length or position_limit(read_config(self.policy))
        tokenized = tokenize_pairs(given, processor, images)
        pairs = self._that_fit(tokenized.pairs, max_length)
        # Processes that exchange weights or gradients module by module must all run the same modules. Alone as well,
        # so that it makes no difference: Adam moves on with a gradient of 0, but not without one.
        always_images = any(pair.image_files for pair in pairs)
        collator = PairCollator(processor, images, "shared", max_length, always_images)
        with loading_sharded(self.strategy == "zero3", self.dtype):
            model = self.load(self.policy)
            with gathered_as_needed(model), self._autocast():
                first = pairs[: self.fields["per_device_train_batch_size"]]
                layout, note = choose_layout(self.config.shared_prefix, model, collator, first)
            collator = replace(collator, layout=layout)
            live = self.config.dpo.reference == "live"
            reference = None if live else self._reference(model, pairs, collator)
        reference_s = time.monotonic() - started
        recomputation = choose_recomputation(
            self.config, self.policy, self.fields, pairs, layout=layout, strategy=self.strategy, device=self.device
        )
        checkpointing = {checkpointing_field(): recomputation.checkpointing}
        arguments = training_arguments(strategy_fields(self.strategy, model) | self.fields | checkpointing)
        if is_deepspeed_zero3_enabled():
            # Freed here, where its last name is: there may not be room for it and the shards.
            del model
            gc.collect()
            accelerator.empty_cache()
            init_deepspeed()
            model = self.load(self.policy)
        dataset = pair_dataset(pairs, reference)
        trainer = self.make_trainer(model, arguments, dataset, collator, recomputation.kept_layers)
        check_distribution(self.strategy, trainer.accelerator.distributed_type)
        parameters = count_parameters(trainer.model)
        self._train(trainer)
        save_trained(
            trainer,
            processor,
            self.this.checkpoint,
            policy=self.policy,
            load=self.load,
            code=self.config.save.code,
        )
        if trainer.is_world_process_zero():
            counts = _counts(trainer, tokenized, num_too_long=len(tokenized.pairs) - len(pairs))
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
                training=effective_settings(arguments),
            )
            for folder in self.this.trainer.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(folder)
        trainer.accelerator.wait_for_everyone()

    def load(self, checkpoint: str, device: str | None = None) -> Any:
        """A model as it is trained (on `device` where one is named: as it is stored, neither sharded nor quantised)."""
        lora = None if device else self.config.dpo.lora
        return load_model(
            checkpoint,
            dtype=self.dtype,
            # DeepSpeed's third stage places the shards itself.
            device=None if is_deepspeed_zero3_enabled() else device or self.device,
            attn_implementation=self.config.model.attention,
            allow_pickle=self.config.model.allow_pickle,
            quantization=quantization(lora, self.device, self.strategy),
        )

    def make_trainer(
        self, model: Any, args: Any, dataset: Any, collator: PairCollator, kept_layers: int = 0
    ) -> PairTrainer:
        """The trainer of the round, with its adapter or frozen parts, its reference and its callbacks."""
        settings = self.config.dpo
        adapter = lora_config(settings.lora, settings.freeze)
        if adapter is None:
            freeze_parts(model, settings.freeze)
        # An adapter that is switched off gives the reference by itself.
        live = self.load(self.policy) if settings.reference == "live" and adapter is None else None
        return PairTrainer(
            model,
            args=args,
            train_dataset=dataset,
            data_collator=collator,
            processor=collator.processor,
            ref_model=live,
            peft_config=adapter,
            projector_learning_rate_multiplier=settings.projector_learning_rate_multiplier,
            kept_layers=kept_layers,
            callbacks=[
                MetricsFile(self.this.trainer / "metrics.jsonl"),
                StepProgress(f"round {self.this.number}: dpo"),
                StepTracker(self.trackers),
            ],
        )

    def _that_fit(self, pairs: list[TokenizedPair], max_length: int | None) -> list[TokenizedPair]:
        if max_length is None:
            return pairs
        drop = check_lengths(pairs, max_length, drop=self.config.dpo.on_too_long == "drop")
        if drop:
            log.warning("%d of %d pairs do not fit in %d tokens and are dropped", len(drop), len(pairs), max_length)
        return [pair for pair in pairs if pair.id not in drop]

    def _reference(self, model: Any, pairs: list[TokenizedPair], collator: PairCollator) -> list[tuple[float, float]]:
        checkpoint = self.config.policy if self.config.dpo.reference == "initial" else self.policy
        key = ReferenceKey(
            weights=checkpoint_hash(checkpoint),
            processor=text_hash(checkpoint_hash(self.policy), json.dumps(self.config.model.processor, sort_keys=True)),
            pairs=pairs_hash(pairs, collator.images),
            layout=collator.layout,
            arithmetic=f"{self.dtype}/{self._autocast_dtype}".replace("torch.", "") + self._bits(),
            max_length=str(collator.max_length),
        )
        reference = reference_log_probs(
            self.this.reference,
            key,
            pairs,
            collator=collator,
            load_model=lambda: model if checkpoint == self.policy else self.load(checkpoint),
            autocast=self._autocast,
            batch_size=self.fields["per_device_train_batch_size"],
            state=self.state,
            num_workers=self.fields["dataloader_num_workers"],
        )
        return reference.columns(self.fields.get("ld_alpha"))

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.fields["bf16"] else torch.float16 if self.fields.get("fp16") else None

    def _autocast(self) -> torch.autocast:
        """The arithmetic of training, for what is computed before there is a trainer."""
        dtype = self._autocast_dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _bits(self) -> str:
        lora = self.config.dpo.lora
        return f"/{lora['quantize']}" if lora is not None and is_quantised(lora) else ""

    def _train(self, trainer: PairTrainer) -> None:
        """Train from the last trainer checkpoint, if there is one; SystemExit when told to stop on the way."""
        last = last_checkpoint(self.this.trainer, world_size())
        if last is not None:
            log.info("training resumes from %s", last)
        stop = StopOnSignal()
        trainer.add_callback(stop)
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        state = trainer.state
        if stop.requested and state.global_step < state.max_steps:
            log.info(
                "stopped at step %d of %d; `align dpo --round %d` resumes from there",
                state.global_step,
                state.max_steps,
                self.this.number,
            )
            raise SystemExit(0)


def _settings(config: Config) -> dict[str, Any]:
    return {
        # Who gets the metrics, and under which name, changes none of them.
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


def _counts(trainer: PairTrainer, tokenized: TokenizedPairs, num_too_long: int) -> dict[str, Any]:
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = steps[-1] if steps else {}
    counts = {
        "pairs": len(trainer.train_dataset),
        "steps": trainer.state.global_step,
        "tokens": int(last.get("num_tokens", 0)),
        "loss": last.get("loss"),
        "reward_accuracy": last.get("rewards/accuracies"),
        "reward_margin": last.get("rewards/margins"),
        "dropped_too_long": num_too_long,
    }
    if tokenized.dropped:
        counts["dropped"] = {reason: len(ids) for reason, ids in tokenized.dropped.items()}
    return counts

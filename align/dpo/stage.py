"""Pairs and the round's policy in, the round's checkpoint out:
what `align.dpo.train` does once a round may be trained."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from align import accelerator
from align.config import Config
from align.distributed.ranks import world_size
from align.dpo.auto_batch_size import note_on_batch, with_batch_that_fits
from align.dpo.callbacks import MetricsFile, StepProgress, StepTracker, StopOnSignal
from align.dpo.choose_layout import choose_layout
from align.dpo.collator import PairCollator, pair_dataset
from align.dpo.held_out import LookAtHeldOut, split_pairs, what_was_kept
from align.dpo.qlora import quantization
from align.dpo.recomputation import choose_recomputation, largest_batch
from align.dpo.reference import Reference, ReferenceKey, pairs_hash, reference_log_probs
from align.dpo.rows import RowBatch, by_question, pair_weights
from align.dpo.save import save_trained
from align.dpo.settings import (
    checkpointing_field,
    effective_settings,
    own_batches,
    planned_steps,
    training_arguments,
    training_fields,
    with_warmup_that_ends,
)
from align.dpo.sharding.shards import gathered_as_needed, init_deepspeed, loading_sharded
from align.dpo.sharding.strategies import (
    check_distribution,
    strategy_fields,
)
from align.dpo.tokenize import TokenizedPair, check_lengths, tokenize_pairs
from align.dpo.trainer import PairTrainer
from align.dpo.trainer_checkpoints import last_checkpoint
from align.dpo.turns import turn_faults
from align.engines.prompts import check_prompts
from align.errors import UserError
from align.log import log
from align.media.images import question_images
from align.models.limits import position_limit
from align.models.load import load_model, load_processor, read_config
from align.models.lora import adapter_outside, is_quantised, lora_config
from align.models.modules import count_parameters, freeze_parts
from align.monitoring.cost import count_tokens
from align.records import Pair
from align.run.folder import Round
from align.run.hashes import checkpoint_hash, text_hash
from align.tracking.trackers import Trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STAGE = "dpo"


@dataclass(frozen=True)
class TrainingData:
    """Tokenised pairs that fit, those held out of training among them apart; the collator, counts and notes."""

    pairs: list[TokenizedPair]
    held_out: list[TokenizedPair]
    collator: PairCollator
    counts: dict[str, Any]
    notes: dict[str, str]


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

    def run(self, given: list[Pair], unreadable: Collection[str] = ()) -> None:
        """Train on the pairs, save, and mark the stage complete; pairs with `unreadable` images are left out."""
        started = time.monotonic()
        data = self._prepare(given, unreadable)
        with loading_sharded(self.strategy == "zero3", self.dtype):
            model = self.load(self.policy)
            with gathered_as_needed(model), self._autocast():
                layout, note = choose_layout(self.config.shared_prefix, model, data.collator, self._first(data.pairs))
            if layout == "plain" and self.config.dpo.image_preference is not None:
                raise UserError(f"dpo.image_preference needs shared prompts, which cannot be used: {note}")
            collator = replace(data.collator, layout=layout)
            own = own_batches(self.config, self.fields, data.pairs, shared=layout == "shared")
            live = self.config.dpo.reference == "live"
            reference = None if live else self._reference(model, data.pairs + data.held_out, collator)
        reference_s = time.monotonic() - started
        fields = with_warmup_that_ends(self.fields, planned_steps(self.fields, len(data.pairs), world_size(), own))
        largest = largest_batch(data.pairs, fields, own, 1 if self.config.dpo.image_preference is None else 2)
        recomputation = choose_recomputation(
            self.config, self.policy, fields, largest, layout=layout, strategy=self.strategy, device=self.device
        )
        fields |= {checkpointing_field(): recomputation.checkpointing}
        arguments = training_arguments(strategy_fields(self.strategy, model) | fields, self.config.dpo.trainer_fields())
        if is_deepspeed_zero3_enabled():
            # Freed here, where its last name is: there may not be room for it and the shards.
            del model
            gc.collect()
            accelerator.empty_cache()
            init_deepspeed()
            model = self.load(self.policy)
        trained, held_out = self._datasets(data, reference, own)
        trainer = self.make_trainer(
            model,
            arguments,
            trained,
            collator,
            kept_layers=recomputation.kept_layers,
            batches=own,
            held_out=held_out,
        )
        check_distribution(self.strategy, trainer.accelerator.distributed_type)
        parameters = count_parameters(trainer.model)
        self._train(trainer)
        code = self.config.save.code
        save_trained(trainer, collator.processor, self.this.checkpoint, policy=self.policy, load=self.load, code=code)
        if trainer.is_world_process_zero():
            notes = {"shared_prefix": note} | self._rows_note(layout)
            facts = {"parameters": parameters, "training": effective_settings(arguments)}
            self._finish(trainer, data, notes, reference_seconds=round(reference_s, 3), **facts)
        trainer.accelerator.wait_for_everyone()

    def _finish(self, trainer: PairTrainer, data: TrainingData, notes: dict[str, str], **facts: Any) -> None:
        """Mark the stage complete, and remove the trainer checkpoints, which nothing needs any more."""
        counts = _counts(trainer) | data.counts
        # Of all processes and of earlier attempts; what the reference reads comes on top.
        count_tokens(read=counts["tokens"])
        kept = what_was_kept(self.config.dpo, trainer.state, len(data.held_out))
        self.this.manifest.finish(
            STAGE,
            outputs=[self.this.checkpoint],
            counts=counts,
            notes=notes | kept | data.notes | note_on_batch(self.this.trainer) | self.trackers.notes,
            parent=self.policy,
            **facts,
        )
        for folder in self.this.trainer.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(folder)

    def _datasets(
        self, data: TrainingData, reference: Reference | None, own: Sequence[RowBatch] | None
    ) -> tuple[Dataset, Dataset | None]:
        """The pairs that are trained on, and those that are looked at, each with what the reference says of them."""
        columns = None if reference is None else reference.columns(self.fields.get("ld_alpha"))
        corrupted = None if reference is None or reference.corrupted is None else reference.corrupted.tolist()
        weights = None if own is None else pair_weights(data.pairs, self.config.dpo.pair_weight)
        # The reference has the held-out pairs behind the others.
        split = len(data.pairs)
        first, rest = slice(None, split), slice(split, None)
        trained, held_out = (
            pair_dataset(pairs, columns and columns[part], weigh, corrupted and corrupted[part])
            for pairs, part, weigh in ((data.pairs, first, weights), (data.held_out, rest, None))
        )
        return trained, held_out if data.held_out else None

    def _prepare(self, given: list[Pair], unreadable: Collection[str]) -> TrainingData:
        """The pairs that fit, tokenised, with what batches them; before any weight is loaded."""
        images = question_images(self.config)
        processor = load_processor(self.policy, **self.config.model.processor)
        check_prompts(processor, self.policy)
        faults = turn_faults(processor, self.policy)
        for fault in faults:
            log.warning("%s", fault)
        max_length = self.config.dpo.max_length or position_limit(read_config(self.policy))
        tokenized = tokenize_pairs(given, processor, images, unreadable)
        pairs = self._that_fit(tokenized.pairs, max_length)
        num_dropped = len(tokenized.pairs) - len(pairs)
        settings = self.config.dpo
        held_out: list[TokenizedPair] = []
        if settings.eval_steps is not None:
            pairs, held_out = split_pairs(pairs, settings.held_out, self.config.seed)
        planned_steps(self.fields, len(pairs), world_size(), own_batches(self.config, self.fields, pairs))
        # Processes that exchange weights or gradients module by module must all run the same modules. Alone as well,
        # so that it makes no difference: Adam moves on with a gradient of 0, but not without one.
        pool = tuple(sorted({name for pair in pairs + held_out for name in pair.image_files}))
        preference = self.config.dpo.image_preference
        if preference is not None and not pool:
            raise UserError("dpo.image_preference: none of the pairs has a picture", fix="take it out")
        dropped = {reason: len(ids) for reason, ids in tokenized.dropped.items()}
        return TrainingData(
            pairs=pairs,
            held_out=held_out,
            collator=PairCollator(
                processor,
                images,
                "shared",
                max_length,
                always_images=bool(pool),
                grouping=self.config.dpo.rows,
                corruption=None if preference is None else preference.corruption,
                seed=self.config.seed,
                pool=pool,
            ),
            counts={"dropped_too_long": num_dropped} | ({"dropped": dropped} if dropped else {}),
            notes={"turns": "; ".join(faults)} if faults else {},
        )

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
        self,
        model: PreTrainedModel,
        args: Any,
        dataset: Any,
        collator: PairCollator,
        *,
        kept_layers: int = 0,
        batches: Sequence[RowBatch] | None = None,
        held_out: Dataset | None = None,
    ) -> PairTrainer:
        """The trainer of the round, with its adapter or frozen parts, its reference and its callbacks."""
        settings = self.config.dpo
        adapter = lora_config(settings.lora)
        if adapter is None:
            freeze_parts(model, settings.freeze)
        else:
            adapter = adapter_outside(model, adapter, settings.freeze)
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
            batches=batches,
            eval_dataset=held_out,
            image_preference=settings.image_preference,
            starts_at_reference=settings.reference != "initial" or self.policy == self.config.policy,
            callbacks=[
                MetricsFile(self.this.trainer / "metrics.jsonl"),
                StepProgress(f"round {self.this.number}: dpo"),
                StepTracker(self.trackers),
                *([] if held_out is None else [LookAtHeldOut(settings)]),
            ],
        )

    def _first(self, pairs: list[TokenizedPair]) -> list[TokenizedPair]:
        """The pairs of the first rows, for a look at what sharing prompts does."""
        size = self.fields["per_device_train_batch_size"]
        if self.config.dpo.rows == "pair":
            return pairs[:size]
        return [pairs[index] for group in by_question(pairs)[:size] for index in group]

    def _that_fit(self, pairs: list[TokenizedPair], max_length: int | None) -> list[TokenizedPair]:
        if max_length is None:
            return pairs
        drop = check_lengths(pairs, max_length, drop=self.config.dpo.on_too_long == "drop")
        if drop:
            log.warning("%d of %d pairs do not fit in %d tokens and are dropped", len(drop), len(pairs), max_length)
        return [pair for pair in pairs if pair.id not in drop]

    def _reference(self, model: PreTrainedModel, pairs: list[TokenizedPair], collator: PairCollator) -> Reference:
        checkpoint = self.config.policy if self.config.dpo.reference == "initial" else self.policy
        key = ReferenceKey(
            weights=checkpoint_hash(checkpoint),
            processor=text_hash(checkpoint_hash(self.policy), json.dumps(self.config.model.processor, sort_keys=True)),
            pairs=pairs_hash(pairs, collator.images),
            layout=collator.layout,
            arithmetic=f"{self.dtype}/{self._autocast_dtype}".replace("torch.", "") + self._bits(),
            max_length=str(collator.max_length),
            corruption="" if collator.corruption is None else f"{collator.corruption}/{collator.seed}",
        )
        return reference_log_probs(
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

    def _rows_note(self, layout: str) -> dict[str, str]:
        if layout == "shared" or self.config.dpo.rows == "pair":
            return {}
        return {"rows": "dpo.rows: question had no effect, every response repeats its prompt"}

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
        """Train from the last trainer checkpoint, if there is one; SystemExit when asked to stop on the way."""
        last = last_checkpoint(self.this.trainer, world_size())
        if last is not None:
            log.info("training resumes from %s", last)
        stop = StopOnSignal()
        trainer.add_callback(stop)
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        state = trainer.state
        # One process may have been asked to stop after the last step, when nobody asks any more.
        if stop.agreed(trainer.args.device):
            log.info(
                "stopped at step %d of %d; `align dpo --round %d` resumes from there",
                state.global_step,
                state.max_steps,
                self.this.number,
            )
            raise SystemExit(0)


def _counts(trainer: PairTrainer) -> dict[str, Any]:
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = steps[-1] if steps else {}
    return {
        "pairs": len(trainer.train_dataset),
        "steps": trainer.state.global_step,
        "tokens": int(last.get("num_tokens", 0)),
        "loss": last.get("loss"),
        "reward_accuracy": last.get("rewards/accuracies"),
        "reward_margin": last.get("rewards/margins"),
    }

"""TRL's DPOTrainer with our batches: how pairs are laid out, where the reference comes from,
which parts learn how fast.

Losses, metrics and the training loop are TRL's and transformers'; `_compute_loss` is not overridden. What is changed:

* the dataset holds tokenised pairs and is left alone (`align.dpo.collator` does the work);
* reference log-probabilities come with the batch when the dataset has them, and then no second model is kept;
* batches of the shared layout are understood (`align.dpo.shared_forward`);
* batches may be rows of questions, or fill a budget of tokens (`align.dpo.rows`), and pairs may weigh differently;
* the projector may have a learning rate of its own;
* resuming loads every weight of a vision-language model;
* the first loss must be that of a policy that equals the reference (`align.dpo.first_step`);
* a loss or gradient that is not finite stops the run at the last good state and names the pairs of the step.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from align.config import ImagePreference
from align.dpo.collator import CORRUPTED_REFERENCE, HAS_PICTURE, REFERENCE_COLUMNS, WEIGHT_COLUMN, PairCollator
from align.dpo.first_step import RecordedForward, difference, noise_in, response_sums, tolerance_of
from align.dpo.gradient_checkpointing import checkpoint_what_is_needed
from align.dpo.image_preference import PictureRewards, picture_loss
from align.dpo.rows import RowBatch, RowBatches
from align.dpo.sharding.dummy_batches import add_dummy_rows
from align.dpo.sharding.strategies import keep_outputs_exact
from align.dpo.shared_forward import add_shared_rows
from align.dpo.trainer_checkpoints import remove_older, seal, unseal
from align.errors import UserError, writing_failed
from align.log import log
from align.models.modules import check_projector, part_names
from align.prefix.rows import unwrap

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# What TRL's loss and metrics read of a forward, beside `log_sum_sq_probs` for WPO weights.
METRIC_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


class PairTrainer(DPOTrainer):
    """DPO on image preference pairs.

    `train_dataset` comes from `align.dpo.collator.pair_dataset`. With its reference columns no reference model is
    needed; without them `ref_model` runs beside the policy, or, with `peft_config`,
    the policy without its adapter does.
    """

    _tag_names = ("trl", "dpo")
    # TRL's own, which it does not declare.
    _metrics: dict[str, dict[str, list[float]]]
    precompute_ref_logps: bool

    def __init__(
        self,
        model: nn.Module,
        *,
        args: DPOConfig,
        train_dataset: Dataset,
        data_collator: PairCollator,
        processor: ProcessorMixin,
        ref_model: nn.Module | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        projector_learning_rate_multiplier: float = 1.0,
        kept_layers: int = 0,
        starts_at_reference: bool = False,
        batches: Sequence[RowBatch] | None = None,
        image_preference: ImagePreference | None = None,
        eval_dataset: Dataset | None = None,
    ) -> None:
        cached = set(REFERENCE_COLUMNS) <= set(train_dataset.column_names)
        assert cached or ref_model is not None or peft_config is not None, "no reference: neither cached nor live"
        args.remove_unused_columns = False
        # With this TRL loads no reference model; `_precompute_ref_logps` then finds that there is nothing to compute.
        args.precompute_ref_log_probs = cached
        checkpoint_what_is_needed(model, kept_layers)
        with _reference_is_cached() if cached else nullcontext():
            super().__init__(
                model=model,
                ref_model=None if cached else ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processor,
                callbacks=callbacks,
                peft_config=peft_config,
            )
        self.projector_learning_rate_multiplier = projector_learning_rate_multiplier
        self.batches = batches
        self.image_preference = image_preference
        # Turns the sum of a micro-batch's weights into its share of a step.
        self._weight_scale: float | torch.Tensor | None = None
        # Whether the micro-batch is one that counts nothing: see `_silence_repeated`.
        self._counts_nothing = False
        if batches is not None and self.accelerator.num_processes > 1:
            self.accelerator.gather = gather_uneven(self.accelerator.gather, lambda: self._counts_nothing)
        self._pairs_of_step: list[int] = []
        self._first_to_check = starts_at_reference
        self._total_train_tokens = 0
        self.remove_callback(PrinterCallback)
        if data_collator.layout == "shared":
            self._share_prompts()
        elif data_collator.always_images:
            for trained_or_not in filter(None, (self.model, self.ref_model)):
                add_dummy_rows(unwrap(self.accelerator.unwrap_model(trained_or_not)))

    def _share_prompts(self) -> None:
        assert not self.aux_loss_enabled, "the load-balancing loss of experts needs the plain layout"
        weights = ["log_sum_sq_probs"] if self.use_weighting else []
        add_shared_rows(unwrap(self.model), (*METRIC_OUTPUTS, *weights))
        if self.ref_model is not None:
            add_shared_rows(self.accelerator.unwrap_model(self.ref_model), autocast=self.accelerator.autocast)

    # What TRL does to data sets and around training, and is not wanted here.

    def _prepare_dataset(self, dataset: Dataset, *unused: Any, **unused_too: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *unused: Any, **unused_too: Any) -> Dataset:
        return dataset

    def _send_telemetry(self) -> None:
        """TRL reports what is trained to its makers; this toolkit reports nothing to anybody."""

    def create_model_card(self, *unused: Any, **unused_too: Any) -> None:
        """TRL's card would stand in every trainer checkpoint; ours is written once, into the finished checkpoint."""

    # Batches and what their pairs count.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of rows where they were given (`align.dpo.rows`), else transformers' own."""
        if self.batches is None:
            return super().get_train_dataloader()
        args = self.args
        per_step = args.gradient_accumulation_steps * self.accelerator.num_processes
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=RowBatches(self.batches, args.seed, lambda: int(self.state.epoch or 0), per_step),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step; what all their pairs weigh, in all processes, is noted for `compute_loss`."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._silence_repeated(batches)
        if batches and WEIGHT_COLUMN in batches[0]:
            total = torch.stack([batch[WEIGHT_COLUMN].sum() for batch in batches]).sum().to(device)
            total = self.accelerator.reduce(total, "sum")
            # transformers divides by the micro-batches, and by the processes.
            self._weight_scale = len(batches) * self.accelerator.num_processes / total
        return batches, num_items

    def _silence_repeated(self, batches: list[dict[str, Any]]) -> None:
        """Let a batch count nothing that accelerate has repeated, so that all processes have equally many in an epoch.

        Without that, pairs of the first batches would count twice, and which ones would depend on the processes.
        """
        processes = self.accelerator.num_processes
        if self.batches is None or processes == 1:
            return
        in_epoch = math.ceil(len(self.batches) / processes)
        accumulated = self.args.gradient_accumulation_steps
        start = self.state.global_step % math.ceil(in_epoch / accumulated) * accumulated
        for place, batch in enumerate(batches, start=start):
            if place * processes + self.accelerator.process_index >= len(self.batches):
                batch[WEIGHT_COLUMN] = torch.zeros_like(batch[WEIGHT_COLUMN])

    def _weighted(self, loss: torch.Tensor, output: Any, weights: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch as its share of the step's weighted mean.

        TRL's loss is the plain mean over the pairs. Where they weigh differently, the gradient that reaches the
        responses of a pair is scaled; the loss that is logged then counts pairs of one micro-batch alike.
        """
        total = weights.sum()
        if not total:
            return loss * 0.0
        relative = weights / weights.mean()
        if output.log_probs.requires_grad and not bool((relative == 1).all()):
            output.log_probs.register_hook(lambda gradient: gradient * relative.repeat(2)[:, None])
            corrupted = getattr(output, "corrupted_logps", None)
            if corrupted is not None:
                corrupted.register_hook(lambda gradient: gradient * relative)
        return loss * total * (1 / total if self._weight_scale is None else self._weight_scale)

    def create_accelerator_and_postprocess(self) -> None:
        """transformers' way to several devices, with outputs as the model computes them."""
        super().create_accelerator_and_postprocess()
        keep_outputs_exact(self.accelerator)

    # The step.

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of a batch; raises UserError where it is not finite."""
        inputs = dict(inputs)
        if self._total_train_tokens == 0 and self.state.global_step:
            # TRL counts tokens from 0 again when a run is resumed.
            self._total_train_tokens = next(
                (e["num_tokens"] for e in reversed(self.state.log_history) if "num_tokens" in e), 0
            )
        pairs = inputs.pop("pair_index").tolist()
        self._pairs_of_step += pairs if self.model.training else []
        weights = inputs.pop(WEIGHT_COLUMN, None)
        self._counts_nothing = weights is not None and not weights.any()
        ref_corrupted = inputs.pop(CORRUPTED_REFERENCE, None)
        forward = RecordedForward(model)
        result = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        self._stop_unless_finite(loss.detach(), "loss")
        if self._first_to_check and self.state.global_step == 0:
            self._check_reference(loss.detach(), self.loss_at_reference(inputs, forward.output))
        self._first_to_check = False
        if self.image_preference is not None:
            loss = loss + self._picture_loss(inputs, forward.output, ref_corrupted, self.image_preference)
            self._stop_unless_finite(loss.detach(), "loss")
        if weights is not None:
            loss = self._weighted(loss, forward.output, weights)
        return (loss, result[1]) if return_outputs else loss

    def _picture_loss(
        self, inputs: dict[str, Any], output: Any, ref_corrupted: torch.Tensor, settings: ImagePreference
    ) -> torch.Tensor:
        """What image-conditional preference adds to the loss; its metrics are logged beside TRL's."""
        chosen, _ = response_sums(output.log_probs, inputs["completion_mask"], None)
        rewards = PictureRewards.of(
            self.beta, chosen, inputs[REFERENCE_COLUMNS[0]], output.corrupted_logps, ref_corrupted
        )
        loss, metrics = picture_loss(rewards, inputs[HAS_PICTURE], settings)
        mode = "train" if self.model.training else "eval"
        for name, values in metrics.items():
            mean = self.accelerator.gather(values).nanmean()
            if not torch.isnan(mean):
                self._metrics[mode][name].append(mean.item())
        return loss

    def loss_at_reference(self, inputs: dict[str, Any], output: Any) -> torch.Tensor:
        """TRL's loss for the output of a forward where the reference gives the very same log-probabilities."""
        sums = response_sums(output.log_probs.detach(), inputs["completion_mask"], self.ld_alpha)
        equal = inputs | dict(zip(REFERENCE_COLUMNS, sums, strict=True))
        kept = self._metrics, self._total_train_tokens, self.precompute_ref_logps
        # What is computed here is no step: its metrics are not logged, its tokens not counted.
        self._metrics = {mode: defaultdict(list) for mode in self._metrics}
        self.precompute_ref_logps = True
        try:
            with torch.no_grad():
                return self._compute_loss(lambda **_: output, equal, False)
        finally:
            self._metrics, self._total_train_tokens, self.precompute_ref_logps = kept

    def _check_reference(self, loss: torch.Tensor, expected: torch.Tensor) -> None:
        """Raise UserError on every process where the first loss is not that of equal log-probabilities."""
        noise = noise_in(self.model, self.args)
        if noise is not None:
            log.info("the reference is not compared with the policy: there is noise in training (%s)", noise)
            return
        bad = difference(loss, expected, tolerance_of(self.model, self.args))
        if not self.accelerator.reduce(torch.tensor(float(bad), device=self.args.device), "sum"):
            return
        raise UserError(
            f"the first loss is {loss.item():.4f}, and where policy and reference give equal log-probabilities it is "
            f"{expected.item():.4f}: the reference is not the policy that training starts from",
            fix="set dpo.reference: round-start: without its adapter the model is not the policy, since "
            "dpo.lora.init_lora_weights changes the weights below it"
            if isinstance(self.model, PeftModel) and not self.precompute_ref_logps
            else "run again with --redo, which computes the reference again",
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of the tokens that are really computed; transformers would count those of `input_ids`."""
        return super().floating_point_ops({self.model.main_input_name: inputs["attention_mask"]})

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called right before the optimiser steps: the last moment at which the weights are still good."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(grad_norm, DTensor):
            # Of FSDP2's shards: one number in every process, for the check below and for the log.
            grad_norm = grad_norm.full_tensor()
        # With fp16 an infinite norm is usual: the scaler skips that step. Optimisers that own the gradients give none.
        if grad_norm is not None and self.accelerator.scaler is None:
            self._stop_unless_finite(torch.as_tensor(grad_norm, device=self.args.device), "norm of the gradient")
        self._pairs_of_step = []
        return grad_norm

    def _stop_unless_finite(self, value: torch.Tensor, what: str) -> None:
        """Raise UserError on every process when the value of any of them is not finite."""
        bad = (~torch.isfinite(value)).float()
        if not self.accelerator.reduce(bad, "sum"):
            return
        step = self.state.global_step
        state = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step > 0 and not state.exists():
            self._save_checkpoint(self.model, trial=None)
        names = [self.train_dataset[i]["id"] for i in self._pairs_of_step]
        raise UserError(
            f"the {what} is {value.item()} at step {step + 1}, with the pairs {', '.join(names)}; "
            + (f"the state after step {step} is kept in {state}" if step else "nothing has been trained yet"),
            fix="look at these pairs, or lower dpo.learning_rate and run again with --redo",
        )

    # Optimiser.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """TRL's optimiser, with the projector's parameters in groups of their own where their rate differs."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model) if model is not None else super().create_optimizer()
        if fresh and self.projector_learning_rate_multiplier != 1.0:
            self._split_projector(optimizer, model if model is not None else self.model)
        return optimizer

    def _split_projector(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        check_projector(model)
        parts = part_names(model)
        projector = {id(parameter) for name, parameter in model.named_parameters() if parts[name] == "projector"}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in projector]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in projector]
                rate = group["lr"] * self.projector_learning_rate_multiplier
                optimizer.add_param_group({**group, "params": own, "lr": rate})

    # Trainer checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a trainer checkpoint, then its manifest, and only then remove older ones.

        Raises:
            UserError: it cannot be written (a full disk, say); what was written of it is removed.
        """
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        if self.args.should_save:
            unseal(folder)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            reason = writing_failed(error)
            if reason is None:
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(
                f"the trainer checkpoint of step {self.state.global_step} cannot be written: {reason}",
                where=str(folder),
                fix="make room on the disk; the same command resumes from the trainer checkpoint before",
            ) from None
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder)
            remove_older(folder.parent, limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The weights of a trainer checkpoint, under the names they have in memory.

        transformers would write the names of the published checkpoint and, on resuming, not translate them back: most
        weights would silently stay those of the first policy (https://github.com/huggingface/transformers/issues/43701).
        Can go when that is closed in the oldest supported version.
        """
        if isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
            return
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            os.makedirs(folder, exist_ok=True)
            self.model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Resuming with weights missing would train another model: not a warning, but the end."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {id(parameter) for name, parameter in named.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if name in named and id(named[name]) not in loaded]
        if missing or load_result.unexpected_keys:
            raise UserError(
                f"the trainer checkpoint does not fit the model: missing {missing[:3]}, unexpected "
                f"{list(load_result.unexpected_keys)[:3]}",
                where=self.args.output_dir,
                fix="run again with --redo",
            )


def gather_uneven(gather: Callable[[Any], Any], nothing: Callable[[], bool]) -> Callable[[Any], Any]:
    """accelerate's `gather`, also for tensors (n, ...) whose n differs between processes, as TRL's per pair do here.

    `nothing` says that those of this process are left out.
    """

    def gathered(values: Any) -> Any:
        if not isinstance(values, torch.Tensor) or values.ndim == 0:
            return gather(values)
        values = values[:0] if nothing() else values
        counts = gather(torch.tensor([len(values)], device=values.device)).tolist()
        missing = values.new_zeros(max(counts) - len(values), *values.shape[1:])
        parts = gather(torch.cat((values, missing))).split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    return gathered


@contextmanager
def _reference_is_cached() -> Iterator[None]:
    """Within the context TRL's trainer prepares nothing for reference log-probabilities that it will not compute.

    TRL 1.16 would hash all weights, copied to the host (33 GiB for 7B in fp32), to name its own cache, and under FSDP
    load a second model. Can go when it does neither for a dataset that has the columns already.
    """
    replaced = {"hash_module": lambda *_: None, "create_model_from_path": lambda *_, **__: None}
    before = {name: getattr(dpo_trainer, name) for name in replaced}
    for name, function in replaced.items():
        setattr(dpo_trainer, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dpo_trainer, name, function)

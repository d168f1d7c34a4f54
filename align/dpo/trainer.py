"""TRL's DPOTrainer with our batches: how pairs are laid out, where the reference comes from, which parts learn how fast.

Losses, metrics and the training loop are TRL's and transformers'; `_compute_loss` is not overridden. What is changed:

* the data set holds lines of pairs.jsonl and is left alone (`align.dpo.collator` does the work);
* reference log-probabilities come with the batch when the data set has them, and then no second model is kept;
* the projector may have a learning rate of its own;
* resuming loads every weight of a vision-language model;
* a loss that is not a number stops the run and names the pairs of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from align.dpo.shared import add_shared_rows
from align.errors import UserError
from align.prefix.rows import unwrap
from align.records import Pair

# What TRL's loss and metrics read of a forward, beside `log_sum_sq_probs` for WPO weights.
METRIC_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def pair_dataset(pairs: Sequence[Pair], reference: Sequence[tuple[float, float]] | None = None) -> Dataset:
    """The pairs as a data set of lines, with the log-probabilities of the reference where they are known.

    `reference` has one (chosen, rejected) a pair: natural-log probabilities summed over the response's tokens.
    """
    columns: dict[str, Any] = {"pair": [pair.to_line() for pair in pairs], "index": list(range(len(pairs)))}
    if reference is not None:
        for position, name in enumerate(REFERENCE_COLUMNS):
            columns[name] = [values[position] for values in reference]
    return Dataset.from_dict(columns)


class PairTrainer(DPOTrainer):
    """DPO on image preference pairs.

    `train_dataset` comes from `pair_dataset`. With its reference columns no reference model is needed; without them
    `ref_model` runs beside the policy, or, with `peft_config`, the policy without its adapter does.
    """

    _tag_names = ("trl", "dpo")

    def __init__(
        self,
        model: nn.Module,
        *,
        args: DPOConfig,
        train_dataset: Dataset,
        data_collator: Any,
        processor: Any,
        ref_model: nn.Module | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        cached = set(REFERENCE_COLUMNS) <= set(train_dataset.column_names)
        assert cached or ref_model is not None or peft_config is not None, "no reference: neither cached nor live"
        args.remove_unused_columns = False
        # With this TRL loads no reference model; `_precompute_ref_logps` then finds that there is nothing to compute.
        args.precompute_ref_log_probs = cached
        super().__init__(
            model=model,
            ref_model=None if cached else ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            processing_class=processor,
            callbacks=callbacks,
            peft_config=peft_config,
        )
        if data_collator.layout == "shared":
            assert not self.aux_loss_enabled, "the load-balancing loss of experts needs the plain layout"
            add_shared_rows(
                unwrap(self.model), (*METRIC_OUTPUTS, *(["log_sum_sq_probs"] if args.use_weighting else []))
            )
            if self.ref_model is not None:
                reference = self.accelerator.unwrap_model(self.ref_model)
                add_shared_rows(reference, autocast=self.accelerator.autocast)

    def _prepare_dataset(self, dataset: Dataset, *unused: Any, **unused_too: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *unused: Any, **unused_too: Any) -> Dataset:
        return dataset

    def _send_telemetry(self) -> None:
        """TRL reports what is trained to its makers; this toolkit reports nothing to anybody."""

    def create_model_card(self, *unused: Any, **unused_too: Any) -> None:
        """TRL's card would stand in every intermediate state; ours is written once, into the finished checkpoint."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        index = inputs.pop("pair_index")
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if not torch.isfinite(loss):
            self._stop_at_bad_loss(loss, index)
        return result

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of the tokens that are really computed; transformers would count those of `input_ids`."""
        return super().floating_point_ops({self.model.main_input_name: inputs["attention_mask"]})

    def _stop_at_bad_loss(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        names = [Pair.model_validate_json(self.train_dataset[int(i)]["pair"]).id for i in index]
        raise UserError(
            f"the loss is {loss.item()} at step {self.state.global_step + 1}; the batch held the pairs {', '.join(names)}",
            fix="look at these pairs, or lower dpo.learning_rate",
        )

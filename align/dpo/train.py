"""Stage 3: pairs.jsonl in, a checkpoint out: DPO of the round's policy with every question encoded once.

The reference's log-probabilities are computed (once per round) before training and kept. A training that was killed
resumes from its last trainer checkpoint, with the same data order, optimiser and random state. The finished checkpoint
has the form of the one it started from.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from align import accelerator
from align.config import Config
from align.distributed.ranks import EXIT_RESTART, start_process_group, world_size
from align.dpo.auto_batch_size import remember_smaller_batch
from align.dpo.check import check_trained
from align.dpo.optimizers import check_rounding
from align.dpo.qlora import quantization
from align.dpo.settings import training_fields
from align.dpo.sharding.strategies import (
    chosen_strategy,
    process_group_backend,
    process_state,
    without_compiled_collectives,
)
from align.dpo.stage import STAGE, DpoStage
from align.errors import UserError, is_out_of_memory
from align.log import log
from align.media.images import question_images
from align.models.device import DTYPES, pick_device
from align.records import Pair, read_jsonl
from align.run.folder import Round, RunDir
from align.run.hashes import checkpoint_hash, content_hash
from align.run.image_hashes import record_images, record_or_verify_images, unreadable_images
from align.run.parents import starts_from
from align.tracking.trackers import Trackers, tracking


def run_dpo(config: Config, number: int) -> None:
    """Train a round; does nothing when the round has been trained already.

    Raises:
        UserError: the round before is not complete, the settings or the pairs cannot be used,
            or the loss is not finite.
        SystemExit: with code 0, after SIGTERM; the same command resumes from the state that was saved. With the code
            EXIT_RESTART, in one of several processes, when memory ran out and a smaller batch has been noted.
    """
    run = RunDir(config.run_dir)
    this = run.round(number)
    parent = starts_from(config, run, number)
    policy = run.checkpoint(parent, config.policy)
    device = pick_device(config.model.device)
    dtype = training_dtype(config.model.dtype)
    strategy = chosen_strategy(config, device)
    quantization(config.dpo.lora, device, strategy)
    check_trained(config, policy)
    without_compiled_collectives(strategy, device)
    backend = process_group_backend(strategy, device)
    if backend is not None:
        torch.cuda.set_device(device)
        start_process_group(backend)
    fields = training_fields(config, this.trainer, device, dtype)
    lost = check_rounding(fields, dtype, adapter=config.dpo.lora is not None, strategy=strategy)
    if lost is not None:
        log.warning("%s", lost)
    state = process_state(fields)
    pairs = read_pairs(this)
    with state.main_process_first():
        if state.is_main_process:
            this.manifest.begin(
                STAGE, settings=_settings(config), inputs=_inputs(config, this, run.trained_hash(parent, policy))
            )
        if this.manifest.complete(STAGE):
            log.info("round %d is trained already: %s", number, this.checkpoint)
            return
        if state.is_main_process:
            _compare_images(config, this, pairs)
        unreadable = unreadable_images(this.image_hashes, question_images(config), pairs)
    # Opened before any weights are: a login that is missing is reported at once.
    with (
        tracking(config, f"round-{number}") if state.is_main_process else contextlib.nullcontext(Trackers()) as trackers
    ):
        stage = DpoStage(config, this, policy, device, dtype, strategy, state, trackers)
        while not _train_within_memory(stage, pairs, unreadable):
            gc.collect()
            accelerator.empty_cache()


def _compare_images(config: Config, this: Round, pairs: list[Pair]) -> None:
    """Hold the pairs' images against what the round was shown so far.

    Where pairs were brought and nothing is trained yet, images may still be replaced: the reference is keyed by them.
    """
    images = question_images(config)
    brought = this.number == 1 and config.pairs_file is not None
    if brought and not any(this.trainer.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        record_images(this.image_hashes, images, pairs, anew=True)
    else:
        record_or_verify_images(this.image_hashes, images, pairs)


def _train_within_memory(stage: DpoStage, pairs: list[Pair], unreadable: Collection[str]) -> bool:
    """Train with the batch that is known to fit; False where it did not, and half of it should be tried."""
    stage.fit_batch()
    try:
        stage.run(pairs, unreadable)
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        remember_smaller_batch(stage.this.trainer, stage.fields, stage.config.dpo.tokens_per_batch)
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
            fix=(
                f"make them again (align pairs --round {this.number} --redo), with a lower pairs.min_margin; "
                "raise sample.num_responses or temperature; or look at scores.jsonl"
            ),
        )
    twice = [id_ for id_, count in Counter(pair.id for pair in pairs).items() if count > 1]
    if twice:
        raise UserError(
            f"{len(twice)} ids are duplicated, such as {twice[0]!r}",
            where=str(this.pairs),
            fix=f"take one of the two lines out, or make the pairs again: align pairs --round {this.number} --redo",
        )
    return pairs


def training_dtype(setting: str) -> torch.dtype:
    """The dtype of the trained weights: float32 unless another is asked for.

    Steps of a learning rate of 5e-7 are smaller than bfloat16 can tell apart: weights kept in it would not move.
    """
    return torch.float32 if setting == "auto" else DTYPES[setting]


def _settings(config: Config) -> dict[str, Any]:
    return {
        # Who gets the metrics, and under which name, changes none of them.
        "dpo": config.dpo.model_dump(exclude={"report_to", "run_name"}),
        "seed": config.seed,
        "shared_prefix": config.shared_prefix,
        "dtype": config.model.dtype,
        "processor": config.model.processor,
        "image_conversion": config.model.image_conversion,
    }


def _inputs(config: Config, this: Round, policy_hash: str) -> dict[str, str]:
    inputs = {"pairs": content_hash(this.pairs), "policy": policy_hash}
    if config.dpo.reference == "initial":
        inputs["reference"] = checkpoint_hash(config.policy)
    return inputs

"""The `dpo:` section in, TRL's `DPOConfig` out: every field of it can be set, unknown and dangerous ones are refused.

What the recipe of LLaVA-Critic says, and not TRL's own defaults, holds where nothing is set: one epoch, learning rate
5e-7, cosine with a tenth of warm-up, no weight decay, eight pairs per step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from transformers.integrations import integration_utils
from trl import DPOConfig

from align import accelerator
from align.config import Config, DpoSettings
from align.dpo.held_out import evaluation_faults, evaluation_fields
from align.dpo.rows import RowBatch, make_batches
from align.dpo.tokenize import TokenizedPair
from align.errors import UserError
from align.log import log
from align.tracking.trackers import OF_TRANSFORMERS, check_trackers, tracker_names

RECIPE: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 5e-7,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "beta": 0.1,
    "logging_steps": 1,
    "save_total_limit": 1,
}
# Fields that belong to the toolkit, and why.
OWN_FIELDS = {
    "output_dir": "the round's folder is the place",
    "remove_unused_columns": "the collator needs every column",
    "truncation_mode": "nothing is ever truncated: see dpo.max_length and dpo.on_too_long",
    "precompute_ref_log_probs": "reference log-probabilities are always cached: see dpo.reference",
    "precompute_ref_batch_size": "reference log-probabilities are computed per_device_train_batch_size at a time",
    "model_init_kwargs": "the checkpoint is opened as the model: section says",
    "trust_remote_code": "no code from a checkpoint is ever run",
    "resume_from_checkpoint": "the same command always resumes from the last trainer checkpoint",
    "eval_strategy": "held-out pairs are looked at every dpo.eval_steps",
    "load_best_model_at_end": "see dpo.keep",
    "metric_for_best_model": "see dpo.keep_metric",
    "greater_is_better": "see dpo.keep_metric",
    "per_device_eval_batch_size": "held-out pairs come as many at a time as others",
    "push_to_hub": "nothing is uploaded",
    "hub_token": "nothing is uploaded, and a configuration is no place for secrets",
    "padding_free": "it has no effect in this version of TRL",
    "pad_token": "the processor's own is used",
    "use_cpu": "see model.device",
    "use_liger_kernel": "log-probabilities come of the toolkit's own forward, which its kernels do not know",
    "save_only_model": "a training that was stopped resumes with its optimiser",
}
# The losses of TRL 1.16 (`DPOTrainer._compute_loss`), which names them when the first batch has been computed.
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# The losses that read `label_smoothing`.
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}
MINIMA = {
    "dataloader_num_workers": 0,
    "warmup_steps": 0,
    "learning_rate": 0,
    "beta": 0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "max_grad_norm": 0,
    "weight_decay": 0,
}
HINTS = {"warmup_ratio": "warmup_steps takes a ratio when it is below 1"}


# `dpo.gradient_checkpointing`: as many layers are recomputed as memory demands (`align.dpo.recomputation`).
AUTO = "auto"


def checkpointing_field() -> str:
    """What this version of transformers calls gradient checkpointing."""
    known = {field.name for field in dataclasses.fields(DPOConfig)}
    return "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"


def trl_fields() -> set[str]:
    """The fields of TRL's DPOConfig that can be given."""
    return {field.name for field in dataclasses.fields(DPOConfig) if field.init}


def check_fields(settings: DpoSettings) -> None:
    """Raise UserError that lists every key of the section that is neither ours nor TRL's to set."""
    trl = trl_fields()
    known = sorted((trl - OWN_FIELDS.keys()) | DpoSettings.model_fields.keys())
    problems = []
    for name in settings.trainer_fields():
        if name in OWN_FIELDS:
            problems.append(f"dpo.{name} cannot be set: {OWN_FIELDS[name]}")
        elif name not in trl:
            near = get_close_matches(name, known, n=1)
            hint = HINTS.get(name) or (f"did you mean {near[0]!r}?" if near else "it is no field of TRL's DPOConfig")
            problems.append(f"dpo.{name}: unknown key ({hint})")
    problems += _type_faults(settings) + _row_faults(settings) + evaluation_faults(settings)
    if problems:
        raise UserError("the dpo section has faults:\n" + "\n".join(f"  - {problem}" for problem in problems))


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(DPOConfig)


def _kinds(name: str) -> set[Any]:
    """What a field of TRL's may be, None left out."""
    hint = _hints().get(name)
    return {*(get_args(hint) or (hint,))} - {type(None)}


def _type_faults(settings: DpoSettings) -> list[str]:
    """What is no truth value, or no finite number, where TRL's fields are one: dataclasses take what they are given."""
    problems = []
    for name, value in settings.trainer_fields().items():
        kinds = _kinds(name)
        if value is None or name in OWN_FIELDS or value == AUTO or not kinds or not kinds <= {bool, int, float}:
            continue
        if kinds == {bool}:
            if not isinstance(value, bool):
                problems.append(f"dpo.{name}: expected true or false, found {value!r}")
        elif (number := _number(value)) is None or (float not in kinds and not number.is_integer()):
            problems.append(f"dpo.{name}: expected a {'finite' if float in kinds else 'whole'} number, found {value!r}")
    return problems


def _number(value: Any) -> float | None:
    """A finite number, also one as text ("1e-6" is text in YAML); None for anything else."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _with_numbers(given: dict[str, Any]) -> dict[str, Any]:
    """The user's fields with numbers where they wrote a number as text, such as "5e-7" in quotes."""
    found = dict(given)
    for name, value in given.items():
        kinds = _kinds(name)
        if isinstance(value, str) and value != AUTO and kinds and kinds <= {int, float}:
            number = _number(value)
            found[name] = number if number is None or float in kinds else int(number)
    return found


# Losses that compare distributions over a batch: a pair has no share of its own in them.
OVER_BATCHES = {"aot", "aot_unpaired"}


def _row_faults(settings: DpoSettings) -> list[str]:
    """What cannot be set beside `rows`, `pair_weight` and `tokens_per_batch`."""
    given = settings.trainer_fields()
    problems = []
    if settings.rows == "question" or settings.tokens_per_batch is not None:
        which = "rows: question" if settings.rows == "question" else "tokens_per_batch"
        problems += [
            f"dpo.{name} cannot be set with dpo.{which}, which makes batches of its own"
            for name in ("dataloader_drop_last", "train_sampling_strategy", "group_by_length")
            if given.get(name)
        ]
    elif settings.pair_weight == "question":
        problems.append("dpo.pair_weight: question needs dpo.rows: question (or dpo.tokens_per_batch)")
    if settings.tokens_per_batch is not None and "per_device_train_batch_size" in given:
        problems.append("dpo.per_device_train_batch_size has no effect: dpo.tokens_per_batch is set")
    kinds = given.get("loss_type")
    apart = OVER_BATCHES & set(kinds if isinstance(kinds, list) else [kinds])
    if settings.pair_weight == "question" and apart:
        problems.append(
            f"dpo.pair_weight: question has no meaning for the loss {', '.join(sorted(apart))}, which compares "
            "distributions over a batch"
        )
    if settings.image_preference is not None:
        if settings.image_preference.weight == settings.image_preference.anchor == 0:
            problems.append("dpo.image_preference has no effect: weight and anchor are 0")
        if settings.reference == "live":
            problems.append(
                "dpo.image_preference needs cached reference log-probabilities: set dpo.reference: round-start"
            )
        if given.get("ld_alpha") is not None:
            problems.append(
                "dpo.image_preference has no meaning with dpo.ld_alpha, which weighs tokens by the rejected one"
            )
    return problems


def training_fields(config: Config, output_dir: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a round's training on `device` with weights of `dtype` sets of TRL's DPOConfig, by name.

    On a GPU that has bfloat16, float32 weights are trained with bfloat16 arithmetic (autocast). Log-probabilities and
    losses are float32 everywhere.

    Raises:
        UserError: a field is unknown or not to be set.
    """
    check_fields(config.dpo)
    if config.dpo.image_preference is not None and config.shared_prefix == "off":
        raise UserError("dpo.image_preference needs shared prompts", fix="set shared_prefix: auto")
    others = trackers_of_transformers(config)
    on_gpu = device.type != "cpu"
    fields = RECIPE | {
        "bf16": dtype != torch.float16 and accelerator.has_bfloat16(device),
        "gradient_checkpointing": AUTO if on_gpu else False,
        "dataloader_pin_memory": on_gpu and device.type not in accelerator.ALONE,
        # Images are opened and cut up while the GPU computes.
        "dataloader_num_workers": 4 if on_gpu else 0,
        "seed": config.seed,
    }
    fields |= _with_numbers(config.dpo.trainer_fields()) | {
        "output_dir": str(output_dir),
        "remove_unused_columns": False,
        "max_length": None,
        "use_cpu": not on_gpu,
        "disable_tqdm": True,
        "report_to": others or "none",
    }
    batch_size = 1 if config.dpo.tokens_per_batch is not None else fields["per_device_train_batch_size"]
    fields |= evaluation_fields(config.dpo, batch_size)
    fields.setdefault("run_name", f"{config.name} {output_dir.parent.name}")
    return _by_their_new_names(fields)


def training_arguments(fields: dict[str, Any], given: dict[str, Any] | None = None) -> DPOConfig:
    """TRL's arguments from `training_fields` and, for a launch, `align.dpo.sharding.strategies.strategy_fields`.

    With a configuration of DeepSpeed's third stage, every model that transformers loads from now on is sharded too, as
    long as the result is alive.

    Raises:
        UserError: a field has a value that TRL or transformers refuse, or that fails when training begins; or a field
            of `given`, the user's own, has no effect.
    """
    try:
        arguments = DPOConfig(**fields)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise UserError(f"TRL refuses the dpo section: {error}") from None
    if arguments.device.type == "cpu":
        # Of several processes each has "cpu:0", a place that torch.load, which transformers 5.17 asks, does not know.
        vars(arguments)["_setup_devices"] = torch.device("cpu")
    check_values(arguments)
    check_effects(arguments, given or {})
    return arguments


# What decides how weights move; paths, logging and launching are left out.
EFFECTIVE = (
    "loss_type", "beta", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "label_smoothing", "disable_dropout", "bf16", "fp16", "gradient_checkpointing",
    "seed",
)  # fmt: skip


def effective_settings(arguments: DPOConfig) -> dict[str, Any]:
    """The settings in effect that decide how weights move, defaults with them, for the manifest and the model card."""
    values = arguments.to_dict()
    return {name: values[name] for name in EFFECTIVE if name in values}


def check_values(arguments: DPOConfig) -> None:
    """Raise UserError for values that TRL takes, and that fail, or turn the training around, when it begins."""
    problems = []
    for name, least in MINIMA.items():
        value = getattr(arguments, name)
        if not isinstance(value, int | float) or not value >= least:
            problems.append(f"dpo.{name}: expected a number of at least {least}, found {value!r}")
    if isinstance(arguments.num_train_epochs, int | float) and arguments.num_train_epochs == 0 >= arguments.max_steps:
        problems.append("dpo.num_train_epochs: expected more than 0, found 0")
    if arguments.beta == 0:
        problems.append("dpo.beta: expected more than 0, found 0")
    if arguments.save_strategy == "steps" and arguments.save_steps <= 0:
        problems.append(f"dpo.save_steps: expected a number above 0, found {arguments.save_steps!r}")
    if arguments.ld_alpha is not None and not 0 <= arguments.ld_alpha <= 1:
        problems.append(f"dpo.ld_alpha: expected a number from 0 to 1, found {arguments.ld_alpha!r}")
    if arguments.f_divergence_type not in DIVERGENCES:
        problems.append(
            f"dpo.f_divergence_type: {arguments.f_divergence_type!r} is none of TRL's: {', '.join(DIVERGENCES)}"
        )
    kinds = [arguments.loss_type] if isinstance(arguments.loss_type, str) else arguments.loss_type or []
    for kind in kinds:
        if kind not in LOSSES:
            problems.append(f"dpo.loss_type: {kind!r} is none of TRL's losses: {', '.join(LOSSES)}")
    if problems:
        raise UserError("the dpo section has faults:\n" + "\n".join(f"  - {problem}" for problem in problems))


def check_effects(arguments: DPOConfig, given: dict[str, Any]) -> None:
    """Raise UserError for settings that TRL takes and that change nothing beside the others that are set."""
    losses = set(arguments.loss_type)
    conditions = {
        "label_smoothing": (
            bool(losses & SMOOTHED) or not arguments.label_smoothing,
            f"only the losses {', '.join(sorted(SMOOTHED))} read it, and loss_type is {', '.join(sorted(losses))}",
        ),
        "discopop_tau": ("discopop" in losses, "only the loss discopop reads it"),
        "f_alpha_divergence_coef": (
            arguments.f_divergence_type == "alpha_divergence",
            "only f_divergence_type: alpha_divergence reads it",
        ),
        "ref_model_mixup_alpha": (arguments.sync_ref_model, "only sync_ref_model reads it"),
        "ref_model_sync_steps": (arguments.sync_ref_model, "only sync_ref_model reads it"),
        "dataset_num_proc": (False, "pairs are tokenised in this process"),
    }
    idle = [
        f"dpo.{name} has no effect: {why}" for name, (used, why) in conditions.items() if name in given and not used
    ]
    if idle:
        raise UserError("the dpo section has faults:\n" + "\n".join(f"  - {problem}" for problem in idle))


def own_batches(
    config: Config, fields: dict[str, Any], pairs: Sequence[TokenizedPair], *, shared: bool = True
) -> list[RowBatch] | None:
    """The batches that the toolkit makes itself; None where they are so many pairs, and TRL's loader makes them.

    Where prompts are not shared (`shared`) there are no rows of questions, and every pair is by itself.

    Raises:
        UserError: a row has more tokens than the budget.
    """
    settings = config.dpo
    if settings.rows == "pair" and settings.tokens_per_batch is None:
        return None
    return make_batches(
        pairs,
        settings.rows if shared else "pair",
        num_rows=fields["per_device_train_batch_size"],
        max_tokens=settings.tokens_per_batch,
        copies=1 if settings.image_preference is None else 2,
        seed=fields["seed"],
    )


def planned_steps(
    fields: dict[str, Any], num_pairs: int, num_processes: int, own: Sequence[RowBatch] | None = None
) -> int:
    """How many optimiser steps a training of so many pairs, or of `own_batches`, takes, as transformers counts them.

    Raises:
        UserError: none, since dataloader_drop_last leaves out every incomplete batch.

    >>> planned_steps(RECIPE, 17, 2), planned_steps(RECIPE | {"num_train_epochs": 3}, 17, 1)
    (2, 9)
    """
    size = fields["per_device_train_batch_size"]
    if own is not None:
        batches = math.ceil(len(own) / num_processes)
    elif fields.get("dataloader_drop_last"):
        batches = num_pairs // size // num_processes
    else:
        batches = math.ceil(math.ceil(num_pairs / size) / num_processes)
    if batches == 0:
        raise UserError(
            f"dpo.dataloader_drop_last leaves out all {num_pairs} pairs: they fill no batch of {size} in each of "
            f"{num_processes} processes",
            fix="take it out, or lower dpo.per_device_train_batch_size",
        )
    if fields.get("max_steps", -1) > 0:
        return fields["max_steps"]
    return math.ceil(math.ceil(batches / fields["gradient_accumulation_steps"]) * fields["num_train_epochs"])


def with_warmup_that_ends(fields: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """The fields with a warm-up that leaves a step to learn in: the first step of a warm-up has rate 0.

    Where it would take all of them there is none, and that is said.

    >>> with_warmup_that_ends(RECIPE, 1)["warmup_steps"], with_warmup_that_ends(RECIPE, 2)["warmup_steps"]
    (0, 0.1)
    """
    warmup = fields["warmup_steps"]
    steps = math.ceil(num_steps * warmup) if warmup < 1 else int(warmup)
    if steps < num_steps or fields["lr_scheduler_type"] == "constant":
        return fields
    log.warning(
        "dpo.warmup_steps is %g, and there are %d steps: no warm-up, which would take all of them", warmup, num_steps
    )
    return fields | {"warmup_steps": 0}


def trackers_of_transformers(config: Config) -> list[str]:
    """The trackers of dpo.report_to that transformers serves; raises UserError where one cannot be used."""
    check_trackers(config)
    others = [name for name in tracker_names(config) if name in OF_TRANSFORMERS]
    for name in others:
        is_available = getattr(integration_utils, f"is_{name}_available", None)
        try:
            if is_available is None:
                integration_utils.INTEGRATION_TO_CALLBACK[name]()
            missing = is_available is not None and not is_available()
        except (RuntimeError, ImportError):
            missing = True
        if missing:
            raise UserError(
                f"dpo.report_to names {name}, but its package is not installed",
                fix=f"install it, or take {name} out of dpo.report_to",
            )
    return others


def _by_their_new_names(fields: dict[str, Any]) -> dict[str, Any]:
    """transformers has renamed gradient checkpointing; both names can be set, and both versions are understood."""
    known = {field.name for field in dataclasses.fields(DPOConfig)}
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if new in known and old in fields:
            value = fields.pop(old)
            fields.setdefault(new, value)
    return fields

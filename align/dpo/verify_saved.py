"""A saved checkpoint and the model that was trained in; an error out where the folder does not open as that model.

The folder is opened again, as anybody would open it, and held against the trained weights: every tensor by name, shape
and value, so also what config.json ties together; what is computed from config.json (rotary angles); and, where that is
cheap, the log-probabilities of a pair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from align.dpo.collator import TRAINER_COLUMNS, PairCollator
from align.dpo.reference_pass import response_log_probs
from align.dpo.shared_forward import log_prob_head
from align.errors import UserError
from align.log import log
from align.models.load import load_model
from align.models.weights import weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A forward on the CPU that takes longer than about a minute is left out.
MAX_OPERATIONS = 1e14
# Nats per token, on average. Weights that are stored in half precision, or ran in it, differ by their rounding.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1


@dataclass(frozen=True)
class Probe:
    """A batch of one pair with the log-probabilities (2,) that the trained model gave its responses, in nats."""

    batch: dict[str, Tensor]
    sums: Tensor
    num_tokens: int
    shared: bool
    half: bool

    @classmethod
    def take(cls, trainer: Any) -> Probe | None:
        """The shortest pair under the trained model; None where its weights are sharded, and a forward is not cheap."""
        if is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled:
            return None
        collator: PairCollator = trainer.data_collator
        lengths = trainer.train_dataset["length"]
        row = trainer.train_dataset[min(range(len(lengths)), key=lengths.__getitem__)]
        batch = collator([row])
        for name in TRAINER_COLUMNS:
            batch.pop(name, None)
        model = trainer.model_wrapped
        was_training = model.training
        model.eval()
        with torch.no_grad(), trainer.accelerator.autocast():
            _, sums, _ = response_log_probs(model, dict(batch), contextlib.nullcontext)
        model.train(was_training)
        half = trainer.args.bf16 or trainer.args.fp16 or trainer.model.dtype in (torch.bfloat16, torch.float16)
        num_tokens = int(batch["completion_mask"].sum())
        return cls(batch, sums.float().cpu(), num_tokens, collator.layout == "shared", half)


def verify_saved(
    folder: Path, model: PreTrainedModel, weights: Mapping[str, Tensor], probe: Probe | None, dtype: torch.dtype | None
) -> None:
    """Open the folder again and compare it with the trained `model`, whose `weights` by name were stored as `dtype`.

    Raises:
        UserError: they differ, with the first tensor that does.
    """
    trained_dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    reopened = load_model(folder, dtype=trained_dtype, device="cpu")
    fault = _different_tensor(reopened, weights, dtype) or _different_buffer(reopened, model)
    if fault is None and probe is not None:
        fault = _different_log_probs(reopened, probe, half=probe.half or dtype in (torch.bfloat16, torch.float16))
    if fault is not None:
        raise UserError(
            f"what was saved is not what was trained: {fault}",
            where=str(folder),
            fix="nothing of it is used; please report this with the configuration (the trainer checkpoint is kept)",
        )


def check_learnt(folder: Path, parent: Path) -> None:
    """Raise UserError where every tensor of a checkpoint equals its parent's to the last bit: nothing was learnt."""
    names = {name: path for path in weight_files(folder) for name in _names(path)}
    before = {name: path for path in weight_files(parent) for name in _names(path)}
    if not before or any(not torch.equal(_tensor(names[n], n), _tensor(before[n], n)) for n in names if n in before):
        return
    raise UserError(
        f"training has changed nothing: all {len(names)} tensors are those of the round's policy",
        where=str(folder),
        fix="raise dpo.learning_rate or the number of pairs, or lower dpo.warmup_steps, and run again with --redo",
    )


def _different_tensor(reopened: Any, weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> str | None:
    found = reopened.state_dict()
    tied = set(getattr(reopened, "all_tied_weights_keys", ()) or ())
    if lacking := sorted(set(weights) - set(found)):
        return f"{lacking[0]} is missing"
    parameters = {name for name, _ in reopened.named_parameters(remove_duplicate=False)}
    if added := sorted(parameters - set(weights) - tied):
        return f"{added[0]} is new"
    for name, tensor in weights.items():
        stored = tensor.detach().cpu()
        if dtype is not None and stored.is_floating_point():
            stored = stored.to(dtype)
        if stored.shape != found[name].shape:
            return f"{name} has the shape {tuple(found[name].shape)}, not {tuple(stored.shape)}"
        if not torch.equal(stored.to(found[name].dtype), found[name]):
            return (
                f"{name} has other values (largest difference {(stored.float() - found[name].float()).abs().max():.3g})"
            )
    return None


def _different_buffer(reopened: Any, model: PreTrainedModel) -> str | None:
    """What is computed from config.json, such as rotary frequencies."""
    stored = set(reopened.state_dict())
    trained = dict(model.named_buffers())
    for name, buffer in reopened.named_buffers():
        other = trained.get(name)
        if name in stored or other is None or other.is_meta or not other.is_floating_point():
            continue
        if other.shape != buffer.shape or not torch.allclose(buffer.float(), other.float().cpu(), rtol=1e-2, atol=1e-6):
            return f"{name}, which is computed from config.json, has other values"
    return None


def _different_log_probs(reopened: Any, probe: Probe, *, half: bool) -> str | None:
    num_weights = sum(parameter.numel() for parameter in reopened.parameters())
    if 2.0 * num_weights * probe.batch["attention_mask"].sum() > MAX_OPERATIONS:
        log.info("log-probabilities of the saved model are not compared: that would take long on the CPU")
        return None
    batch = {name: _as(value, reopened.dtype) for name, value in probe.batch.items()}
    with torch.no_grad(), log_prob_head(reopened, shared=probe.shared):
        _, sums, _ = response_log_probs(reopened, batch, contextlib.nullcontext)
    error = float((sums.float() - probe.sums).abs().sum()) / probe.num_tokens
    if error <= (HALF_TOLERANCE if half else TOLERANCE):
        return None
    return f"the log-probabilities of a pair differ by {error:.3g} nats per token"


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _names(path: Path) -> list[str]:
    with safe_open(str(path), framework="pt") as file:
        return list(file.keys())


def _tensor(path: Path, name: str) -> Tensor:
    with safe_open(str(path), framework="pt") as file:
        return file.get_tensor(name)

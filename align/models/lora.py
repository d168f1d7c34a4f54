"""The `dpo.lora` section in, peft's LoraConfig out; checked before any weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.models.modules import named_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTIZE_KEY = "quantize"
# How an adapter may begin: with nothing at all, or with a part that is taken out of the weights below it. EVA, CorDA
# and LoRA-GA want statistics of data, LoftQ and KaSA begin near the policy, not at it.
_BEGINNINGS = re.compile(r"true|gaussian|orthogonal|olora|pissa(_niter_\d+)?")
# What peft puts into the names of weights that it wraps.
_WRAPPED = re.compile(r"\.(modules_to_save\.default|base_layer)\.")
_NOT_MERGED = ("alora_invocation_tokens", "layer_replication", "use_bdlora")
_OF_A_SAVED_ADAPTER = ("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version")


def peft_fields(lora: dict[str, Any]) -> dict[str, Any]:
    """The fields of peft's LoraConfig among those of `dpo.lora`.

    >>> peft_fields({"r": 16, "quantize": "nf4"})
    {'r': 16}
    """
    return {name: value for name, value in lora.items() if name != QUANTIZE_KEY}


def is_quantised(lora: dict[str, Any] | None) -> bool:
    """Whether the adapter is trained on a policy in four bits (QLoRA)."""
    return bool(lora and lora.get(QUANTIZE_KEY))


def lora_config(fields: dict[str, Any] | None) -> Any:
    """peft's LoraConfig from the configuration, or None where the weights themselves are trained.

    Raises:
        UserError: peft refuses a field.
    """
    if fields is None:
        return None
    from peft import LoraConfig

    _check_fields(peft_fields(fields))
    # Models of vision and language are none of peft's task types; an adapter without one is the same adapter.
    own = {name: value for name, value in peft_fields(fields).items() if name != "task_type"}
    try:
        return LoraConfig(**own)
    except Exception as error:  # peft checks its fields as it comes upon them
        raise UserError(f"dpo.lora: {error}", fix="see the fields of peft's LoraConfig") from None


def adapter_outside(model: PreTrainedModel, adapter: Any, parts: Sequence[str]) -> Any:
    """peft's LoraConfig that puts no adapter into frozen parts (`dpo.freeze`), beside what it excludes already.

    Raises:
        UserError: the model has no such part.
    """
    modules = _modules_of(model, parts)
    if not modules:
        return adapter
    own = adapter.exclude_modules or []
    if isinstance(own, str):
        return replace(adapter, exclude_modules="|".join([f"(?:{own})", *map(re.escape, modules)]))
    return replace(adapter, exclude_modules=sorted({*own, *modules}))


def check_frozen(model: PreTrainedModel, adapted: Any, parts: Sequence[str]) -> None:
    """Refuse an adapter that trains something inside of a frozen part all the same, by a way of its own.

    Raises:
        UserError: `modules_to_save`, `target_parameters` or the like name something in a part of `dpo.freeze`.
    """
    frozen = {name for part in parts for name in named_part(model, part)}
    inside = tuple(f"{name}." for name in _modules_of(model, parts))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    for name in trained:
        own = _WRAPPED.sub(".", name)
        if own in frozen or own.startswith(inside):
            raise UserError(
                f"dpo.lora trains {own}, which is inside of a part that dpo.freeze names",
                fix="take it out of dpo.lora, or the part out of dpo.freeze",
            )


def _modules_of(model: PreTrainedModel, parts: Sequence[str]) -> list[str]:
    """The modules that hold the weights of these parts, those alone that have no others in them."""
    names = {name.rpartition(".")[0] for part in parts for name in named_part(model, part)}
    return sorted(name for name in names if name and next(model.get_submodule(name).children(), None) is None)


def _check_fields(fields: dict[str, Any]) -> None:
    """Refuse what peft takes and what could then not be trained, merged or compared with the reference."""
    problem = None
    begins, task = fields.get("init_lora_weights", True), fields.get("task_type")
    objects = [name for name in fields if name.endswith("_config") and fields[name] not in (None, {})]
    alpha = fields.get("lora_alpha", 8)
    if begins is False:
        problem = "init_lora_weights: false begins with a random change of the policy, which is then not the reference"
    elif isinstance(begins, str) and not _BEGINNINGS.fullmatch(begins.lower()):
        problem = (
            f"init_lora_weights: {begins!r} is none of the beginnings that need no data and leave the policy as it is"
            " (true, gaussian, orthogonal, olora, pissa, pissa_niter_N)"
        )
    elif task not in (None, "CAUSAL_LM"):
        problem = f"task_type: expected CAUSAL_LM or nothing, found {task!r}"
    elif fields.get("inference_mode"):
        problem = "inference_mode: nothing would be trained"
    elif not isinstance(alpha, int | float) or isinstance(alpha, bool) or alpha <= 0:
        problem = f"lora_alpha: expected a number above 0, found {alpha!r}: nothing would be changed by the adapter"
    elif objects:
        problem = f"{objects[0]} takes an object of peft's own, which a configuration file cannot hold"
    elif found := [name for name in _NOT_MERGED if fields.get(name)]:
        problem = f"{found[0]}: such an adapter cannot be merged into a checkpoint of its parent's form"
    elif found := [name for name in _OF_A_SAVED_ADAPTER if fields.get(name) not in (None, "LORA")]:
        problem = f"{found[0]} belongs to an adapter that was saved, not to one that is to be trained"
    if problem is not None:
        raise UserError(f"dpo.lora: {problem}", fix="change it, or leave it out")


def check_modules_to_save(model: PreTrainedModel, adapter: Any) -> None:
    """Refuse names of modules to be trained as a whole that the model does not have: peft passes them over.

    Raises:
        UserError: no module's name ends with one of `modules_to_save`.
    """
    modules = [name for name, _ in model.named_modules()]
    for wanted in adapter.modules_to_save or ():
        if not any(name.endswith(wanted) for name in modules):
            parts = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
            near = get_close_matches(wanted.rpartition(".")[2], parts, 1)
            raise UserError(
                f"dpo.lora.modules_to_save: no module of this model is called {wanted!r}",
                fix=f"did you mean {near[0]!r}?" if near else "take it out",
            )


def check_tied_weights(model: PreTrainedModel, adapted: Any) -> None:
    """Refuse an adapter that trains one of two tied weights; both models are those of `align.models.meta`.

    peft would train a copy of the embeddings or of the vocabulary projection, which the checkpoint has no place for:
    its config.json says that the two are one.

    Raises:
        UserError: the vocabulary projection is tied to the embeddings, and the adapter changes either of them.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings is None or head is None or embeddings.weight is not head.weight:
        return
    kinds = {
        "embeddings": (type(embeddings), type(adapted.get_input_embeddings())),
        "vocabulary projection": (type(head), type(adapted.get_output_embeddings())),
    }
    changed = [name for name, (plain, found) in kinds.items() if plain is not found]
    if not changed and adapted.get_input_embeddings().weight is not adapted.get_output_embeddings().weight:
        # One of the two lies in a module that is trained as a whole, in a copy of its own.
        changed = list(kinds)
    if changed:
        raise UserError(
            f"dpo.lora changes the {' and the '.join(changed)}, which this model ties to each other: the saved "
            "checkpoint could not hold what was trained",
            fix=(
                "take embed_tokens, lm_head and what holds them out of dpo.lora.target_modules, modules_to_save and"
                " trainable_token_indices, or train without lora"
            ),
        )

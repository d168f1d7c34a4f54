"""Names of a model's parts in, its parameters out: what is trained, what is frozen, what learns at its own rate.

Parts are distinguished by the names of the modules on a parameter's path, which differ between families but always say
what they are (``multi_modal_projector``, ``mm_projector``, ``connector``; ``vision_tower``, ``visual``). No list of
architectures is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

from torch import nn

from align.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("vision", "projector", "language", "embeddings", "head")
_PROJECTOR = re.compile(
    r"projector|projection$|connector|aligner|resampler|abstractor|^mlp1$|^image_newline|embed_vision"
)
_VISION = re.compile(r"vision|visual|image_(encoder|tower)")
# Qwen-VL's projector stands inside of its vision tower.
_INNER_PROJECTOR = re.compile(r"^(patch_)?merger$|^deepstack_merger_list$")


def part_of(name: str, *, has_projector: bool = True) -> str:
    """`vision`, `projector` or `language`, from a parameter's name.

    `has_projector` says that the model has a projector beside its vision tower; without one, the merger at the end of
    the tower is the projector.

    >>> part_of("model.multi_modal_projector.linear_1.weight"), part_of("model.vision_tower.layers.0.mlp.fc1.weight")
    ('projector', 'vision')
    >>> part_of("model.visual.merger.mlp.0.weight"), part_of("model.visual.merger.mlp.0.weight", has_projector=False)
    ('vision', 'projector')
    >>> part_of("lm_head.weight")
    'language'
    """
    components = name.split(".")
    for index, component in enumerate(components):
        if _PROJECTOR.search(component):
            return "projector"
        if _VISION.search(component):
            inner = any(_INNER_PROJECTOR.search(later) for later in components[index + 1 :])
            return "projector" if inner and not has_projector else "vision"
    return "language"


def part_names(model: nn.Module) -> dict[str, str]:
    """The part of every parameter by its name; embeddings and head count as language here."""
    names = [name for name, _ in model.named_parameters()]
    has_projector = any(part_of(name) == "projector" for name in names)
    return {name: part_of(name, has_projector=has_projector) for name in names}


def parameters_of(model: PreTrainedModel, part: str) -> list[str]:
    """The names of the parameters of a part: one of PARTS, or whatever begins with `part`.

    `embeddings` and `head` are also inside `language`; tied, they are one parameter with two names.
    """
    if part in ("embeddings", "head"):
        module = model.get_input_embeddings() if part == "embeddings" else model.get_output_embeddings()
        wanted = {id(parameter) for parameter in module.parameters()} if module is not None else set()
        return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]
    if part in PARTS:
        return [name for name, found in part_names(model).items() if found == part]
    return [name for name, _ in model.named_parameters() if name == part or name.startswith(part.rstrip(".") + ".")]


def named_part(model: PreTrainedModel, part: str) -> list[str]:
    """As `parameters_of`, but there must be some.

    Raises:
        UserError: the model has no such part.
    """
    names = parameters_of(model, part)
    if not names:
        raise _no_such_part(model, part)
    return names


def freeze_parts(model: PreTrainedModel, parts: Iterable[str]) -> None:
    """Take the named parts out of training; all other parameters stay as they are.

    Raises:
        UserError: the model has no such part, or nothing is left to train.
    """
    parts = list(parts)
    frozen = {name for part in parts for name in named_part(model, part)}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"dpo.freeze {parts} leaves nothing to train", fix="take a part out of dpo.freeze")


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """How many weights of every part are trained and frozen."""
    counts: dict[str, dict[str, int]] = {}
    parts = part_names(model)
    for name, parameter in model.named_parameters():
        entry = counts.setdefault(parts[name], {"trained": 0, "frozen": 0})
        # Under ZeRO-3 a parameter is empty here and knows its true size.
        entry["trained" if parameter.requires_grad else "frozen"] += getattr(parameter, "ds_numel", parameter.numel())
    return counts


def _no_such_part(model: nn.Module, part: str) -> UserError:
    prefixes = {".".join(name.split(".")[:depth]) for name, _ in model.named_parameters() for depth in (1, 2, 3)}
    near = get_close_matches(part, [*PARTS, *sorted(prefixes)], n=3, cutoff=0.4)
    return UserError(
        f"dpo.freeze: the model has no part {part!r}; expected one of {', '.join(PARTS)} or the beginning of a "
        "parameter's name" + (f" (nearest: {', '.join(near)})" if near else "")
    )


def check_projector(model: nn.Module) -> None:
    """Raise UserError where the projector has a learning rate of its own and is not trained."""
    parts = part_names(model)
    if not any(p.requires_grad for name, p in model.named_parameters() if parts[name] == "projector"):
        raise UserError(
            "dpo.projector_learning_rate_multiplier is set, but no projector is trained",
            fix="take `projector` out of dpo.freeze, or the multiplier out of the configuration",
        )

"""A checkpoint folder in, what it is out: family, sizes, visual tokens, trainable parts, licence, shared prefix.

No weight is read: sizes come from the safetensors headers, the model is built without storage (torch's meta device).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from align.errors import UserError
from align.models.families import FAMILIES
from align.models.load import load_processor, read_config
from align.models.meta import meta_model
from align.models.weights import has_pickle, tensor_table, weight_files
from align.prefix.attention import PrefixUnsupported, use_shared_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Info:
    """Everything that `align info` shows; `num_visual_tokens` only where an image was given."""

    architecture: str
    opened_by: str
    about: str
    num_tensors: int
    num_bytes: int
    dtypes: dict[str, int]
    parameters: dict[str, int]
    context_tokens: int | None
    shared_prefix: str
    licence: str | None
    num_visual_tokens: int | None = None
    num_prompt_tokens: int | None = None


def inspect_checkpoint(
    folder: Path, image: Path | None = None, processor_settings: dict[str, Any] | None = None
) -> Info:
    """Describe a local checkpoint; raises UserError where it cannot be opened."""
    config = read_config(folder)
    architecture = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    family = FAMILIES.get(architecture)
    if not weight_files(folder):
        found = "pickled weights only" if has_pickle(folder) else "none"
        raise UserError(f"expected weights in safetensors, found {found}", where=str(folder))
    table = tensor_table(folder)
    model = meta_model(folder, config)
    counts = _visual_tokens(folder, image, processor_settings or {}) if image else (None, None)
    return Info(
        architecture=architecture,
        opened_by=f"align.models ({family.model.__module__.rsplit('.', 1)[0]})" if family else "transformers",
        about=_about(family),
        num_tensors=len(table),
        num_bytes=sum(tensor.num_bytes for tensor in table.values()),
        dtypes=dict(Counter(tensor.dtype for tensor in table.values())),
        parameters=_parts(model),
        context_tokens=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        shared_prefix=expected_shared_prefix(model),
        licence=licence_of(folder),
        num_visual_tokens=counts[0],
        num_prompt_tokens=counts[1],
    )


def expected_shared_prefix(model: PreTrainedModel) -> str:
    """What is known of the shared prefix without running the model; the first batch of a run decides."""
    try:
        use_shared_prefix(model)
    except (PrefixUnsupported, AttributeError, NotImplementedError) as error:
        return f"no: {error}"
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"no: the language model has layers of type {', '.join(sorted(kinds))}"
    return "expected; the first batch of a run proves it"


def _about(family: Any) -> str:
    """The first paragraph of the family's own description."""
    if family is None:
        return "a vision-language model of transformers"
    import importlib

    module = importlib.import_module(family.model.__module__.rsplit(".", 1)[0])
    return " ".join((module.__doc__ or "").strip().split("\n\n")[0].split())


def _parts(model: PreTrainedModel) -> dict[str, int]:
    from align.models.modules import part_names

    parts = part_names(model)
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        sizes[parts[name]] += parameter.numel()
    return dict(sizes)


def _visual_tokens(folder: Path, image: Path, settings: dict[str, Any]) -> tuple[int, int]:
    """(tokens that stand for the image, tokens of the whole prompt around it)."""
    from align.media.images import ImageStore

    picture = ImageStore(image.parent).open(image.name)
    processor = load_processor(folder, **settings)

    def num_tokens(with_image: bool) -> int:
        content: list[dict[str, Any]] = [{"type": "text", "text": "What is shown?"}]
        if with_image:
            content.insert(0, {"type": "image", "image": picture})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return int(inputs["input_ids"].shape[-1])

    whole = num_tokens(True)
    # Ours count visual tokens themselves; of others, what wraps and follows an image is counted with it.
    count = getattr(processor, "num_image_tokens", None)
    return count(*picture.size) if callable(count) else whole - num_tokens(False), whole


def licence_of(parent: str | Path) -> str | None:
    """The licence that the parent's own card names; inherited, never invented."""
    card = Path(parent) / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---")
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        heading = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    return heading.get("license") if isinstance(heading, dict) else None

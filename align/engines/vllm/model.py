"""A family's encoders and projector in front of one of vLLM's text models.

The encoders are the backbone of `align.models` without its text model, on every rank of tensor parallelism alike; the
text model, its parallelism, LoRA and CUDA graphs are vLLM's.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import WeightsMapper, init_vllm_registered_model, maybe_prefix

from align.engines.vllm.narrow_heads import NarrowHeads
from align.models.families import FAMILIES, Family

TEXT_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
# How names of the text model's weights begin; the last part has none.
TEXT_PREFIXES = ("lm_head.", *(f"model.{part}." for part in TEXT_PARTS[:3]))


class VisualModel(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """Base of the families' models; a subclass says which of vLLM's text models is theirs."""

    text_architecture: ClassVar[str]
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    # By these vLLM finds the layers that an adapter was trained on; without them it serves the base and says nothing.
    hf_to_vllm_mapper: ClassVar = WeightsMapper(
        orig_to_new_prefix={prefix: f"language_model.{prefix}" for prefix in TEXT_PREFIXES}
    )

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.family = FAMILIES[self.config.architectures[0]]
        self.narrow = NarrowHeads.of(self.config, self.text_architecture)
        # These come from vLLM's interfaces, which mypy does not see behind nn.Module.
        self.configure_mm_token_handling(self.config.vocab_size, self.placeholder_ids())  # type: ignore[operator]
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            self.visual = encoders_of(self.family, self.config, vllm_config.model_config.dtype)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config,
                hf_config=self.narrow.config,
                architectures=[self.narrow.architecture],
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def placeholder_ids(self) -> list[int]:
        """The ids of the tokens that images stand in for."""
        return [self.config.image_token_id]

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """None: the chat template places images (`--chat-template-content-format openai`)."""
        return None

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which modules are the language model and the towers."""
        return MultiModelKeys.from_string_field(language_model="language_model", tower_model="visual")

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """For every image its visual tokens `(n, D)`."""
        given = {name: kwargs[name] for name in self.visual.image_inputs if kwargs.get(name) is not None}
        return self.visual.get_image_features(**given).pooler_output if given else []

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states of the text model, images in place."""
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The text model's logits."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Names of what was loaded. Raises ValueError for tensors of encoders that are missing or not known."""
        visual = {_on_disk(f"model.{name}", self.family): name for name in self.visual.state_dict()}
        targets = {**dict(self.visual.named_parameters()), **dict(self.visual.named_buffers())}
        missing = {name for name, _ in self.visual.named_parameters()}
        loaded: set[str] = set()

        def text_weights() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                stored = _on_disk(name, self.family)
                if stored in visual:
                    own = visual[stored]
                    targets[own].data.copy_(tensor)
                    missing.discard(own)
                    loaded.add(f"visual.{own}")
                elif name.startswith(TEXT_PREFIXES):
                    yield from self.narrow.pad(name, tensor)
                elif not self._is_unused(name, stored):
                    raise ValueError(f"found a tensor {name!r} that no part of {type(self).__name__} has")

        text = self.language_model.load_weights(text_weights())
        if missing:
            raise ValueError(f"{len(missing)} weights are not in the checkpoint, such as {min(missing)}")
        return loaded | {f"language_model.{name}" for name in text or ()}

    def _is_unused(self, name: str, stored: str) -> bool:
        """Whether a tensor is stored and never read: an unused module, or a buffer that transformers 4 stored."""
        unused = self.family.model.unused_modules
        prefixes = unused.__get__(self) if isinstance(unused, property) else unused
        disk_prefixes = tuple(_on_disk(f"{prefix}.", self.family) for prefix in prefixes)
        is_buffer = any(re.search(pattern, name) for pattern in self.family.stored_buffers)
        return is_buffer or stored.startswith(disk_prefixes)


def encoders_of(family: Family, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The backbone of a family without its text model, on the device that is current; weights are not set."""
    without_text = copy.deepcopy(config)
    without_text.num_hidden_layers = 0
    without_text.vocab_size = 1
    without_text.pad_token_id = None
    if getattr(without_text, "layer_types", None):
        without_text.layer_types = []
    with no_init_weights():
        visual = family.model.backbone_class._from_config(without_text, attn_implementation="sdpa", dtype=dtype)
    for name in TEXT_PARTS:
        delattr(visual, name)
    return visual.eval().requires_grad_(False)


def _on_disk(name: str, family: Family) -> str:
    for pattern, replacement in family.names_on_disk:
        name = re.sub(pattern, replacement, name)
    return name

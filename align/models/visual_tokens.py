"""What the models of our families share: visual tokens in the places of their placeholders, images in generation.

A backbone says what its image tensors are (`image_inputs`), what they become (`get_image_features`) and what a blank image
looks like (`dummy_image_inputs`). Images are flat over the batch, in the order of their placeholders. Nothing here
lengthens a sequence.
"""

from typing import Any, ClassVar

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

BUILT_IN_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


class VisualBackbone:
    """Mixin in front of a text backbone that has `embed_tokens` and a config with `image_token_id`."""

    image_inputs: tuple[str, ...]
    config: Any
    device: torch.device

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """`pooler_output`: for every image its visual tokens `(n, D)`, as many as the processor counts."""
        raise NotImplementedError

    def dummy_image_inputs(self) -> dict[str, torch.Tensor]:
        """Image tensors of the smallest blank image."""
        raise NotImplementedError

    def places(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(B, L)` bool: where a placeholder stands."""
        return input_ids == self.config.image_token_id

    def embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        past_key_values: Any,
        image_features: torch.Tensor | None,
        **image_inputs: Any,
    ) -> torch.Tensor:
        """`(B, L, D)`: embeddings of the tokens, visual tokens in the places of their placeholders.

        `image_features` `(n, D)`: visual tokens of all images, already encoded, instead of the image tensors.
        Raises ValueError where placeholders and visual tokens differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # type: ignore[attr-defined]
        given = {name: value for name, value in image_inputs.items() if value is not None}
        if given and image_features is None:
            missing = [name for name in self.image_inputs if name not in given]
            if missing:
                raise ValueError(f"images need {', '.join(missing)} too; pass all that the processor gives")
            image_features = torch.cat(self.get_image_features(**given).pooler_output)
        if image_features is not None:
            return self._place(input_ids, inputs_embeds, image_features)
        if _other_ranks_may_have_images(past_key_values):
            # ZeRO-3 and FSDP need the same modules to run on every rank: a black image, times nothing.
            features = self.get_image_features(**self.dummy_image_inputs()).pooler_output
            return inputs_embeds + 0.0 * torch.cat(features).sum().to(inputs_embeds.dtype)
        return inputs_embeds

    def _place(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        if input_ids is None:
            raise ValueError("images need input_ids: their places are where the image token stands")
        places = self.places(input_ids)
        num_places = int(places.sum())
        if num_places != len(image_features):
            raise ValueError(
                f"expected a placeholder (token {self.config.image_token_id}) for each of {len(image_features)} visual "
                f"tokens, found {num_places} in input_ids; was the sequence truncated?"
            )
        return inputs_embeds.masked_scatter(places.unsqueeze(-1), image_features.to(inputs_embeds.dtype))


class VisualCausalLM:
    """Mixin in front of a causal language model whose `model` is a `VisualBackbone`."""

    config: Any
    model: Any
    encoder_configs: ClassVar[tuple[str, ...]]
    """Names of the attributes of the config that hold the encoders' configs."""
    unused_modules: ClassVar[tuple[str, ...]] = ()
    """Modules that are stored but never used: a gradient that never comes would stop DDP."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which makes every parameter that it loads a trained one; unused modules stay out."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        freeze_unused(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(*args, **kwargs)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but an attention function of one's own reaches only the text model, not the encoders."""
        encoders = [getattr(self.config, name) for name in self.encoder_configs if getattr(self.config, name)]
        before = [encoder._attn_implementation for encoder in encoders]
        super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]
        if attn_implementation not in BUILT_IN_ATTENTION:
            for encoder, implementation in zip(encoders, before, strict=True):
                encoder._attn_implementation = implementation

    def prepare_inputs_for_generation(self, input_ids: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        """Images go in with the prompt only; with a cache, later steps have them already."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in (*self.model.image_inputs, "image_features"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        """Repeats every sequence; images are encoded once and their tokens repeated, since they lie flat over the batch."""
        names = (*self.model.image_inputs, "image_features")
        images = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
        expanded_ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if expand_size == 1 or not images:
            return expanded_ids, {**kwargs, **images}
        features = images.get("image_features")
        if features is None:
            features = torch.cat(self.get_image_features(**images).pooler_output)
        counts = self.model.places(input_ids).sum(dim=-1).tolist()
        kwargs["image_features"] = torch.cat(
            [tokens for sequence in features.split(counts) for tokens in [sequence] * expand_size]
        )
        return expanded_ids, kwargs


def freeze_unused(model: Any) -> None:
    """Takes the modules and parameters that `unused_modules` names, where they exist, out of training."""
    for name, parameter in model.named_parameters():
        if any(name == unused or name.startswith(f"{unused}.") for unused in model.unused_modules):
            parameter.requires_grad_(False)


def encoder_attention(text_config: Any) -> str | None:
    """The attention an encoder starts with: the text model's where that is a built-in one."""
    attention = text_config._attn_implementation
    return attention if attention in BUILT_IN_ATTENTION else None


def _other_ranks_may_have_images(past_key_values: Any) -> bool:
    """Whether ranks run together and this is a prompt."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if torch.distributed.get_world_size() == 1:
        return False
    return past_key_values is None or past_key_values.get_seq_length() == 0

"""What the models of our families share: visual tokens in the places of their placeholders, images in generation.

A backbone says what its image tensors are (`image_inputs`), what they become (`get_image_features`) and what a blank
image looks like (`dummy_image_inputs`). Images are flat over the batch, in the order of their placeholders. Nothing
here lengthens a sequence.

Shapes: B sequences, L tokens, D text width, n visual tokens of all images.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

BUILT_IN_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


class VisualBackbone:
    """Mixin in front of a text backbone that has `embed_tokens` and a config with `image_token_id`."""

    image_inputs: tuple[str, ...]
    """Names of the image tensors; a class names all that it may know, an object those that its config asks for."""
    encoder_configs: ClassVar[tuple[str, ...]] = ("vision_config",)
    """Names of the attributes of the config that hold the encoders' configs."""
    config: Any
    device: torch.device

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for encoder in self.encoders():
            encoder._attn_implementation = encoder_attention(config)

    def encoders(self) -> list[Any]:
        """The configs of the encoders that are there."""
        found = [getattr(self.config, name) for name in self.encoder_configs]
        return [encoder for encoder in found if encoder is not None]

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """`pooler_output`: for every image its visual tokens `(n, D)`, as many as the processor counts."""
        raise NotImplementedError

    def dummy_image_inputs(self) -> dict[str, torch.Tensor]:
        """Image tensors of the smallest blank image."""
        raise NotImplementedError

    def places(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(B, L)` bool: where a placeholder stands."""
        return input_ids == self.config.image_token_id

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The text backbone's forward after images have replaced their placeholders; keywords as in `embed`."""
        images = {name: kwargs.pop(name, None) for name in type(self).image_inputs}
        return super().forward(  # type: ignore[misc]
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=self.embed(input_ids, inputs_embeds, past_key_values, image_features, **images),
            **kwargs,
        )

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
    """Mixin in front of a causal language model of transformers, with a `VisualBackbone` in the place of its backbone.

    `forward` takes the image tensors of the backbone as keywords and gives logits `(B, L, vocabulary)`, of the last
    `logits_to_keep` positions where that is given. `labels` `(B, L)` int64 as `input_ids`, -100 where not trained on,
    give a mean cross-entropy as `loss`.
    """

    config: Any
    model: Any
    backbone_class: ClassVar[type[VisualBackbone]]
    unused_modules: ClassVar[tuple[str, ...]] = ()
    """Modules that are stored but never used: a gradient that never comes would stop DDP."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "backbone_class"):
            names = (*cls.backbone_class.image_inputs, "image_features")
            cls.forward = _with_arguments(cls.forward, names)  # type: ignore[attr-defined]

    def __init__(self, config: Any) -> None:
        # Not that of the language model, which would make a backbone of its own.
        PreTrainedModel.__init__(self, config)
        self.model = self.backbone_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]
        freeze_unused(self)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which makes every parameter that it loads a trained one; unused modules stay out."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        freeze_unused(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """The backbone's."""
        return self.model.get_image_features(*args, **kwargs)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but an attention function of one's own reaches only the text model, not the encoders."""
        encoders = self.model.encoders()
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
        """Repeats every sequence; images are encoded once and their tokens repeated,
        since they lie flat over the batch."""
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


def _with_arguments(forward: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """A forward that takes `**kwargs`, with arguments that are among them in its signature: `generate` refuses what it
    does not find there, and the Trainer drops such columns."""

    @functools.wraps(forward)
    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    *known, rest = inspect.signature(forward).parameters.values()
    missing = [name for name in names if name not in {parameter.name for parameter in known}]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in missing]
    named.__signature__ = inspect.Signature([*known, *added, rest])  # type: ignore[attr-defined]
    return named


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

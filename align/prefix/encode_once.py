"""Images encoded once for all forward passes over the same prompts, where several are compared.

Transformers' vision-language backbones, and ours, ask `get_image_features` (and `get_video_features`) for the visual
tokens of the image tensors that they are given. Within the context an answer is kept and given again for the very same
tensors: what is compared then differs in the language model alone, and half of the computing of a comparison is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from align.prefix.rows import backbone_of

ENCODERS = ("get_image_features", "get_video_features")


@contextmanager
def images_encoded_once(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the model encodes no image tensor twice; gradients through the encoders are not meant for it.

    Where weights are spread over processes every pass encodes anew: all processes must run the same modules, and one
    without images has none to keep.
    """
    backbone = backbone_of(model)
    kept: dict[Any, tuple[Any, Any]] = {}

    def remembering(encode: Callable[..., Any]) -> Callable[..., Any]:
        def encode_once(*args: Any, **kwargs: Any) -> Any:
            key = (encode, *map(_identity, args), *((name, _identity(value)) for name, value in kwargs.items()))
            if key not in kept:
                # The tensors are kept too, so that no other one comes to stand where they stood.
                kept[key] = (encode(*args, **kwargs), (args, kwargs))
            return kept[key][0]

        return encode_once

    with ExitStack() as stack:
        for name in () if _is_spread(model) else ENCODERS:
            if hasattr(backbone, name):
                backbone.__dict__[name] = remembering(getattr(backbone, name))
                stack.callback(backbone.__dict__.pop, name)
        yield


def _identity(value: Any) -> Any:
    return id(value) if isinstance(value, Tensor) else repr(value)


def _is_spread(model: PreTrainedModel) -> bool:
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in model.parameters())

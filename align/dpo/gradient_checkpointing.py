"""Which layers compute their activations again in backward, as few as memory demands, and where gradients begin then.

transformers makes the output of every input embedding require gradients once checkpointing is on, so that adapters on
frozen layers learn under reentrant checkpointing. That also reaches the patch embeddings of frozen vision towers, which
are then computed twice and gone through backward for nothing: at Valley-Eagle-7B a tenth of a step.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from align.prefix.rows import decoder_layers


def checkpoint_what_is_needed(model: PreTrainedModel, kept_layers: int = 0) -> None:
    """From now on checkpointing spares frozen towers and the last `kept_layers` layers of the language model.

    The last ones, since backward frees their activations first. transformers calls `model.enable_input_require_grads`
    whenever checkpointing is switched on, which happens anew at the start of training and after every pass of a
    reference without its adapter; the choice is made at each call, when adapters are in place.
    """

    def choose(model: PreTrainedModel) -> None:
        _start_gradients_where_trained(model)
        for layer in decoder_layers(model)[len(decoder_layers(model)) - kept_layers :]:
            layer.gradient_checkpointing = False

    model.enable_input_require_grads = types.MethodType(choose, model)


def _start_gradients_where_trained(model: PreTrainedModel) -> None:
    model.disable_input_require_grads()
    embeddings = {id(found): found for found in map(_input_embeddings_of_trained_layers, model.modules()) if found}
    hooks = [embedding.register_forward_hook(_require_gradients) for embedding in embeddings.values()]
    model._require_grads_hooks = hooks


def _input_embeddings_of_trained_layers(module: nn.Module) -> nn.Module | None:
    if not isinstance(module, PreTrainedModel) or not _has_trained_layers(module):
        return None
    try:
        found = module.get_input_embeddings()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def _has_trained_layers(module: nn.Module) -> bool:
    """Layers that may be checkpointed are trained, or an adapter on them is."""
    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    return any(parameter.requires_grad for layer in layers for parameter in layer.parameters())


def _require_gradients(_: nn.Module, __: Any, output: Tensor) -> None:
    output.requires_grad_(True)

"""Which layers compute their activations again in backward, and where gradients must begin for that.

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


def start_gradients_where_trained(model: PreTrainedModel) -> None:
    """From now on `model.enable_input_require_grads` reaches the embeddings of trained layers only.

    transformers calls that method whenever checkpointing is switched on, which happens anew at the start of training and
    after every pass of a reference without its adapter; the choice is made at each call, when adapters are in place.
    """
    model.enable_input_require_grads = types.MethodType(_enable_input_require_grads, model)


def _enable_input_require_grads(model: PreTrainedModel) -> None:
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

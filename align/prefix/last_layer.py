"""The language model's last layer computes only what is read of it.

Of a row `[prompt | segments]` nobody reads the last hidden states but those of the prompt's last token and of the
segments (`AttentionPlan.read_at`). All other layers are needed whole, and of the last one the keys and values; its
queries, the output of its attention and its MLP are computed for these places alone, with zeros elsewhere. Of a pair
behind a long prompt that saves nearly all that a layer costs, forward, backward and in memory.

Hooks do it, so that wrappers, adapters, sharding and recomputation see the layer they know. The plan comes with the
layer's arguments, as for the attention: a layer that is run again in backward finds it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from align.prefix.plans import AttentionPlan
from align.prefix.rows import decoder_layers

# What a layer does token by token and nobody else reads, where it has a part of the name. An MLP with experts also
# answers its router's odds, for all tokens; those with these projections are plain.
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
PLAIN_MLP = ("down_proj", "fc2")
_HOOKS = "_align_read_hooks"


def compute_where_read(model: PreTrainedModel) -> None:
    """From now on the last layer computes only where an `AttentionPlan` says that it is read; harmless when done twice.

    Layers without the parts that are known here, and forward passes without a plan, stay as they are.
    """
    layers = decoder_layers(model)
    if not layers or hasattr(layers[-1], _HOOKS):
        return
    layer, places = layers[-1], _Places()
    handles = [layer.register_forward_pre_hook(places.enter, with_kwargs=True)]
    for name, part in layer.named_modules():
        if name in PARTS and (name != "mlp" or any(hasattr(part, inner) for inner in PLAIN_MLP)):
            handles += [part.register_forward_pre_hook(places.take), part.register_forward_hook(places.put)]
    setattr(layer, _HOOKS, handles)


def compute_everywhere(model: PreTrainedModel) -> None:
    """Undo `compute_where_read`."""
    for layer in decoder_layers(model)[-1:]:
        for handle in getattr(layer, _HOOKS, ()):
            handle.remove()
        layer.__dict__.pop(_HOOKS, None)


class _Places:
    """The hooks of one layer; `at` `(B, R)` is where its present call is read, None for everywhere; `length` T is that
    of the row whose places the part at work has taken, None where it is given something else than rows."""

    def __init__(self) -> None:
        self.at: Tensor | None = None
        self.length: int | None = None

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The layer begins: where it will be read."""
        plans = [value for value in (*args, *kwargs.values()) if isinstance(value, AttentionPlan)]
        self.at = plans[0].read_at if plans else None

    def take(self, part: nn.Module, args: tuple[Tensor, ...]) -> Tensor | None:
        """`(B, T, C)` to `(B, R, C)`."""
        self.length = None
        if self.at is None or len(args) != 1 or args[0].ndim != 3:
            return None
        self.length = args[0].shape[1]
        return args[0].gather(1, self._index(args[0]))

    def put(self, part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """`(B, R, C)` to `(B, T, C)`, zero where nobody reads."""
        if self.length is None:
            return None
        whole = output.new_zeros(len(output), self.length, output.shape[2])
        return whole.scatter(1, self._index(output), output)

    def _index(self, states: Tensor) -> Tensor:
        assert self.at is not None
        return self.at.to(states.device)[:, :, None].expand(-1, -1, states.shape[2])

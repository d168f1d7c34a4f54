"""A model in, which may stand on torch's meta device; the counts that its memory and its time follow from out.

Weights of every part, what of them is trained, and the stacks of layers: the language model's and those of the vision
towers. Adapters are put on the empty model by peft itself, so any `dpo.lora` is counted as it will be trained.

Left out: layers of another kind than attention with a feed-forward part (state-space layers, linear attention) are
counted as if they were of that kind; `Stack.other_layers` says how many there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from align.errors import UserError
from align.models.modules import part_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = re.compile(r"attn|attention")
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
_ADAPTER = re.compile(r"lora_|vera_|original_module|modules_to_save")


@dataclass(frozen=True)
class Kept:
    """Numbers of a token that a layer keeps because its own weights, or adapters on them, are trained.

    `inputs`: different inputs of trained linear layers; `own_inputs`: the same where each keeps a copy of its own (cast
    under autocast, or with dropout). `dropped`: those that pass an adapter's dropout. `ranks`:
    between the two matrices of
    adapters. `norms`: normalised inputs of trained norms. `output`: width of the attention's result,
    if it is among them.
    """

    inputs: float = 0.0
    own_inputs: float = 0.0
    dropped: float = 0.0
    ranks: float = 0.0
    norms: float = 0.0
    output: float = 0.0


@dataclass(frozen=True)
class Stack:
    """Layers of a transformer, as the mean over them where they differ: what decides how much of a token they keep.

    `query` and `key` are widths of all heads together; `inner` is that of the feed-forward part that a token passes, of
    all its experts together. `norms`: how many, of the whole width; `rms`: as transformers writes RMSNorm;
    `normed_heads`: queries and keys are normalised, too. `flows`: gradients pass through. `layer_weights`: of one
    layer, all experts counted; `frozen_linear`: those in matrices that are not trained; `active_weights`: those that
    one token passes. `top_k` of `experts`, 0 without.
    """

    num_layers: int
    hidden: int
    query: int
    key: int
    inner: float
    gated: bool
    rms: bool
    flows: bool
    layer_weights: float
    frozen_linear: float
    active_weights: float
    kept: Kept = Kept()
    norms: int = 2
    normed_heads: bool = False
    experts: int = 0
    top_k: int = 0
    other_layers: int = 0

    @property
    def trained(self) -> bool:
        """Whether anything of the stack is kept for a backward pass."""
        return bool(self.kept.inputs or self.kept.norms)


@dataclass(frozen=True)
class ModelShape:
    """Counts of weights, and the stacks: the language model's and those of the vision towers.

    `linear`: weights of trained matrices, `frozen_linear` of frozen ones that gradients pass, both cast under autocast;
    `quantisable`: of linear layers beside the head, which four bits may hold. `adapter`: only an adapter is trained.
    """

    weights: int
    trained: int
    linear: int
    frozen_linear: int
    quantisable: int
    largest_layer: int
    text: Stack
    towers: tuple[Stack, ...]
    vocabulary: int
    head_trained: bool
    embeddings_trained: bool
    tied: bool
    parts: dict[str, int]
    adapter: bool = False

    @property
    def embedding_weights(self) -> int:
        """Parameters of the token embeddings."""
        return self.vocabulary * self.text.hidden

    @cached_property
    def active_weights(self) -> float:
        """Weights that a token of text passes: of its experts only, and of the head."""
        return self.text.num_layers * self.text.active_weights + self.embedding_weights


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The shape of a model, which may stand on the meta device, with what is frozen already taken out of training.

    Raises:
        UserError: the language model has no layers that this file knows.
    """
    parts = part_names(model)
    named = dict(model.named_parameters())
    counts: dict[str, int] = {}
    for name, parameter in named.items():
        part = "adapter" if "lora_" in name else parts[name]
        counts[part] = counts.get(part, 0) + parameter.numel()
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    before_text = any(p.requires_grad for name, p in named.items() if parts[name] != "language")
    embeddings_trained = embeddings.weight.requires_grad
    text = _text_stack(model, flows=before_text or embeddings_trained)
    towers = tuple(_tower_stacks(model, parts))
    matrices = _matrices(model)
    return ModelShape(
        weights=sum(p.numel() for p in named.values()),
        trained=sum(p.numel() for p in named.values() if p.requires_grad),
        linear=sum(p.numel() for _, p in matrices if p.requires_grad),
        frozen_linear=round(sum(s.num_layers * s.frozen_linear for s in (text, *towers) if s.flows)),
        quantisable=sum(p.numel() for m, p in matrices if isinstance(m, nn.Linear) and p is not head.weight),
        largest_layer=round(text.layer_weights),
        text=text,
        towers=towers,
        vocabulary=head.weight.shape[0],
        head_trained=head.weight.requires_grad,
        embeddings_trained=embeddings_trained,
        tied=head.weight is embeddings.weight,
        parts=counts,
        adapter="adapter" in counts,
    )


def _matrices(model: PreTrainedModel) -> list[tuple[nn.Module, Tensor]]:
    """All matrices that inputs are multiplied with: of linear and convolutional layers and of experts."""
    found: list[tuple[nn.Module, Tensor]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            found.append((module, module.weight))
        found += [(module, p) for p in module.parameters(recurse=False) if p.dim() == 3]
    return found


def _text_stack(model: PreTrainedModel, *, flows: bool) -> Stack:
    config = model.config.get_text_config()
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = _longest(child for child in decoder.children() if isinstance(child, nn.ModuleList)) or _longest(
        module for module in decoder.modules() if isinstance(module, nn.ModuleList)
    )
    if layers is None or not hasattr(config, "num_attention_heads"):
        raise UserError("the language model has no layers that the memory model knows")
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _stack(
        layers,
        hidden=config.hidden_size,
        query=heads * width,
        key=(getattr(config, "num_key_value_heads", None) or heads) * width,
        flows=flows,
        top_k=_top_k(config),
    )


def _top_k(config: Any) -> int:
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return 0


def _tower_stacks(model: PreTrainedModel, parts: dict[str, str]) -> Iterable[Stack]:
    """The longest list of layers in each vision tower."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or id(module) in seen:
            continue
        first = next((parameter for parameter in parts if parameter.startswith(f"{name}.")), None)
        if first is None or parts[first] != "vision" or any(s in name for s in ("merger", "deepstack")):
            continue
        seen.add(id(module))
        hidden = _hidden_of(module[0])
        if hidden is not None:
            yield _stack(module, hidden=hidden, query=hidden, key=hidden, flows=False, top_k=0)


def _stack(layers: nn.ModuleList, *, hidden: int, query: int, key: int, flows: bool, top_k: int) -> Stack:
    looks = [_Layer(layer, hidden, query, top_k) for layer in layers]
    kept = Kept(*(_mean([getattr(look.kept, name) for look in looks]) for name in Kept.__dataclass_fields__))
    norms = [type(m).__name__ for m in layers[0].modules() if "norm" in type(m).__name__.lower()]
    return Stack(
        num_layers=len(looks),
        hidden=hidden,
        query=query,
        key=key,
        inner=_mean([look.inner for look in looks]),
        gated=looks[-1].gated,
        rms=any("RMS" in name for name in norms),
        flows=flows or any(look.trained for look in looks),
        layer_weights=_mean([look.weights for look in looks]),
        frozen_linear=_mean([look.frozen_linear for look in looks]),
        active_weights=_mean([look.active_weights for look in looks]),
        kept=kept,
        norms=looks[-1].norms or 2,
        normed_heads=any(name.endswith("q_norm") for name, _ in layers[0].named_modules()),
        experts=max(look.experts for look in looks),
        top_k=top_k if any(look.experts for look in looks) else 0,
        other_layers=sum(not look.attends for look in looks),
    )


class _Layer:
    """One layer looked at."""

    def __init__(self, layer: nn.Module, hidden: int, query: int, top_k: int) -> None:
        named = list(layer.named_parameters())
        base = [(name, p) for name, p in named if not _ADAPTER.search(name)]
        self.trained = any(p.requires_grad for _, p in named)
        self.weights = sum(p.numel() for _, p in base)
        in_experts = sum(p.numel() for name, p in base if _EXPERTS.search(name))
        self.linears = [
            (name.removesuffix(".base_layer"), module)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and not _ADAPTER.search(name)
        ]
        self.attends = any(_ATTENTION.search(name) for name, _ in self.linears)
        self.experts = _num_experts(layer)
        passed = top_k / self.experts if self.experts else 0.0
        self.frozen_linear = sum(p.numel() for _, p in base if p.dim() > 1 and not p.requires_grad)
        self.active_weights = self.weights - in_experts * (1 - passed)
        dense = [
            module.out_features
            for name, module in self.linears
            if not _ATTENTION.search(name) and not _EXPERTS.search(name) and module.in_features == hidden
        ]
        dense = [width for width in dense if width > 1]  # a gate of shared experts is one number
        matrices = 3 if self.experts or len(dense) > 1 else 2
        self.gated = matrices == 3
        self.inner: float = max(dense, default=0 if self.experts else 4 * hidden)
        if self.experts:
            self.inner += top_k * in_experts / (self.experts * hidden * matrices)
        self.norms = sum("norm" in name and name.endswith("weight") and p.numel() == hidden for name, p in base)
        self.kept = self._kept(layer, hidden, query, top_k, dict(named))

    def _kept(self, layer: nn.Module, hidden: int, query: int, top_k: int, named: dict[str, nn.Parameter]) -> Kept:
        modules = dict(layer.named_modules())
        widths: dict[tuple[bool, int], float] = {}
        own = dropped = ranks = output = 0.0
        for name, linear in self.linears:
            adapter = getattr(modules.get(name), "lora_A", None)
            if not (linear.weight.requires_grad or adapter):
                continue
            attention = bool(_ATTENTION.search(name))
            is_output = (
                attention and linear.in_features == query and re.search(r"(^|\.)(o|out|wo|proj|dense)", _last(name))
            )
            if is_output:
                # Its input is the attention's result, which is kept in any case.
                output = query
            else:
                widths[attention, linear.in_features] = linear.in_features
                own += linear.in_features
            for key, down in (adapter or {}).items():
                ranks += down.out_features
                if getattr(modules[name].lora_dropout[key], "p", 0.0):
                    dropped += linear.in_features
        if any(p.requires_grad for name, p in named.items() if _EXPERTS.search(name) and p.dim() == 3):
            chosen = top_k * hidden + (self.inner if self.experts else 0)
            widths[False, -1] = chosen
            own += chosen
        trained = sum(
            p.requires_grad
            for name, p in named.items()
            if "norm" in name and name.endswith("weight") and p.numel() == hidden
        )
        return Kept(sum(widths.values()), own, dropped, ranks, hidden * trained, output)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _num_experts(layer: nn.Module) -> int:
    for name, module in layer.named_modules():
        if _last(name) != "experts":
            continue
        if isinstance(module, nn.ModuleList):
            return len(module)
        sizes = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3]
        if sizes:
            return sizes[0]
    return 0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _hidden_of(layer: nn.Module) -> int | None:
    return next(
        (m.in_features for name, m in layer.named_modules() if isinstance(m, nn.Linear) and _ATTENTION.search(name)),
        None,
    )


def _longest(lists: Iterable[nn.ModuleList]) -> nn.ModuleList | None:
    return max(lists, key=len, default=None)

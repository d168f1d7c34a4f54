"""A model's shapes and a batch in, the bytes that a training step needs at its peak out, part by part.

Nothing is loaded or run: shapes come from a model on torch's meta device. What autograd keeps of a layer is counted as
Korthikanti et al. count it (https://arxiv.org/abs/2205.05198, section 4), operation by operation for the layers as
transformers writes them; how weights, gradients and optimiser are divided over processes follows ZeRO
(https://arxiv.org/abs/1910.02054, section 5). `scripts/check_plan.py` holds it against measured peaks.

Left out: the allocator's fragmentation, CUDA's own context (about half a GiB), buffers of NCCL, experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from align.dpo.parts import part_names
from align.errors import UserError
from align.prefix.token_stats import CHUNK_SIZE

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
# fp32 arrays of (tokens of a chunk, vocabulary) that the statistics of the head hold at a time, going backward:
# logits, log p, p, the gradient and two products on the way (`align.prefix.token_stats`).
HEAD_ARRAYS = 6
# What TRL's head computes at a time, and the fp32 arrays of a tile where its kernels are missing (trl.kernels).
TILE_TOKENS, TILE_VOCABULARY, TILE_ARRAYS = 4096, 32768, 7
# DeepSpeed's stage3_max_live_parameters: weights that may be gathered at a time.
ZERO3_LIVE = 1_000_000_000
GIB = 2**30


@dataclass(frozen=True)
class Stack:
    """Equal layers of a transformer: what decides how much of a token they keep for the backward pass.

    `query` and `key` are widths of all heads together; `inner` is that of the feed-forward part. `rms`: RMSNorm as
    transformers writes it keeps the normalised input as well. `trained`: the layers' own weights are; `flows`: gradients
    pass through them.
    """

    num_layers: int
    hidden: int
    query: int
    key: int
    inner: int
    gated: bool
    rms: bool
    trained: bool
    flows: bool
    layer_weights: int

    def kept_bytes(self, how: How, *, shared_share: float = 0.0) -> float:
        """Bytes that one layer keeps of one token.

        Always: both sums of the residual stream; query, key, value and the attention's result; before and after the
        activation. `shared_share` is the share of tokens that stand behind a shared prompt: their queries are folded
        anew; and in that layout the attention's result is put together in a copy. `how.repeated_keys`: grouped keys are
        repeated for every query head (with a padding mask). Only where the layer's weights are trained: the inputs of
        its linear layers and the normalised inputs of its norms. Under autocast the residual stream and what norms keep
        stay in the weights' type.
        """
        keys = self.query if how.repeated_keys else self.key
        narrow = 2 * self.query + 2 * keys + self.query * shared_share + (3 if self.gated else 1) * self.inner
        wide = 2 * self.hidden
        if self.trained:
            narrow += 2 * self.hidden + self.inner + (self.query if shared_share else 0)
            wide += 2 * self.hidden if self.rms else 0
        return narrow * how.compute_bytes + wide * max(how.compute_bytes, how.weight_bytes)


@dataclass(frozen=True)
class ModelShape:
    """Counts of weights, and the stacks: the language model's and those of the vision towers."""

    weights: int
    trained: int
    linear: int
    largest_layer: int
    text: Stack
    towers: tuple[Stack, ...]
    vocabulary: int
    head_trained: bool
    embeddings_trained: bool
    tied: bool
    parts: dict[str, int]

    @property
    def embedding_weights(self) -> int:
        return self.vocabulary * self.text.hidden


@dataclass(frozen=True)
class StepBatch:
    """What one process computes at a time: n rows, each with a prompt of P tokens and two responses.

    `patches`: what the vision towers see, of all images of the n prompts; `pixels`: elements of the image tensors.
    """

    num_rows: int
    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    patches: int = 0
    pixels: int = 0

    @property
    def response_tokens(self) -> int:
        return self.chosen_tokens + self.rejected_tokens


@dataclass(frozen=True)
class How:
    """How training is done: bytes of a stored weight and of a computed number, and what is traded for memory.

    `compute_bytes` below `weight_bytes` is autocast: weights are cast for each forward pass, and the casts are kept.
    `triton`: TRL's kernels of the head are there, as on a GPU; without them it scores every position, with copies.
    """

    strategy: str = "ddp"
    num_processes: int = 1
    weight_bytes: int = 4
    compute_bytes: int = 4
    checkpointing: bool = False
    shared: bool = True
    accumulates: bool = True
    repeated_keys: bool = False
    second_model: bool = False
    triton: bool = True

    @property
    def casts(self) -> bool:
        return self.compute_bytes < self.weight_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes in one process at the peak of a step; `working` is what lives for one operation or layer only."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    working: int
    batch: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def model_shape(model: Any) -> ModelShape:
    """The shape of a model, which may stand on the meta device, with what is frozen already taken out of training.

    Raises:
        UserError: the language model's layers are not what this file knows (experts, state-space layers).
    """
    parts = part_names(model)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        counts[parts[name]] = counts.get(parts[name], 0) + parameter.numel()
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    before_text = any(p.requires_grad for name, p in model.named_parameters() if parts[name] != "language")
    embeddings_trained = embeddings.weight.requires_grad
    text = _text_stack(model, flows=before_text or embeddings_trained)
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and module.weight.requires_grad
    )
    return ModelShape(
        weights=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        linear=linear,
        largest_layer=text.layer_weights,
        text=text,
        towers=tuple(_tower_stacks(model)),
        vocabulary=head.weight.shape[0],
        head_trained=head.weight.requires_grad,
        embeddings_trained=embeddings_trained,
        tied=head.weight is embeddings.weight,
        parts=counts,
    )


def training_memory(shape: ModelShape, batch: StepBatch, how: How) -> Memory:
    """The peak of a step after the first, in bytes.

    It is reached at the head, when the backward pass begins and all activations are there, or at the first layer, when it
    ends and all gradients are. Gradients of earlier micro-steps (`accumulates`) are there all the time.
    """
    ranks = how.num_processes
    gradient_total = shape.trained * how.weight_bytes
    standing_gradients = gradient_total if how.accumulates else 0
    weights, optimiser = shape.weights * how.weight_bytes, 2 * shape.trained * how.weight_bytes
    activations = activation_bytes(shape, batch, how)
    at_head = _head_bytes(shape, batch, how)
    in_layer = _layer_bytes(shape, batch, how)
    casts = shape.linear * how.compute_bytes if how.casts else 0
    head_gradient = shape.embedding_weights * how.weight_bytes if shape.head_trained else 0
    begin = activations + max(at_head + head_gradient, in_layer) + standing_gradients + casts
    # The dense gradient of the embeddings is made beside what is there, and then added.
    embedding_copy = shape.embedding_weights * how.weight_bytes if shape.embeddings_trained and how.accumulates else 0
    end = gradient_total + max(embedding_copy, in_layer) + activations // max(shape.text.num_layers, 1)
    if begin >= end:
        working = begin - activations - standing_gradients
        gradients = standing_gradients
    else:
        activations //= max(shape.text.num_layers, 1)
        working, gradients = end - gradient_total - activations, gradient_total
    weights += shape.weights * how.weight_bytes if how.second_model else 0
    if how.strategy == "ddp":
        # Gradients are exchanged in buckets, which are a second copy of them.
        gradients += gradient_total if ranks > 1 else 0
    else:
        weights, gradients, optimiser, working = _divided(shape, how, working)
    return Memory(weights, gradients, optimiser, activations, working, _batch_bytes(batch, how))


def _divided(shape: ModelShape, how: How, working: int) -> tuple[int, int, int, int]:
    """Weights, gradients, optimiser and working memory where they are spread over processes.

    DeepSpeed computes in its own copy of `compute_bytes` and keeps an fp32 master copy with the optimiser.
    """
    ranks = how.num_processes
    own_copy = shape.weights * how.compute_bytes
    master = shape.trained * (4 if how.compute_bytes < 4 else 0)
    states = shape.trained * 8 + master
    casts = shape.linear * how.compute_bytes if how.casts else 0
    second = own_copy if how.second_model else 0
    if how.strategy == "zero2":
        # Gradients are reduced in buckets of 5e8 numbers, two of them at a time (overlap_comm).
        buckets = min(2 * 500_000_000, shape.trained) * how.compute_bytes
        return own_copy + second, shape.trained * 4 // ranks + buckets, states // ranks, working - casts
    gathered = shape.largest_layer * 2 + 2 * shape.embedding_weights
    if how.strategy == "zero3":
        live = min(max(gathered, 0), ZERO3_LIVE, shape.weights) * how.compute_bytes
        return (own_copy + second) // ranks, shape.trained * 4 // ranks, states // ranks, working - casts + live
    stored = how.weight_bytes
    live = min(gathered, shape.weights) * how.compute_bytes + shape.largest_layer * stored
    whole = shape.weights * stored // ranks
    return (
        whole * (2 if how.second_model else 1),
        shape.trained * stored // ranks,
        (2 * shape.trained * stored // ranks),
        working - casts + live,
    )


def activation_bytes(shape: ModelShape, batch: StepBatch, how: How) -> int:
    """What the forward pass leaves for the backward pass; with checkpointing, the inputs of layers only."""
    tokens, hidden = text_tokens(batch, how), shape.text.hidden
    # Before the layers: embeddings, and the same with visual tokens in their places; after them the last norm.
    total = tokens * hidden * (2 + (3 if shape.text.trained else 1)) * max(how.compute_bytes, how.weight_bytes)
    for stack in (shape.text, *shape.towers):
        if not (stack.flows or stack.trained):
            continue
        count = tokens if stack is shape.text else patches(batch, how)
        if how.checkpointing:
            total += stack.num_layers * stack.hidden * count * max(how.compute_bytes, how.weight_bytes)
        else:
            total += stack.num_layers * _kept_by_layer(shape, stack, batch, how)
    return int(total + _mask_bytes(shape, batch, how))


def _kept_by_layer(shape: ModelShape, stack: Stack, batch: StepBatch, how: How) -> int:
    if stack is not shape.text:
        return int(stack.kept_bytes(how) * patches(batch, how))
    if not how.shared:
        # SDPA turns the mask of true and false into numbers, in every layer anew, and keeps it.
        mask = 2 * batch.num_rows * _row_tokens(batch) ** 2 * how.compute_bytes if how.repeated_keys else 0
        return int(stack.kept_bytes(how) * text_tokens(batch, how)) + mask
    share = batch.response_tokens / (batch.prompt_tokens + batch.response_tokens)
    return int(stack.kept_bytes(how, shared_share=share) * text_tokens(batch, how))


def _mask_bytes(shape: ModelShape, batch: StepBatch, how: How) -> int:
    """What the responses see of the row, as numbers: made once, a copy for each query head of a key head."""
    if not how.shared:
        return 0
    copies = shape.text.query // shape.text.key
    seen = batch.prompt_tokens + batch.response_tokens
    return batch.num_rows * batch.response_tokens * seen * (copies * how.compute_bytes + 1)


def _row_tokens(batch: StepBatch) -> int:
    return batch.prompt_tokens + max(batch.chosen_tokens, batch.rejected_tokens)


def text_tokens(batch: StepBatch, how: How) -> int:
    """Tokens that the language model computes in a step.

    >>> batch = StepBatch(1, 1000, 100, 50)
    >>> text_tokens(batch, How(shared=True)), text_tokens(batch, How(shared=False))
    (1150, 2200)
    """
    if how.shared:
        return batch.num_rows * (batch.prompt_tokens + batch.response_tokens)
    return 2 * batch.num_rows * _row_tokens(batch)


def patches(batch: StepBatch, how: How) -> int:
    return batch.patches * (1 if how.shared else 2)


def inference_memory(
    shape: ModelShape, *, weight_bytes: int, prompt_tokens: int, new_tokens: int, key_bytes: int
) -> Memory:
    """Encoding a prompt and keeping keys and values for it and for `new_tokens` behind it."""
    text = shape.text
    cache = 2 * text.num_layers * text.key * (prompt_tokens + new_tokens) * key_bytes
    working = prompt_tokens * (8 * text.hidden + (3 if text.gated else 1) * text.inner) * key_bytes
    return Memory(shape.weights * weight_bytes, 0, 0, cache, working, 0)


def _head_bytes(shape: ModelShape, batch: StepBatch, how: How) -> int:
    """Statistics of the responses' tokens: hidden states twice, logits of a chunk at a time.

    Separate rows go through TRL's own head: tiles of TILE_TOKENS by TILE_VOCABULARY, which its kernels work on in place,
    while torch makes fp32 arrays of them; without the kernels every position is scored.
    """
    if how.shared:
        tokens = batch.num_rows * batch.response_tokens
        chunk = min(tokens, CHUNK_SIZE)
        return 2 * tokens * shape.text.hidden * how.compute_bytes + HEAD_ARRAYS * chunk * shape.vocabulary * 4
    tokens = batch.num_rows * batch.response_tokens if how.triton else text_tokens(batch, how)
    rows = min(tokens, TILE_TOKENS)
    arrays = 0 if how.triton else TILE_ARRAYS * rows * min(shape.vocabulary, TILE_VOCABULARY) * 4
    return 2 * tokens * shape.text.hidden * 4 + rows * TILE_VOCABULARY * how.compute_bytes + arrays


def _layer_bytes(shape: ModelShape, batch: StepBatch, how: How) -> int:
    """One layer gone through backward: gradients of the inner width and of the residual; with checkpointing, what it
    kept, computed again."""
    stack = shape.text
    gradients = (
        text_tokens(batch, how) * (2 * stack.hidden + (3 if stack.gated else 2) * stack.inner) * how.compute_bytes
    )
    return gradients + (_kept_by_layer(shape, stack, batch, how) if how.checkpointing else 0)


def _batch_bytes(batch: StepBatch, how: How) -> int:
    """The batch itself: pixels in fp32, ids and masks of 8 bytes."""
    copies = 1 if how.shared else 2
    return batch.pixels * 4 * copies + 5 * text_tokens(batch, how) * 8


def _text_stack(model: Any, *, flows: bool) -> Stack:
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
    )


def _tower_stacks(model: Any) -> Iterable[Stack]:
    """The longest list of layers in each vision tower."""
    parts = part_names(model)
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or id(module) in seen:
            continue
        inside = [parameter for parameter, _ in model.named_parameters() if parameter.startswith(f"{name}.")]
        if not inside or parts[inside[0]] != "vision" or any(s in name for s in ("merger", "deepstack")):
            continue
        seen.add(id(module))
        hidden = _hidden_of(module[0])
        if hidden is not None:
            yield _stack(module, hidden=hidden, query=hidden, key=hidden, flows=False)


def _stack(layers: nn.ModuleList, *, hidden: int, query: int, key: int, flows: bool) -> Stack:
    linears = [(name, module) for name, module in layers[0].named_modules() if isinstance(module, nn.Linear)]
    inner = [
        module.out_features for name, module in linears if not _is_attention(name) and module.in_features == hidden
    ]
    norms = [type(m).__name__ for m in layers[0].modules() if "norm" in type(m).__name__.lower()]
    trained = any(p.requires_grad for p in layers[0].parameters())
    return Stack(
        num_layers=len(layers),
        hidden=hidden,
        query=query,
        key=key,
        inner=max(inner, default=4 * hidden),
        gated=len(inner) > 1,
        rms=any("RMS" in name for name in norms),
        trained=trained,
        flows=flows or trained,
        layer_weights=sum(p.numel() for p in layers[0].parameters()),
    )


def _is_attention(name: str) -> bool:
    return any(word in name for word in ("attn", "attention"))


def _hidden_of(layer: nn.Module) -> int | None:
    linears = [
        module for name, module in layer.named_modules() if isinstance(module, nn.Linear) and _is_attention(name)
    ]
    return linears[0].in_features if linears else None


def _longest(lists: Iterable[nn.ModuleList]) -> nn.ModuleList | None:
    return max(lists, key=len, default=None)

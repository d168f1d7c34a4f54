"""A model's shapes and a batch in, the bytes that a training step needs at its peak out, part by part.

Nothing is loaded or run: shapes come from a model on torch's meta device. What autograd keeps of a layer is counted as
Korthikanti et al. count it (https://arxiv.org/abs/2205.05198, section 4), operation by operation for the layers as
transformers writes them; how weights, gradients and optimiser are divided over processes follows ZeRO
(https://arxiv.org/abs/1910.02054, section 5). `scripts/check_plan.py` holds it against measured peaks.

Left out: the allocator's fragmentation, CUDA's own context (about half a GiB), buffers of NCCL. Four bits
(`How.quantised`) were never measured.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from align.dpo.optimizers import state_bytes
from align.models.shapes import ModelShape, Stack
from align.prefix.token_stats import CHUNK_SIZE

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
# fp32 arrays of (tokens of a chunk, vocabulary) that the statistics of the head hold at a time, going backward:
# logits, log p, p, the gradient and two products on the way (`align.prefix.token_stats`).
HEAD_ARRAYS = 6
# What TRL's head computes at a time, and the fp32 arrays of a tile where its kernels are missing (trl.kernels).
TILE_TOKENS, TILE_VOCABULARY, TILE_ARRAYS = 4096, 32768, 7
# DeepSpeed's stage3_max_live_parameters: weights that may be gathered at a time.
ZERO3_LIVE = 1_000_000_000
# A weight in four bits: blocks of 64 have a scale of 8 bits, 256 of those one of 32 (arXiv 2305.14314, section 3).
FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
GIB = 2**30
# Of a GPU's memory: CUDA's own context, fragmentation and NCCL need the rest.
USABLE = 0.92


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
        """Tokens of both responses of a pair."""
        return self.chosen_tokens + self.rejected_tokens

    @property
    def unread_tokens(self) -> int:
        """Of shared prompts, those of which the last layer makes only keys and values: all but the last one of each."""
        return self.num_rows * (self.prompt_tokens - 1)


@dataclass(frozen=True)
class How:
    """How training is done: bytes of a stored weight and of a computed number, and what is traded for memory.

    `compute_bytes` below `weight_bytes` is autocast: weights are cast for each forward pass, and the casts are kept.
    `triton`: TRL's kernels of the head are there, as on a GPU; without them it scores every position, with copies, and
    dropout keeps numbers where a GPU keeps truth values. `quantised`:
    the linear layers under an adapter have four bits.
    `dropout`: an adapter's dropout acts, which TRL switches off by default. `kept_layers`: of the language
    model, whose activations are kept although those of the others are recomputed (`checkpointing`). `optimizer`: its
    name in `dpo.optim`.
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
    quantised: bool = False
    dropout: bool = False
    kept_layers: int = 0
    optimizer: str = "adamw_torch"

    @property
    def casts(self) -> bool:
        """Whether weights are cast to compute with them; where they are spread, what is gathered is narrow already."""
        return self.compute_bytes < self.weight_bytes and self.strategy == "ddp"

    @property
    def stream_bytes(self) -> int:
        """Of a number in the residual stream: autocast leaves it as the weights are."""
        return self.weight_bytes if self.casts else self.compute_bytes

    def trained_bytes(self, shape: ModelShape) -> int:
        """Of a trained weight and its gradient: adapters are fp32, on four bits bf16."""
        if not shape.adapter:
            return self.weight_bytes
        return 2 if self.quantised else 4


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
        """All of it, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(shape: ModelShape, batch: StepBatch, how: How) -> Memory:
    """The peak of a step after the first, in bytes.

    It is reached at the head, when the backward pass begins and all activations are there, or at the first layer, when
    it ends and all gradients are. Gradients of earlier micro-steps (`accumulates`) are there all the time.
    """
    size = how.trained_bytes(shape)
    gradient_total = shape.trained * size
    standing_gradients = gradient_total if how.accumulates else 0
    activations = all_activations = activation_bytes(shape, batch, how)
    in_layer = _layer_bytes(shape, batch, how)
    in_last = in_layer - _unread_inner(shape, batch, how)
    in_last -= _unread_bytes(shape, batch, how) if how.checkpointing else 0
    head_gradient = shape.embedding_weights * (size if how.strategy == "ddp" else how.compute_bytes)
    head_gradient *= shape.head_trained
    at_head = _head_bytes(shape, batch, how) + head_gradient
    if how.strategy != "fsdp2":
        # When the layer before the last one is gone through, what the last one kept is gone.
        at_head = max(at_head, in_last, in_layer - _kept_by_last(shape, batch, how))
    begin = activations + at_head + standing_gradients + _cast_bytes(shape, how)
    # The dense gradient of the embeddings is made beside what is there, and then added.
    embedding_copy = shape.embedding_weights * size if shape.embeddings_trained and how.accumulates else 0
    last = activations // max(shape.text.num_layers, 1)
    end = gradient_total + max(embedding_copy, in_layer) + last
    if begin >= end:
        working, gradients = begin - activations - standing_gradients, standing_gradients
    else:
        activations, working, gradients = last, end - gradient_total - last, gradient_total
    weights, optimiser = weight_bytes(shape, how), round(shape.trained * state_bytes(how.optimizer, size))
    weights += shape.weights * how.weight_bytes if how.second_model else 0
    if how.strategy == "ddp":
        # Gradients are exchanged in buckets, which are a second copy of them.
        gradients += gradient_total if how.num_processes > 1 else 0
    elif how.strategy == "fsdp2":
        weights = weight_bytes(shape, how) // how.num_processes * (2 if how.second_model else 1)
        optimiser //= how.num_processes
        gradients, activations, working = _fsdp2_peak(shape, how, all_activations, at_head, in_layer, in_last)
    else:
        # Gradients are in shards as soon as they are there, and casts are gathered layer by layer: the head decides.
        activations = all_activations
        weights, gradients, optimiser, working = _divided(shape, how, at_head)
    return Memory(weights, gradients, optimiser, activations, working, _batch_bytes(batch, how))


def weight_bytes(shape: ModelShape, how: How) -> int:
    """All weights in one process, an adapter's included."""
    adapter = shape.trained if shape.adapter else 0
    base = shape.weights - adapter
    rounded = shape.quantisable if how.quantised else 0
    return round(rounded * FOUR_BIT_BYTES + (base - rounded) * how.weight_bytes + adapter * how.trained_bytes(shape))


def _cast_bytes(shape: ModelShape, how: How) -> int:
    """What autocast makes of the matrices: of trained ones it keeps every cast, of frozen ones those that gradients
    pass are kept with the activations (with checkpointing, one layer's at a time)."""
    if not how.casts or how.quantised:
        return 0
    frozen = shape.frozen_linear
    if how.checkpointing and frozen:
        frozen = round(shape.text.frozen_linear) * max(1, how.kept_layers)
    return (shape.linear + frozen) * how.compute_bytes


def _divided(shape: ModelShape, how: How, working: int) -> tuple[int, int, int, int]:
    """Weights, gradients, optimiser and working memory where they are spread over processes.

    DeepSpeed computes in its own copy of `compute_bytes` and keeps an fp32 master copy with the optimiser.
    """
    ranks = how.num_processes
    own_copy = shape.weights * how.compute_bytes
    master = shape.trained * (4 if how.compute_bytes < 4 else 0)
    states = round(shape.trained * state_bytes(how.optimizer, 4)) + master
    second = own_copy if how.second_model else 0
    # Gradients are reduced in buckets of 5e8 numbers, under zero2 two of them at a time (overlap_comm).
    bucket = min(500_000_000 * (2 if how.strategy == "zero2" else 1), shape.trained) * how.compute_bytes
    gradients = shape.trained * 4 // ranks + bucket
    if how.strategy == "zero2":
        return own_copy + second, gradients, states // ranks, working
    gathered = shape.largest_layer * 2 + 2 * shape.embedding_weights
    live = min(gathered, ZERO3_LIVE, shape.weights) * how.compute_bytes
    return (own_copy + second) // ranks, gradients, states // ranks, working + live


def _fsdp2_peak(
    shape: ModelShape, how: How, activations: int, at_head: int, in_layer: int, in_last: int
) -> tuple[int, int, int]:
    """Gradients, activations and working memory of FSDP2 at its peak, at the beginning of forward or in backward.

    What is gathered is copied, and the first copies stay until the embeddings' are made. In backward a layer is
    gathered, in `compute_bytes`, while the one before it in that order still is; the head from the end of forward until
    its gradient is there; what is no layer, embeddings or head (vision towers, the projector) all the time. A group's
    gradients are copied to fp32 to be exchanged, and wait so until the next group's are there.
    """
    size, layer, embeddings = how.compute_bytes, shape.largest_layer, shape.embedding_weights
    share = how.trained_bytes(shape) / how.num_processes
    shards = round(shape.trained * share)
    standing = shards if how.accumulates else 0
    in_groups = shape.text.num_layers * layer + embeddings * (1 if shape.tied else 2)
    always = max(shape.weights - in_groups - (shape.trained if shape.adapter else 0), 0) * size
    always += (always + embeddings * size if how.second_model else 0) + (embeddings * size if shape.tied else 0)
    head = embeddings if shape.head_trained else 0
    # Tied to the embeddings, the head's gradient stays as it is until theirs is there.
    waiting, of_head = (head * size, 0) if shape.tied else (head * 4, round(head * share))
    trained = shape.text.trained and not shape.adapter
    # While a layer still has all that it kept, the only gradient is that of its last matrix.
    matrices = 2 * layer * size + (round(shape.text.inner * shape.text.hidden) * size if trained else 0)
    of_embeddings = embeddings * (size + 4) if shape.embeddings_trained else 0
    of_layer = matrices + in_layer + (layer * 4 if trained else 0)
    of_one = activations // max(shape.text.num_layers, 1)
    moments = [
        (standing, 0, always + 2 * embeddings * size),
        (standing, activations, at_head + (0 if shape.tied else embeddings) * size),
        (max(standing, of_head), activations, layer * size + head * size + waiting),
        (max(standing, of_head), activations, matrices + in_last + waiting),
        (max(standing, of_head), activations - of_one, of_layer),
        (shards, of_one, max(of_embeddings, of_layer)),
    ]
    gradients, kept, working = max(moments, key=sum)
    return gradients, kept, working + always


def least_recomputation(shape: ModelShape, batch: StepBatch, how: How, usable_bytes: int) -> How:
    """The same training with as few layers recomputed as memory allows, but one that trains vision towers: with all.

    What towers keep depends on the number of patches, which a batch does not always say.
    """
    checkpointed = replace(how, checkpointing=True, kept_layers=0)
    if any(tower.flows or tower.trained for tower in shape.towers):
        return checkpointed
    choices = [replace(how, checkpointing=False)]
    choices += [replace(checkpointed, kept_layers=kept) for kept in range(shape.text.num_layers - 1, 0, -1)]
    fitting = (choice for choice in choices if training_memory(shape, batch, choice).total <= usable_bytes)
    return next(fitting, checkpointed)


def activation_bytes(shape: ModelShape, batch: StepBatch, how: How) -> int:
    """What the forward pass leaves for the backward pass; with checkpointing, the inputs of layers only."""
    tokens, hidden = text_tokens(batch, how), shape.text.hidden
    # Before the layers: embeddings, and the same with visual tokens in their places; after them the last norm.
    total = float(tokens * hidden * (2 + (3 if shape.text.kept.norms else 1)) * how.stream_bytes)
    for stack in (shape.text, *shape.towers):
        if not (stack.flows or stack.trained):
            continue
        count = tokens if stack is shape.text else patches(batch, how)
        kept = stack.num_layers
        if how.checkpointing:
            kept = min(how.kept_layers, kept) if stack is shape.text else 0
        total += (stack.num_layers - kept) * stack.hidden * count * how.stream_bytes
        total += kept * _kept_by_layer(shape, stack, batch, how)
        if stack is shape.text and kept:
            total -= _unread_bytes(shape, batch, how)
    return int(total + _mask_bytes(shape, batch, how))


def kept_bytes(stack: Stack, how: How, *, shared_share: float = 0.0) -> float:
    """Bytes that one layer keeps of one token.

    Always: the inputs of norms; query, key, value and the attention's result; before and after the activation. With
    experts also what goes into and comes out of each, and the router's odds. `shared_share` is the share of tokens that
    stand behind a shared prompt: their queries are folded anew; and in that layout the attention's result is put
    together in a copy. `how.repeated_keys`: grouped keys are repeated for every query head (with a padding mask). The
    rest is `Kept`: only where weights of the layer, or adapters on them, are trained. The residual stream and what
    norms keep stay in the weights' type under autocast; RMSNorm computes in fp32.
    """
    kept, keys = stack.kept, stack.query if how.repeated_keys else stack.key
    dropped = kept.dropped if how.dropout else 0
    alone = how.casts or dropped > 0 or (kept.ranks > 0 and how.weight_bytes < 4)
    narrow = 2 * stack.query + 2 * keys + stack.query * shared_share + (3 if stack.gated else 1) * stack.inner
    narrow += kept.own_inputs if alone else kept.inputs
    narrow += kept.ranks + (kept.output if shared_share or dropped else 0)
    narrow += 2 * stack.top_k * stack.hidden
    wide: float = stack.norms * stack.hidden * (4 if stack.rms else how.stream_bytes)
    if stack.normed_heads:
        wide += (stack.query + stack.key) * 4 * (2 if kept.norms else 1)
    if stack.rms:
        wide += kept.norms * how.stream_bytes
    noise = dropped * (1 if how.triton else 4)
    return narrow * how.compute_bytes + wide + noise + 2 * stack.experts * 4


def _kept_by_layer(shape: ModelShape, stack: Stack, batch: StepBatch, how: How) -> int:
    if stack is not shape.text:
        return int(kept_bytes(stack, how) * patches(batch, how))
    if not how.shared:
        # SDPA turns the mask of true and false into numbers, in every layer anew, and keeps it.
        mask = 2 * batch.num_rows * _row_tokens(batch) ** 2 * how.compute_bytes if how.repeated_keys else 0
        return int(kept_bytes(stack, how) * text_tokens(batch, how)) + mask
    share = batch.response_tokens / (batch.prompt_tokens + batch.response_tokens)
    # Under autocast the mask's numbers are cast in every layer.
    cast = _mask_bytes(shape, batch, how) if how.casts else 0
    return int(kept_bytes(stack, how, shared_share=share) * text_tokens(batch, how)) + cast


def _unread_inner(shape: ModelShape, batch: StepBatch, how: How) -> int:
    """Bytes of the inner width that the last layer does not compute, where nobody reads it: at the prompts' tokens."""
    if not how.shared or shape.text.experts:
        return 0
    arrays = 3 if shape.text.gated else 1
    return round(batch.unread_tokens * arrays * shape.text.inner * how.compute_bytes)


def _unread_bytes(shape: ModelShape, batch: StepBatch, how: How) -> int:
    """What the last layer keeps less than another one (`align.prefix.last_layer`): the inner width, and its inputs."""
    inner, text = _unread_inner(shape, batch, how), shape.text
    if not inner or text.kept.inputs <= text.inner:
        return inner
    return inner + round(batch.unread_tokens * (text.inner + text.hidden) * how.compute_bytes)


def _kept_by_last(shape: ModelShape, batch: StepBatch, how: How) -> int:
    """Bytes that the last layer of the language model keeps: with checkpointing its input, unless it is left out."""
    if how.checkpointing and not how.kept_layers:
        return text_tokens(batch, how) * shape.text.hidden * how.stream_bytes
    return _kept_by_layer(shape, shape.text, batch, how) - _unread_bytes(shape, batch, how)


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
    """Patches of the batch that go through the vision towers."""
    return batch.patches * (1 if how.shared else 2)


def inference_memory(
    shape: ModelShape, *, weight_bytes: int, prompt_tokens: int, new_tokens: int, key_bytes: int
) -> Memory:
    """Encoding a prompt and keeping keys and values for it and for `new_tokens` behind it."""
    text = shape.text
    cache = 2 * text.num_layers * text.key * (prompt_tokens + new_tokens) * key_bytes
    working = round(prompt_tokens * (8 * text.hidden + (3 if text.gated else 1) * text.inner) * key_bytes)
    return Memory(shape.weights * weight_bytes, 0, 0, cache, working, 0)


def in_pieces(whole: Memory, shape: ModelShape, how: How) -> Memory:
    """The same, where `zero3` loads the model a piece a process and gathers layer after layer."""
    live = min(shape.largest_layer * 2 + 2 * shape.embedding_weights, ZERO3_LIVE, shape.weights) * how.weight_bytes
    return replace(whole, weights=whole.weights // how.num_processes, working=whole.working + live)


def _head_bytes(shape: ModelShape, batch: StepBatch, how: How) -> int:
    """Statistics of the responses' tokens: hidden states twice, logits of a chunk at a time.

    Separate rows go through TRL's own head: tiles of TILE_TOKENS by TILE_VOCABULARY, which its kernels work on in
    place, while torch makes fp32 arrays of them; without the kernels every position is scored.
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
    gradients = round(
        text_tokens(batch, how) * (2 * stack.hidden + (3 if stack.gated else 2) * stack.inner) * how.compute_bytes
    )
    return gradients + (_kept_by_layer(shape, stack, batch, how) if how.checkpointing else 0)


def _batch_bytes(batch: StepBatch, how: How) -> int:
    """The batch itself: pixels in fp32, ids and masks of 8 bytes."""
    copies = 1 if how.shared else 2
    return batch.pixels * 4 * copies + 5 * text_tokens(batch, how) * 8

"""A model's shape and a machine in; seconds of a forward pass, of tokens written one by one,
and of a training step out.

Three things take time. Matrix products: two operations for every weight and token (https://arxiv.org/abs/2001.08361,
section 2.1), and for attention four for every query, key it is scored with and unit of width, over what the machine
achieves (`tflops`); but never less than it takes to read the weights once. Everything else that a layer does, as
transformers writes it, is reading and writing arrays (`bandwidth_gbs`): the counts below were made by reading that
code. And each layer's operations must be started by Python (`layer_us`): beside the work on a GPU, which does not wait
for it, and on top of it on a CPU. Nothing here is fitted to a model; `scripts/check_plan.py --times` holds it against
measured seconds.

The processor's work on images is measured while prompts are counted (`PromptSize.prepared_s`); it, too, runs beside
a GPU. Left out: loading checkpoints, decoding pictures, the equivalence check on the first batch, stragglers.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.dpo.step_memory import GIB, USABLE
from align.models.shapes import ModelShape, Stack

# What an H100 achieves in bfloat16 in practice, of its 989 dense TFLOP/s; bytes a second of its memory; microseconds of
# Python for one layer of transformers; bytes a second that a GPU sends to others in its machine, and to other machines.
TFLOPS, BANDWIDTH_GBS, LAYER_US = 350.0, 2500.0, 500.0
NODE_GBS, NETWORK_GBS = 300.0, 40.0
GPUS_PER_NODE = 8
# Numbers read and written by a layer for a token beside matrix products: a norm (square, mean, scale, weight) and the
# addition behind it, in units of the width; rotary positions, in units of queries and keys; the activation and its
# product with what it gates, in units of the inner width; the products' own results and the keys' way into attention.
NORM_PASSES, ROTARY_PASSES, ACTIVATION_PASSES, ATTENTION_PASSES = 10, 10, 6, 4
# Of what matrix products achieve, fused attention achieves about so much (0.46 causal on one CPU thread).
ATTENTION_SHARE = 0.4
# Numbers of the vocabulary's width, for each token: log-probabilities; those with the statistics of training; going
# backward; choosing a token greedily, and from a nucleus (where finding the 512 likeliest takes most,
# measured on a CPU).
LOG_PROB_PASSES, STATISTICS_PASSES, GRADIENT_PASSES, GREEDY_PASSES, NUCLEUS_PASSES = 5, 12, 16, 3, 40
# Numbers for each trained weight: AdamW reads weight, gradient and two moments and writes three of them, in a handful
# of passes; the norm of the gradient is read before and scaled.
OPTIMISER_PASSES = 18
# Going backward: half of the start-up, since autograd starts its operations without Python.
BACKWARD_START = 0.5


@dataclass(frozen=True)
class Machine:
    """`gpus` in all, each with `gpu_gib` of memory, `tflops` achieved and `bandwidth_gbs` of memory traffic.

    `bandwidth_gbs` is what a product of few rows reads its weights with; `arrays_gbs` what other operations read and
    write their arrays with, where that is another (on a CPU these stay in its caches); 0: the same.
    `layer_us`: microseconds to start a layer's operations; `waits`: the work waits for them, as on a CPU. `link_gbs`:
    what one GPU sends a second to the others; 0: that of one machine, or of a network between machines of eight.
    `measured_on`: the device and the date, where these numbers are not assumed.
    """

    gpus: int = 1
    gpu_gib: float = 80.0
    tflops: float = TFLOPS
    bandwidth_gbs: float = BANDWIDTH_GBS
    layer_us: float = LAYER_US
    waits: bool = False
    link_gbs: float = 0.0
    arrays_gbs: float = 0.0
    measured_on: str = ""

    @property
    def usable_bytes(self) -> int:
        """What of a GPU can be allocated."""
        return int(self.gpu_gib * GIB * USABLE)

    @property
    def sent_a_second(self) -> float:
        """Bytes per second between GPUs."""
        return 1e9 * (self.link_gbs or (NODE_GBS if self.gpus <= GPUS_PER_NODE else NETWORK_GBS))


@dataclass(frozen=True)
class Cost:
    """Seconds of work and of starting it."""

    work: float = 0.0
    start: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.work + other.work, self.start + other.start)

    def times(self, work: float, start: float | None = None) -> Cost:
        """The cost of so many times the work, and the launches."""
        return Cost(self.work * work, self.start * (work if start is None else start))

    def seconds(self, machine: Machine) -> float:
        """On this machine."""
        return self.work + self.start if machine.waits else max(self.work, self.start)


@dataclass(frozen=True)
class Pass:
    """How often a pass through layers does what a forward pass does: products, attention, arrays, start-up.

    Backward, fused attention computes its scores again: five products instead of two.
    """

    products: float = 1.0
    attention: float = 1.0
    arrays: float = 1.0
    start: float = 1.0


FORWARD = Pass()


@dataclass(frozen=True)
class Speed:
    """One GPU of a machine with one model; numbers of `number_bytes`, weights read as `number_bytes` too."""

    shape: ModelShape
    machine: Machine
    number_bytes: int

    def layers(
        self,
        stack: Stack,
        tokens: float,
        scores: float,
        *,
        unread: float = 0.0,
        keys_read: float = 0.0,
        calls: float = 1,
        way: Pass = FORWARD,
    ) -> Cost:
        """All layers once over so many tokens in so many calls; `scores`: pairs of query and key, in all;
        `unread`: of the tokens, those for which the last layer makes only keys and values
        (`align.prefix.last_layer`); `keys_read`: tokens whose keys and values are read from a cache."""
        reading = self._moving(calls * touched_weights(stack, tokens / calls) * self.number_bytes)
        keys = self._moving(keys_read * 2 * stack.key * self.number_bytes)
        attention = max(self._computing(4 * stack.query * scores) / ATTENTION_SHARE, keys)

        def one(flops: float, moved: float) -> float:
            products = max(self._computing(flops), reading)
            return way.products * products + way.attention * attention + way.arrays * self._numbers(moved)

        flops, moved = 2 * stack.active_weights * tokens, tokens * passes_of(stack)
        unread = 0.0 if stack.experts else unread
        spared = 2 * (stack.active_weights - 2 * stack.hidden * stack.key) * unread
        last = one(flops - spared, moved - unread * ACTIVATION_PASSES * stack.inner)
        start = way.start * calls * self.machine.layer_us * 1e-6
        return Cost((stack.num_layers - 1) * one(flops, moved) + last, stack.num_layers * start)

    def head(self, tokens: float, passes: float, *, products: float = 1, calls: float = 1) -> Cost:
        """The vocabulary's projection for so many tokens, and what is done with its fp32 results."""
        weights = self.shape.embedding_weights
        computing = self._computing(2 * weights * tokens * products)
        reading = calls * products * self._moving(weights * self.number_bytes)
        return Cost(max(computing, reading) + self._numbers(passes * tokens * self.shape.vocabulary, 4))

    def towers(self, patches: float, scores: float, calls: float = 1) -> Cost:
        """The vision towers forward; `scores`: pairs of patches that see one another."""
        total = Cost()
        for tower in self.shape.towers:
            total += self.layers(tower, patches, scores, calls=calls)
        return total

    def projector(self, visual_tokens: float) -> Cost:
        """The cost of projecting so many visual tokens."""
        return Cost(self._computing(2 * self.shape.parts.get("projector", 0) * visual_tokens))

    def optimiser(self) -> Cost:
        """One step of AdamW over what is trained, all of it in this process."""
        return Cost(self._numbers(OPTIMISER_PASSES * self.shape.trained, 4))

    def _computing(self, flops: float) -> float:
        return flops / (self.machine.tflops * 1e12)

    def _moving(self, num_bytes: float) -> float:
        return num_bytes / (self.machine.bandwidth_gbs * 1e9)

    def _numbers(self, count: float, size: int | None = None) -> float:
        """Numbers of arrays that operations read and write."""
        moved = count * (size or self.number_bytes)
        return moved / ((self.machine.arrays_gbs or self.machine.bandwidth_gbs) * 1e9)

    def writing(self, rows: float, branches: float, prompt: float, tokens: float, passes: float) -> Cost:
        """One batch written to its end: `branches` of each of `rows` questions, `tokens` steps.

        Every step reads the weights and the keys of the batch once. A branch's query is scored with all keys of its
        row, those of its neighbours too, and the mask that hides these is made anew in every step.
        """
        text, width = self.shape.text, rows * branches
        mean_keys = prompt + branches * tokens / 2
        step = self.layers(text, width, width * mean_keys, keys_read=rows * mean_keys) + self.head(width, passes)
        groups = max(text.query // text.key, 1)
        mask = self._numbers(width * mean_keys * (19 + 4 * groups), 1)
        return Cost(tokens * (step.work + mask), tokens * step.start)


def passes_of(stack: Stack) -> float:
    """Numbers that a layer reads and writes for one token beside its weights."""
    heads = stack.query + stack.key
    norms = stack.norms * stack.hidden + (heads if stack.normed_heads else 0)
    experts = 4 * stack.top_k * stack.hidden
    return NORM_PASSES * norms + (ROTARY_PASSES + ATTENTION_PASSES) * heads + ACTIVATION_PASSES * stack.inner + experts


def touched_weights(stack: Stack, tokens: float) -> float:
    """Weights of a layer that so many tokens together read: of experts those that some token chooses.

    With k of E experts a token, an expert is left alone by n tokens with probability (1 - k/E)^n.
    """
    if not stack.experts:
        return stack.layer_weights
    share = stack.top_k / stack.experts
    in_experts = (stack.layer_weights - stack.active_weights) / (1 - share) if share < 1 else 0.0
    return stack.layer_weights - in_experts * (1 - share) ** tokens


def sent_bytes(strategy: str, shape: ModelShape, num_gpus: int, accumulation: int) -> float:
    """Bytes that one GPU sends in a step, with ring algorithms: (N - 1) / N of what is gathered or scattered.

    ddp: gradients in fp32, reduced and spread again, once a step. zero2: gradients in bf16 scattered in every
    micro-step, weights in bf16 gathered once a step. zero3 and fsdp2: in every micro-step weights gathered forward and
    again backward, and gradients scattered, all in bf16.
    """
    share = (num_gpus - 1) / num_gpus
    if strategy == "ddp":
        return share * 2 * shape.trained * 4
    if strategy == "zero2":
        return share * (accumulation * shape.trained * 2 + shape.trained * 2)
    return share * accumulation * (2 * shape.weights * 2 + shape.trained * 2)

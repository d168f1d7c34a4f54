"""The shared path: what is asked of a batch of questions, computed behind prompts that are encoded once.

The counterpart of `align.engines.unshared_path`. Raises PrefixUnsupported where the architecture does not allow it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.engines.base import SampleRequest
from align.engines.batching import Batch
from align.engines.decoding import Branches, Decoded, Decoder, Prompts, prefill
from align.engines.kv_cache import RowCache, SegmentPlacement, to_device
from align.engines.prompts import PromptTree, of_segments
from align.engines.sampling_run import SampleQueue, SamplingRun
from align.prefix.attention import AttentionPlan, active_layout, use_shared_prefix
from align.prefix.layout import Layout, Segment
from align.prefix.log_probs import head_of, hidden_to_stats
from align.prefix.rows import backbone_of
from align.prefix.token_stats import token_stats

# Segments behind a prompt are computed so many tokens at a time: more needs memory (what a chunk may see is a mask of
# chunk x (prompt + chunk) in every query head of a key head) and is no faster.
CHUNK_TOKENS = 512
# New questions are begun once there is room for this part of a batch.
REFILL_SHARE = 0.25


class SharedPath:
    """Every prompt encoded once, its branches behind it."""

    def __init__(self, model: PreTrainedModel, eos: Sequence[int]) -> None:
        use_shared_prefix(model)
        self.model = model
        self.eos = list(eos)

    def sample(self, queue: SampleQueue, run: SamplingRun) -> None:
        """Answer all questions of the queue; one begins as soon as others have left room for it."""
        decoder = self._decoder(run)
        while queue or decoder.num_branches:
            count = _room(run, decoder)
            batch = queue.take(count) if count else None
            if batch is not None:
                self._begin(batch, decoder, run)
            for decoded in decoder.step():
                run.finish(decoded.ticket, decoded.tokens, decoded.stopped)

    def sample_batch(self, batch: Batch[SampleRequest], run: SamplingRun) -> list[Decoded]:
        """The samples of one batch with their log-probabilities, for the check of equivalence; nothing is finished."""
        decoder = self._decoder(run, with_log_probs=True)
        tickets = self._begin(batch, decoder, run)
        found: dict[int, Decoded] = {}
        while decoder.num_branches:
            found |= {decoded.ticket: decoded for decoded in decoder.step()}
        return [found[ticket] for ticket in tickets]

    def _decoder(self, run: SamplingRun, *, with_log_probs: bool = False) -> Decoder:
        return Decoder(
            self.model,
            run.sampler,
            max_new_tokens=run.settings.max_new_tokens,
            eos=self.eos,
            with_log_probs=with_log_probs,
            more=run.num_more if run.wants_more else None,
        )

    def _begin(self, batch: Batch[SampleRequest], decoder: Decoder, run: SamplingRun) -> list[int]:
        run.begin(decoder.free_tickets(len(batch)), batch)
        prompts = prefill(self.model, batch.inputs, decoder.cache, decoder.free_rows(len(batch)))
        return decoder.add(Branches.behind(prompts, list(map(run.num_branches, batch.items))))

    @torch.no_grad()
    def log_probs(self, batch: Batch[PromptTree]) -> list[np.ndarray]:
        """Per tree `(num_branches, num_options)`: log-probabilities of each option behind each branch."""
        trees = [_with_options(tree) for tree in batch.items]
        tables = [np.zeros((len(tree.leaf_segments), len(tree.options))) for tree in batch.items]
        head = head_of(self.model)
        for chunk in self._chunks(batch.inputs, trees):
            reads = [
                (b, read)
                for b, (tree, kept) in enumerate(zip(batch.items, chunk.kept, strict=True))
                for read in _reads(tree, kept, chunk.layout.last[b].tolist())
            ]
            row, at, token = to_device(
                [[b for b, _ in reads], [read.at for _, read in reads], [read.token for _, read in reads]],
                chunk.hidden.device,
            )
            values = token_stats(
                chunk.hidden[row, chunk.index_of(at)].to(head.weight.device),
                head.weight,
                head.bias,
                token.to(head.weight.device),
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            ).log_probs.tolist()
            for (b, read), value in zip(reads, values, strict=True):
                tables[b][read.branch, read.option] += value
        return tables

    @torch.no_grad()
    def loglikelihood(self, batch: Batch[PromptTree], *, temperature: float = 1.0) -> list[list[list[float]]]:
        """Per tree and segment the log-probabilities of its tokens at a sampling temperature."""
        found: list[list[list[float]]] = [[[] for _ in tree.segments] for tree in batch.items]
        for chunk in self._chunks(batch.inputs, [tree.segments for tree in batch.items]):
            at = chunk.index_of(chunk.layout.predicted_at.to(chunk.hidden.device))
            hidden = chunk.hidden.gather(1, at[:, :, None].expand(-1, -1, chunk.hidden.shape[-1]))
            values = hidden_to_stats(self.model, hidden, chunk.layout, temperature=temperature).log_probs
            for b, by_segment in enumerate(of_segments(values, chunk.rows)):
                for index, own in zip(chunk.kept[b], by_segment, strict=True):
                    found[b][index] = own
        return found

    @torch.no_grad()
    def generate(self, batch: Batch[PromptTree], *, max_new_tokens: int) -> list[list[list[int]]]:
        """Greedy answers of all branches, `[tree][branch]`, decoded side by side behind the tree."""
        decoder = Decoder(self.model, _greedy, max_new_tokens=max_new_tokens, eos=self.eos)
        prompts = prefill(self.model, batch.inputs, decoder.cache, range(len(batch)))
        rows = [tree.segments for tree in batch.items]
        layout = Layout.build(batch.inputs["attention_mask"], rows, pad_token_id=0)
        hidden = _segment_states(self.model, decoder.cache, prompts, layout)
        most = max(len(tree.leaf_segments) for tree in batch.items)
        leaves = [
            tree.leaf_segments + tree.leaf_segments[:1] * (most - len(tree.leaf_segments)) for tree in batch.items
        ]
        ends = layout.last.gather(1, to_device(leaves, layout.last.device)) - layout.prompt_mask.shape[1]
        assert bool((ends >= 0).all()), "a leaf has at least the template's rest"
        at = torch.arange(len(batch), device=hidden.device)[:, None]
        position = prompts.next_position[:, None] + layout.path_position.gather(1, ends)
        tickets = decoder.add(
            Branches(
                rows=prompts.rows,
                visible=layout.mask()[:, 0][at.to(ends.device), ends],
                position=position + 1,
                hidden=hidden[at, ends.to(hidden.device)],
                counts=[len(tree.leaf_segments) for tree in batch.items],
                num_axes=prompts.num_axes,
            )
        )
        answers: dict[int, list[list[int]]] = {}
        while decoder.num_branches:
            answers |= {decoded.ticket: decoded.tokens for decoded in decoder.step()}
        return [answers[ticket] for ticket in tickets]

    def _chunks(self, inputs: dict[str, Any], rows: Sequence[Sequence[Segment]]) -> Iterator[_Chunk]:
        """The segments behind every prompt, some at a time, each chunk with its states."""
        cache = RowCache()
        prompts = prefill(self.model, inputs, cache, range(len(rows)))
        for kept in itertools.zip_longest(*(chunks_of(row, CHUNK_TOKENS) for row in rows), fillvalue=[]):
            parts = [renumbered(row, indices) for row, indices in zip(rows, kept, strict=True)]
            layout = Layout.build(inputs["attention_mask"], parts, pad_token_id=0)
            hidden = _segment_states(self.model, cache, prompts, layout)
            yield _Chunk(list(kept), parts, layout, torch.cat([prompts.hidden[:, None], hidden], dim=1))


@dataclass(frozen=True)
class _Chunk:
    """Some segments of every row: their indices `kept`, themselves `rows`, their layout, and `hidden` `(B, 1 + S, H)`,
    the state of the prompt's last token and those of the segments'."""

    kept: list[list[int]]
    rows: list[list[Segment]]
    layout: Layout
    hidden: Tensor

    def index_of(self, at: Tensor) -> Tensor:
        """From places in the row `[prompt (P) | segments (S)]` that predict a segment to places in `hidden`."""
        return (at - self.layout.prompt_mask.shape[1] + 1).clamp(min=0)


def _segment_states(model: PreTrainedModel, cache: RowCache, prompts: Prompts, layout: Layout) -> Tensor:
    """`(B, S, H)`: states of segments behind the prompts in the cache, which then has their keys right behind it."""
    width, length = layout.prompt_mask.shape[1], layout.input_ids.shape[1]
    cache.reserve(len(prompts.rows), width + length)
    cache.placement = SegmentPlacement(width, width + length)
    positions = prompts.next_position[:, None] + layout.path_position
    if prompts.num_axes is not None:
        positions = positions.expand(prompts.num_axes, -1, -1)
    with active_layout(AttentionPlan(0, layout.mask())):
        return backbone_of(model)(
            input_ids=layout.input_ids, position_ids=positions, past_key_values=cache, use_cache=True, return_dict=True
        ).last_hidden_state


def chunks_of(segments: Sequence[Segment], most: int) -> list[list[int]]:
    """Indices of segments in chunks of at most so many tokens: a child of the prompt is with all that stands below it.

    A larger child is a chunk of its own.

    >>> row = [Segment([1, 2]), Segment([3], 0), Segment([4, 5]), Segment([6], 1), Segment([7, 8])]
    >>> chunks_of(row, 6), chunks_of(row, 1)
    ([[0, 1, 2, 3], [4]], [[0, 1, 3], [2], [4]])
    """
    top: list[int] = []
    groups: dict[int, list[int]] = {}
    for index, segment in enumerate(segments):
        top.append(index if segment.parent is None else top[segment.parent])
        groups.setdefault(top[index], []).append(index)
    chunks: list[list[int]] = []
    room = 0
    for group in groups.values():
        size = sum(len(segments[index].token_ids) for index in group)
        if size > room or not chunks:
            chunks.append([])
            room = most
        chunks[-1] += group
        room -= size
    return [sorted(chunk) for chunk in chunks]


def renumbered(segments: Sequence[Segment], kept: Sequence[int]) -> list[Segment]:
    """Some segments, with the parents' new numbers."""
    new: dict[int | None, int | None] = {None: None, **{old: number for number, old in enumerate(kept)}}
    return [Segment(segments[old].token_ids, new[segments[old].parent]) for old in kept]


def _with_options(tree: PromptTree) -> list[Segment]:
    """A tree's segments, and one below every leaf for every option of several tokens; its last token is not read."""
    return [
        *tree.segments,
        *(Segment(option[:-1], leaf) for leaf in tree.leaf_segments for option in tree.options if len(option) > 1),
    ]


@dataclass(frozen=True)
class _Read:
    """A token of an option of a branch, and where in the row it is predicted."""

    branch: int
    option: int
    at: int
    token: int


def _reads(tree: PromptTree, kept: Sequence[int], last: Sequence[int]) -> list[_Read]:
    """Every token of every option of the branches whose leaves are among the segments `kept` of `_with_options`.

    `last` is the row's part of `Layout.last`.
    """
    end_of = dict(zip(kept, last, strict=False))
    segment = len(tree.segments)
    reads = []
    for branch, leaf in enumerate(tree.leaf_segments):
        for o, option in enumerate(tree.options):
            if leaf in end_of:
                reads.append(_Read(branch, o, end_of[leaf], option[0]))
            if len(option) > 1:
                if segment in end_of:
                    first = end_of[segment] - (len(option) - 2)
                    reads += [_Read(branch, o, first + i, token) for i, token in enumerate(option[1:])]
                segment += 1
    return reads


def _greedy(logits: Tensor, *_: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def _room(run: SamplingRun, decoder: Decoder) -> int:
    """How many questions to begin now: several at a time, or whatever there is room for where nothing is left to do."""
    queue, sizer = run.queue, run.queue.sizer
    if not queue:
        return 0
    batch, held = sizer.num_items(queue.kind), sizer.num_held(queue.kind)
    per_question = max(1, max(map(run.num_branches, queue.items)))
    room = min(held - decoder.num_questions, batch - -(-decoder.num_branches // per_question))
    if not decoder.num_branches:
        return max(1, room)
    return room if room >= max(1, REFILL_SHARE * batch) else 0

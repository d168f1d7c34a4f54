"""The unshared path: every sample and every branch as a full sequence of its own, with stock `model.generate`.

Used where the shared prefix is switched off, or the model does not allow it. Samples are drawn by the same numbers as
on the shared path, so that both give the same responses; judgements read the same tokens. Questions are taken one by
one: no prompt has another's padding, which not every architecture bears.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from align.engines.batching import Batch
from align.engines.prompts import PromptTree, of_segments
from align.engines.sampling import Sampler, not_finite
from align.engines.sampling_run import SampleQueue, SamplingRun
from align.prefix.layout import Layout, Segment
from align.prefix.log_probs import unshared_segments
from align.prefix.rows import row_inputs


class UnsharedPath:
    """Every prompt repeated for every sample and branch. Batches have one item."""

    def __init__(self, model: PreTrainedModel, eos: Sequence[int]) -> None:
        self.model = model
        self.eos = list(eos)

    def sample(self, queue: SampleQueue, run: SamplingRun) -> None:
        """Answer all questions of the queue, one after the other."""
        while queue:
            batch = queue.take(1)
            if batch is None:
                return
            run.begin([0], batch)
            tokens: list[list[int]] = []
            stopped: list[bool] = []
            count = run.num_branches(batch.items[0])
            while count:
                new, ended = self._draw(batch.inputs, run, count)
                tokens, stopped = tokens + new, stopped + ended
                count = run.num_more(0, tokens, stopped)
            run.finish(0, tokens, stopped)

    def _draw(self, inputs: dict[str, Any], run: SamplingRun, count: int) -> tuple[list[list[int]], list[bool]]:
        width = inputs["input_ids"].shape[1]
        forced = ForcedTokens(run.sampler, width)
        with _only_these_settings(self.model, self.eos), torch.no_grad():
            output = self.model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=count,
                max_new_tokens=run.settings.max_new_tokens,
                logits_processor=LogitsProcessorList([forced]),
            )
        if forced.broken is not None and bool(forced.broken):
            raise not_finite()
        return _cut_at_end(output[:, width:].tolist(), self.eos)

    @torch.no_grad()
    def log_probs(self, batch: Batch[PromptTree]) -> list[np.ndarray]:
        """Per tree `(num_branches, num_options)`: every branch with every option as a full sequence of its own."""
        tree = _only(batch)
        table = np.empty((len(tree.leaf_segments), len(tree.options)))
        for branch, leaf in enumerate(tree.leaf_segments):
            row = [Segment(path_tokens(tree, leaf)), *(Segment(option, parent=0) for option in tree.options)]
            layout = Layout.build(batch.inputs["attention_mask"], [row], pad_token_id=0)
            values = unshared_segments(self.model, batch.inputs, layout).log_probs[0]
            for o in range(len(tree.options)):
                table[branch, o] = float(values[layout.segment[0] == 1 + o].double().sum())
        return [table]

    @torch.no_grad()
    def loglikelihood(self, batch: Batch[PromptTree], *, temperature: float = 1.0) -> list[list[list[float]]]:
        """Per tree and segment the log-probabilities of its tokens, every path as a full sequence of its own."""
        layout = Layout.build(batch.inputs["attention_mask"], [tree.segments for tree in batch.items], pad_token_id=0)
        values = unshared_segments(self.model, batch.inputs, layout, temperature=temperature).log_probs
        return of_segments(values, [tree.segments for tree in batch.items])

    @torch.no_grad()
    def generate(self, batch: Batch[PromptTree], *, max_new_tokens: int) -> list[list[list[int]]]:
        """Greedy answers of every branch, `[tree][branch]`, one full prompt after the other."""
        tree = _only(batch)
        answers = []
        for leaf in tree.leaf_segments:
            row = [Segment(path_tokens(tree, leaf))]
            layout = Layout.build(batch.inputs["attention_mask"], [row], pad_token_id=0)
            inputs = row_inputs(self.model, batch.inputs, layout, packed=True)
            with _only_these_settings(self.model, self.eos):
                output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            tokens, _ = _cut_at_end(output[:, inputs["input_ids"].shape[1] :].tolist(), self.eos)
            answers += tokens
        return [answers]


class ForcedTokens(LogitsProcessor):
    """Leaves only the sampled token in generate's scores; `broken` is True `()` once logits were not finite."""

    def __init__(self, sampler: Sampler, num_prompt_tokens: int) -> None:
        self.sampler = sampler
        self.num_prompt_tokens = num_prompt_tokens
        self.broken: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        branch = torch.arange(len(scores), device=scores.device)
        step = torch.full_like(branch, input_ids.shape[1] - self.num_prompt_tokens)
        tokens = self.sampler(scores.float(), torch.zeros_like(branch), branch, step)
        broken = (tokens < 0).any()
        self.broken = broken if self.broken is None else self.broken | broken
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter(1, tokens.clamp(min=0)[:, None], 0.0)


@contextmanager
def _only_these_settings(model: PreTrainedModel, eos: list[int]) -> Iterator[GenerationConfig]:
    """A generation config without the checkpoint's extras (penalties, filters), which generate would merge in."""
    before = model.generation_config
    pad = getattr(before, "pad_token_id", None)
    model.generation_config = GenerationConfig(
        eos_token_id=eos or None, pad_token_id=pad if pad is not None else (eos[0] if eos else 0)
    )
    try:
        yield model.generation_config
    finally:
        model.generation_config = before


def path_tokens(tree: PromptTree, leaf: int) -> list[int]:
    """All tokens between the prompt and the end of a segment."""
    segment = tree.segments[leaf]
    above = [] if segment.parent is None else path_tokens(tree, segment.parent)
    return [*above, *segment.token_ids]


def _only(batch: Batch[PromptTree]) -> PromptTree:
    (tree,) = batch.items
    return tree


def _cut_at_end(rows: list[list[int]], eos: list[int]) -> tuple[list[list[int]], list[bool]]:
    tokens, stopped = [], []
    for row in rows:
        end = next((i for i, token in enumerate(row) if token in eos), None)
        tokens.append(row if end is None else row[: end + 1])
        stopped.append(end is not None)
    return tokens, stopped

"""The unshared path: every sample and every branch as a full sequence of its own, with stock `model.generate`.

Used where the shared prefix is switched off, or the model does not allow it. Samples are chosen by the same numbers as
on the shared path, so that both give the same responses; judgements read the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from align.engines.decoding import Sampler
from align.engines.prompts import PromptTree, of_segments
from align.prefix.layout import Layout, Segment
from align.prefix.log_probs import unshared_segments
from align.prefix.rows import row_inputs

Encode = Callable[[Sequence[str], Sequence[Sequence[Any]]], dict[str, Any]]


class ForceChoice(LogitsProcessor):
    """Leaves only the chosen token in generate's scores."""

    def __init__(self, choose: Sampler, num_prompt_tokens: int) -> None:
        self.choose = choose
        self.num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        branch = torch.arange(len(scores), device=scores.device)
        step = input_ids.shape[1] - self.num_prompt_tokens
        tokens = self.choose(scores.float(), torch.zeros_like(branch), branch, step)
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter(1, tokens[:, None], 0.0)


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


@torch.no_grad()
def unshared_sample(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    choose: Sampler,
    *,
    num_samples: int,
    max_new_tokens: int,
    eos: list[int],
) -> tuple[list[list[int]], list[bool]]:
    """Samples of one question (`inputs` of one row): their tokens, and whether each ended by itself."""
    num_prompt_tokens = inputs["input_ids"].shape[1]
    with _only_these_settings(model, eos):
        output = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=num_samples,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([ForceChoice(choose, num_prompt_tokens)]),
        )
    return _cut_at_end(output[:, num_prompt_tokens:].tolist(), eos)


@torch.no_grad()
def unshared_generate(
    model: PreTrainedModel,
    encode: Encode,
    trees: Sequence[PromptTree],
    images: Sequence[Sequence[Any]],
    *,
    max_new_tokens: int,
    eos: list[int],
) -> list[list[list[int]]]:
    """Greedy answers of every branch, one full prompt after the other."""
    results = []
    for tree, own in zip(trees, images, strict=True):
        inputs = encode([tree.prompt], [own])
        answers = []
        for leaf in tree.leaf_segments:
            layout = Layout.build(inputs["attention_mask"], [[Segment(path_tokens(tree, leaf))]], pad_token_id=0)
            row = row_inputs(model, inputs, layout, packed=True)
            with _only_these_settings(model, eos):
                output = model.generate(**row, do_sample=False, max_new_tokens=max_new_tokens)
            tokens, _ = _cut_at_end(output[:, row["input_ids"].shape[1] :].tolist(), eos)
            answers += tokens
        results.append(answers)
    return results


@torch.no_grad()
def unshared_log_probs(
    model: PreTrainedModel, encode: Encode, trees: Sequence[PromptTree], images: Sequence[Sequence[Any]]
) -> list[np.ndarray]:
    """Per prompt `(num_branches, num_options)`: every branch with every option as a full sequence of its own."""
    results = []
    for tree, own in zip(trees, images, strict=True):
        inputs = encode([tree.prompt], [own])
        table = np.empty((len(tree.leaf_segments), len(tree.options)))
        for branch, leaf in enumerate(tree.leaf_segments):
            path = path_tokens(tree, leaf)
            row = [Segment(path), *(Segment(option, parent=0) for option in tree.options)]
            layout = Layout.build(inputs["attention_mask"], [row], pad_token_id=0)
            values = unshared_segments(model, inputs, layout).log_probs[0]
            for o in range(len(tree.options)):
                table[branch, o] = float(values[layout.segment[0] == 1 + o].double().sum())
        results.append(table)
    return results


@torch.no_grad()
def unshared_loglikelihood(
    model: PreTrainedModel,
    encode: Encode,
    trees: Sequence[PromptTree],
    images: Sequence[Sequence[Any]],
    *,
    temperature: float,
) -> list[list[list[float]]]:
    """Per tree and segment the log-probabilities of its tokens, every segment as a full sequence of its own."""
    results = []
    for tree, own in zip(trees, images, strict=True):
        inputs = encode([tree.prompt], [own])
        layout = Layout.build(inputs["attention_mask"], [tree.segments], pad_token_id=0)
        results += of_segments(unshared_segments(model, inputs, layout, temperature=temperature).log_probs, [tree])
    return results


def path_tokens(tree: PromptTree, leaf: int) -> list[int]:
    """All tokens between the prompt and the end of a segment."""
    segment = tree.segments[leaf]
    above = [] if segment.parent is None else path_tokens(tree, segment.parent)
    return [*above, *segment.token_ids]


def _cut_at_end(rows: list[list[int]], eos: list[int]) -> tuple[list[list[int]], list[bool]]:
    tokens, stopped = [], []
    for row in rows:
        end = next((i for i, token in enumerate(row) if token in eos), None)
        tokens.append(row if end is None else row[: end + 1])
        stopped.append(end is not None)
    return tokens, stopped

"""A model in this process as an engine: one vision pass and one prefill a question, however much is asked of it.

Sampling grows all samples of a question behind its one encoded prompt; branched prompts put all branches of a comparison behind it.
Both are checked on the first real batch against separate full sequences; where they disagree, or the architecture does
not allow a shared prefix, the unshared path is used instead and `notes` say why.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from align.engines.base import GivenResponses, SampleRequest, SampleResult, SamplingSettings
from align.engines.batch_size import BatchSizer
from align.engines.decoding import Sampler
from align.engines.prefetch import Prefetcher
from align.engines.prompts import Prompter, PromptTree, to_device
from align.engines.sampling import SeededSampler, uniforms
from align.engines.shared_path import (
    check_branches,
    check_decoding,
    sample_behind,
    shared_generate,
    shared_log_probs,
    shared_loglikelihood,
)
from align.engines.streaming import StreamingSampler
from align.engines.unshared_path import (
    path_tokens,
    unshared_generate,
    unshared_log_probs,
    unshared_loglikelihood,
    unshared_sample,
)
from align.errors import UserError, is_out_of_memory
from align.monitoring.cost import count_tokens
from align.prefix.attention import PrefixUnsupported, stop_shared_prefix, use_shared_prefix
from align.prefix.equivalence import Equivalence, failed
from align.prefix.layout import Segment
from align.prefix.rows import placeholder_ids
from reward.judge_model import BranchedPrompt

# Items of the first batch, which is computed both ways.
CHECK_ITEMS = 2

# Tokens that an item reads, and that it may write.
Size = tuple[int, int]


class LocalEngine:
    """`Engine` with a loaded model.

    `open_image` opens an image handle. `shared_prefix`: `auto` uses it where the first batch shows that it is exact, `on` raises
    UserError where it is not, `off` never does. `batch_size` is in questions; None finds it by itself.
    `fallback_reason` is None as long as the shared prefix is used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        open_image: Callable[[Any], Any] = lambda image: image,
        shared_prefix: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.prompter = Prompter(processor, open_image)
        self.shared_prefix = shared_prefix
        self.batch_sizer = BatchSizer(model, batch_size)
        self.notes: dict[str, str] = {}
        self.fallback_reason: str | None = None
        self._checked: set[str] = set()
        self._on_step: Callable[[list[list[int]]], None] | None = None
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.eos_token_ids = _eos_token_ids(model, self.prompter.tokenizer)
        if shared_prefix == "off":
            self._fall_back("switched off (shared_prefix: off)")

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        on_result: Callable[[SampleResult], None],
    ) -> None:
        """Answer all requests; `on_result` is called once a question, as soon as its last sample has ended."""
        answered: set[int] = set()

        def prepare(batch: list[int]) -> dict[str, Any]:
            texts = [self.prompter.render(requests[i].messages) for i in batch]
            return self.prompter.encode(texts, [requests[i].images for i in batch])

        def run(batch: list[int], inputs: dict[str, Any]) -> Size:
            def keep(b: int, tokens: list[list[int]], stopped: list[bool]) -> None:
                answered.add(batch[b])
                count_tokens(written=sum(map(len, tokens)))
                on_result(self._result(requests[batch[b]].id, tokens, stopped))

            return self._sample(inputs, [requests[i] for i in batch], settings, keep)

        self._in_batches(
            list(range(len(requests))),
            prepare,
            run,
            check="samples",
            alike=lambda i: (bool(requests[i].images), requests[i].num_samples),
            answered=answered,
        )

    def stream(
        self, request: SampleRequest, settings: SamplingSettings, on_texts: Callable[[tuple[str, ...]], None]
    ) -> SampleResult:
        """Answer one request as `sample` does; after every token `on_texts` gets what each sample says so far.

        What it raises ends the answer; `Stopped` (align.engines.streaming) is meant for that. An answer ends where the model's
        context does.

        Raises:
            UserError: the processor refuses the conversation, or it is longer than the model's context or the memory.
        """
        results: list[SampleResult] = []

        def keep(_: int, tokens: list[list[int]], stopped: list[bool]) -> None:
            results.append(self._result(request.id, tokens, stopped))

        try:
            inputs = self.prompter.encode([self.prompter.render(request.messages)], [request.images])
        except ValueError as error:
            raise UserError(f"the model cannot be asked this: {error}") from error
        settings = _within_context(self.model, inputs["input_ids"].shape[1], settings)
        # A character of several tokens is shown when it is whole.
        self._on_step = lambda generated_ids: on_texts(
            tuple(self._read(tokens, False)[0].rstrip("\ufffd") for tokens in generated_ids)
        )
        try:
            self._sample(inputs, [request], settings, keep)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError("the conversation does not fit into memory", fix="ask for fewer answers at once") from None
        finally:
            self._on_step = None
        return results[0]

    def log_probs(self, prompts: Sequence[BranchedPrompt]) -> list[Any]:
        """Per prompt `(num_branches, num_options)` float64: log-probability of each option as the answer's beginning."""

        def shared(inputs: dict[str, Any], trees: list[PromptTree]) -> list[np.ndarray]:
            return shared_log_probs(self.model, inputs, trees)

        def unshared(trees: list[PromptTree], images: list[Any]) -> list[np.ndarray]:
            return unshared_log_probs(self.model, self._encode, trees, images)

        return self._answer([branched.images for branched in prompts], self._trees_of(prompts), shared, unshared)

    def loglikelihood(
        self,
        given: Sequence[GivenResponses],
        on_result: Callable[[str, list[list[float]]], None],
        *,
        temperature: float = 1.0,
    ) -> None:
        """The log-probability of every token of given responses, all responses to a question in one row behind it."""
        stops = placeholder_ids(self.model)
        known = [[_until(token_ids, stops) for token_ids in item.token_ids] for item in given]
        places = [i for i, responses in enumerate(known) if any(responses)]
        for item, responses in zip(given, known, strict=True):
            if not any(responses):
                on_result(item.id, [[] for _ in responses])

        def build_tree(i: int) -> PromptTree:
            segments = [Segment(tokens) for tokens in known[places[i]]]
            prompt = self.prompter.render(given[places[i]].messages)
            return PromptTree(prompt, segments, list(range(len(segments))), [])

        def shared(inputs: dict[str, Any], trees: list[PromptTree]) -> list[Any]:
            return shared_loglikelihood(self.model, inputs, trees, temperature=temperature)

        def unshared(trees: list[PromptTree], images: list[Any]) -> list[Any]:
            return unshared_loglikelihood(self.model, self._encode, trees, images, temperature=temperature)

        self._answer(
            [given[i].images for i in places],
            build_tree,
            shared,
            unshared,
            on_value=lambda i, value: on_result(given[places[i]].id, value),
        )

    def generate(self, prompts: Sequence[BranchedPrompt], *, max_new_tokens: int) -> list[list[str | None]]:
        """Per prompt and branch the greedy answer."""
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos": self.eos_token_ids}

        def shared(inputs: dict[str, Any], trees: list[PromptTree]) -> list[list[list[int]]]:
            return shared_generate(self.model, inputs, trees, **how)

        def unshared(trees: list[PromptTree], images: list[Any]) -> list[list[list[int]]]:
            return unshared_generate(self.model, self._encode, trees, images, **how)

        images = [branched.images for branched in prompts]
        answers = self._answer(images, self._trees_of(prompts), shared, unshared, new_tokens=max_new_tokens)
        count_tokens(written=sum(len(tokens) for branches in answers for tokens in branches))
        return [[self._text(tokens) for tokens in branches] for branches in answers]

    def _sample(
        self, inputs: dict[str, Any], batch: list[SampleRequest], settings: SamplingSettings, keep: Callable[..., None]
    ) -> Size:
        """Sample a batch; returns the size of its largest question."""
        if self.fallback_reason is None and self._sample_shared(
            to_device(inputs, self.device, self.dtype), batch, settings, keep
        ):
            count_tokens(read=int(inputs["attention_mask"].sum()))
            return inputs["input_ids"].shape[1], batch[0].num_samples * settings.max_new_tokens
        return max(self._sample_unshared(b, request, settings, keep) for b, request in enumerate(batch))

    def _sample_shared(
        self, inputs: dict[str, Any], batch: list[SampleRequest], settings: SamplingSettings, keep: Callable[..., None]
    ) -> bool:
        """False when the shared prefix turned out not to be usable; nothing was kept then."""
        proving = "samples" not in self._checked
        try:
            use_shared_prefix(self.model)
            decoded = sample_behind(
                self.model,
                inputs,
                self._chooser(inputs, batch, settings),
                num_samples=batch[0].num_samples,
                max_new_tokens=settings.max_new_tokens,
                eos=self.eos_token_ids,
                on_row=None if proving else keep,
                with_log_probs=proving,
            )
        except Exception as error:
            if is_out_of_memory(error) or not (proving or isinstance(error, PrefixUnsupported)):
                raise
            self._decide("samples", failed(error))
            return False
        if proving:
            self._decide("samples", check_decoding(self.model, inputs, decoded))
            if self.fallback_reason is not None:
                return False
            for b, (tokens, stopped) in enumerate(zip(decoded.tokens, decoded.stopped, strict=True)):
                keep(b, tokens, stopped)
        return True

    def _sample_unshared(
        self, b: int, request: SampleRequest, settings: SamplingSettings, keep: Callable[..., None]
    ) -> Size:
        inputs = self._encode([self.prompter.render(request.messages)], [request.images])
        tokens, stopped = unshared_sample(
            self.model,
            inputs,
            self._chooser(inputs, [request], settings),
            num_samples=request.num_samples,
            max_new_tokens=settings.max_new_tokens,
            eos=self.eos_token_ids,
        )
        keep(b, tokens, stopped)
        count_tokens(read=request.num_samples * inputs["input_ids"].shape[1])
        return request.num_samples * inputs["input_ids"].shape[1], request.num_samples * settings.max_new_tokens

    def _chooser(self, inputs: dict[str, Any], batch: Sequence[SampleRequest], settings: SamplingSettings) -> Sampler:
        numbers = uniforms([request.seed for request in batch], batch[0].num_samples, settings.max_new_tokens)
        choose = SeededSampler(settings, numbers.to(self.device), inputs["input_ids"])
        return choose if self._on_step is None else StreamingSampler(choose, self.eos_token_ids, self._on_step)

    def _trees_of(self, prompts: Sequence[BranchedPrompt]) -> Callable[[int], PromptTree]:
        return lambda i: self.prompter.build_tree(prompts[i])

    def _answer(
        self,
        images: Sequence[Sequence[Any]],
        build_tree: Callable[[int], PromptTree],
        shared: Callable[[dict[str, Any], list[PromptTree]], list[Any]],
        unshared: Callable[[list[PromptTree], list[Any]], list[Any]],
        *,
        new_tokens: int = 0,
        on_value: Callable[[int, Any], None] = lambda i, value: None,
    ) -> list[Any]:
        """What `shared`, or `unshared` where that is not exact, gives for every tree behind its images."""
        results: dict[int, Any] = {}

        def prepare(batch: list[int]) -> tuple[list[PromptTree], dict[str, Any]]:
            trees = [build_tree(i) for i in batch]
            return trees, self.prompter.encode([tree.prompt for tree in trees], [images[i] for i in batch])

        def run(batch: list[int], prepared: tuple[list[PromptTree], dict[str, Any]]) -> Size:
            trees, inputs = prepared[0], to_device(prepared[1], self.device, self.dtype)
            values = self._answer_shared(inputs, trees, shared) if self.fallback_reason is None else None
            if values is None:
                values = unshared(trees, [images[i] for i in batch])
            lengths = prepared[1]["attention_mask"].sum(dim=1).tolist()
            count_tokens(read=sum(map(self._num_read, trees, lengths)))
            for i, value in zip(batch, values, strict=True):
                results[i] = value
                on_value(i, value)
            widest = max(sum(len(segment.token_ids) for segment in tree.segments) for tree in trees)
            return inputs["input_ids"].shape[1] + widest, max(len(tree.leaf_segments) for tree in trees) * new_tokens

        self._in_batches(
            list(range(len(images))),
            prepare,
            run,
            check="branches",
            alike=lambda i: bool(images[i]),
            answered=results.keys(),
        )
        return [results[i] for i in range(len(images))]

    def _num_read(self, tree: PromptTree, num_prompt: int) -> int:
        """Tokens of one tree that go through the model: each once, or along every branch where prompts are not shared."""
        options = sum(len(option) for option in tree.options)
        if self.fallback_reason is None:
            return (
                num_prompt
                + sum(len(segment.token_ids) for segment in tree.segments)
                + len(tree.leaf_segments) * options
            )
        rows = len(tree.leaf_segments) * max(1, len(tree.options))
        paths = sum(len(path_tokens(tree, leaf)) for leaf in tree.leaf_segments) * max(1, len(tree.options))
        return rows * num_prompt + paths + len(tree.leaf_segments) * options

    def _answer_shared(
        self,
        inputs: dict[str, Any],
        trees: list[PromptTree],
        shared: Callable[[dict[str, Any], list[PromptTree]], list[Any]],
    ) -> list[Any] | None:
        """None when the shared prefix turned out not to be usable."""
        if "branches" not in self._checked:
            self._decide("branches", check_branches(self.model, inputs, trees))
        try:
            return shared(inputs, trees) if self.fallback_reason is None else None
        except PrefixUnsupported as error:
            self._decide("branches", failed(error))
        except Exception as error:
            # A single prompt with very many branches: one after the other they need less.
            if not is_out_of_memory(error) or len(trees) > 1:
                raise
            self.notes["large_prompts"] = (
                "some prompts did not fit into memory as one row, and were asked branch by branch"
            )
        return None

    def _in_batches(
        self,
        todo: list[int],
        prepare: Callable[[list[int]], Any],
        run: Callable[[list[int], Any], Size],
        *,
        check: str,
        alike: Callable[[int], Any],
        answered: Any,
    ) -> None:
        """Run the items in order, in batches of equal `alike`, smaller ones after running out of memory.

        `prepare` gives a batch's inputs, on the CPU and in another thread. `run` returns the size of its largest item.
        What is in `answered` is done, though its batch may fail.
        """
        size: Size | None = None

        def next_batch(waiting: list[int]) -> list[int]:
            count = self.batch_sizer.num_items(*(size or (1, 0)))
            if size is None or (self.fallback_reason is None and check not in self._checked):
                count = min(count, CHECK_ITEMS)
            return [i for i in waiting[:count] if alike(i) == alike(waiting[0])]

        with Prefetcher(prepare) as ahead:
            while todo:
                batch = next_batch(todo)
                taken = set(batch)
                rest = [i for i in todo if i not in taken]
                inputs = ahead.get(batch, next_batch(rest) if rest and size is not None else [])
                fits = True
                try:
                    ran = run(batch, inputs)
                    size = ran if size is None else (max(size[0], ran[0]), max(size[1], ran[1]))
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    fits = False
                if not fits:
                    # Not within `except`: as long as the error is held, so is the memory of the frames it came from.
                    self.batch_sizer.halve(len(batch))
                    self.notes["out_of_memory"] = (
                        f"{self.batch_sizer.num_halvings} times; the batch was halved each time"
                    )
                todo = [i for i in todo if i not in answered]

    def _encode(self, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
        return to_device(self.prompter.encode(texts, images), self.device, self.dtype)

    def _result(self, request_id: str, tokens: list[list[int]], stopped: list[bool]) -> SampleResult:
        read = [self._read(branch, ended) for branch, ended in zip(tokens, stopped, strict=True)]
        return SampleResult(
            id=request_id,
            texts=tuple(text for text, _ in read),
            num_tokens=tuple(len(branch) for branch in tokens),
            finish_reasons=tuple("stop" if ended else "length" for _, ended in read),
            token_ids=tuple(map(tuple, tokens)),
        )

    def _read(self, tokens: list[int], ended: bool) -> tuple[str, bool]:
        """The text of a sample, and whether it ended by itself.

        Families without an end token name `stop_strings` (one may also open the response), and clean the text of them.
        """
        text = self._text(tokens)
        processor = self.prompter.processor
        stops = getattr(processor, "stop_strings", ())
        if not stops:
            return text, ended
        ended = ended or any(text.strip().find(stop, 1) > 0 for stop in stops)
        return processor.clean_response(text), ended

    def _text(self, tokens: list[int]) -> str:
        return self.prompter.tokenizer.decode(tokens, skip_special_tokens=True)

    def _decide(self, what: str, found: Equivalence) -> None:
        if found.exact:
            self._checked.add(what)
            self.notes["shared_prefix"] = found.reason
            return
        if self.shared_prefix == "on":
            raise UserError(
                f"shared_prefix is on, but this model cannot use it: {found.reason}",
                fix="set shared_prefix to auto, or off",
            )
        self._fall_back(found.reason)

    def _fall_back(self, reason: str) -> None:
        self.fallback_reason = reason
        self.notes["shared_prefix"] = f"not used, every sample and branch is a full sequence: {reason}"
        stop_shared_prefix(self.model)


def _within_context(model: PreTrainedModel, num_prompt_tokens: int, settings: SamplingSettings) -> SamplingSettings:
    """Settings with no more new tokens than the model's context has left behind the prompt."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is None:
        return settings
    if num_prompt_tokens >= context:
        raise UserError(
            f"the conversation has {num_prompt_tokens} tokens, and the model reads at most {context}",
            fix="begin a new one, or ask with fewer or smaller images",
        )
    return replace(settings, max_new_tokens=min(settings.max_new_tokens, context - num_prompt_tokens))


def _until(token_ids: Sequence[int], stops: set[int]) -> list[int]:
    """
    >>> _until([5, 6, 9, 7], {9})
    [5, 6]
    """
    return list(itertools.takewhile(lambda token: token not in stops, token_ids))


def _eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """What ends a response: the generation config's end tokens, else the tokenizer's."""
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)

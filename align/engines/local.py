"""A model in this process as an engine: one vision pass and one prefill per question, however much is asked of it.

What is asked is computed by a path: behind prompts that are encoded once (`SharedPath`), or as full sequences
(`UnsharedPath`). The first real batch is computed both ways; where they disagree, or the architecture does not allow a
shared prefix, the unshared path is used from then on, and `notes` say why.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from transformers import PreTrainedModel

from align.engines.base import (
    FurtherSamples,
    GivenResponses,
    OnUnusable,
    SampleRequest,
    SampleResult,
    SamplingSettings,
)
from align.engines.batch_size import BRANCHES, FIRST_ITEMS, SAMPLES, BatchSizer
from align.engines.batching import Batch, BatchQueue
from align.engines.check import check_branches, check_samples
from align.engines.prompts import Processor, Prompter, PromptTree, to_device
from align.engines.sampling_run import OnStep, SampleQueue, SamplingRun
from align.engines.shared_path import SharedPath
from align.engines.unshared_path import UnsharedPath, path_tokens
from align.errors import UserError, is_out_of_memory
from align.models.record_faults import (
    CANNOT_ENCODE,
    CANNOT_READ,
    CANNOT_RENDER,
    TOO_LONG,
    UnusableRecord,
    record_faults,
)
from align.models.special_tokens import check_spelling, reserved_texts
from align.monitoring.cost import count_tokens
from align.prefix.attention import PrefixUnsupported, stop_shared_prefix
from align.prefix.equivalence import Equivalence, failed
from align.prefix.layout import Segment
from align.prefix.rows import placeholder_ids
from reward.judge_model import BranchedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Path(Protocol):
    """The four things that are asked of a model, for prompts that are encoded."""

    def sample(self, queue: SampleQueue, run: SamplingRun) -> None:
        """Answer the questions of a queue."""

    def log_probs(self, batch: Batch[PromptTree]) -> list[np.ndarray]:
        """Log-probabilities of the options of branched prompts."""

    def loglikelihood(self, batch: Batch[PromptTree], *, temperature: float = 1.0) -> list[list[list[float]]]:
        """Per-token log-probabilities (nats) of given responses."""

    def generate(self, batch: Batch[PromptTree], *, max_new_tokens: int) -> list[list[list[int]]]:
        """Greedy continuations of branched prompts, as token ids."""


PROMPT = "the critic's prompt"


class LocalEngine:
    """`Engine` with a loaded model.

    `open_image` opens an image handle. `shared_prefix`: `auto` uses it where the first batch shows that it is exact,
    `on` raises UserError where it is not, `off` never does. `batch_size` is in questions; None finds it by itself.
    `fallback_reason` is None as long as the shared prefix is used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Processor,
        *,
        open_image: Callable[[Any], Any] = lambda image: image,
        shared_prefix: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.prompter = Prompter(processor, open_image)
        self.shared_prefix = shared_prefix
        self._reserved = reserved_texts(processor)
        self.batch_sizer = BatchSizer(model, batch_size)
        self.notes: dict[str, str] = {}
        self.fallback_reason: str | None = None
        self.path: Path | None = None
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
        *,
        further: FurtherSamples | None = None,
        on_unusable: OnUnusable | None = None,
    ) -> None:
        """Answer all requests; `on_result` is called once per question, as soon as its last sample has ended.

        Further samples are drawn behind the prompt while it is still encoded.
        """

        context = _context_of(self.model)

        def encode(batch: list[SampleRequest]) -> dict[str, Any]:
            who = f"question {batch[0].id}"
            # Benchmarks are asked as they are: nobody there can leave a question out.
            for request in batch if on_unusable is not None else ():
                check_spelling(request.messages, self._reserved, who)
            with record_faults(who, CANNOT_RENDER):
                texts = [self.prompter.render(request.messages) for request in batch]
            inputs = self._encode_record(who, texts, [request.images for request in batch])
            longest = inputs["input_ids"].shape[1]
            if context is not None and longest >= context:
                text = f"{TOO_LONG}: it has {longest} tokens, and the model reads at most {context}"
                raise UnusableRecord(TOO_LONG, text, where=who, fix="shorten it, or show fewer or smaller images")
            return inputs

        def unusable(request: SampleRequest, fault: UnusableRecord) -> None:
            if on_unusable is None:
                raise fault
            on_unusable(request.id, fault)

        self._sample(self._sample_queue(requests, encode, unusable), settings, on_result, further=further)

    def stream(
        self, request: SampleRequest, settings: SamplingSettings, on_texts: Callable[[tuple[str, ...]], None]
    ) -> SampleResult:
        """Answer one request as `sample` does; after every token `on_texts` gets what each sample says so far.

        What it raises ends the answer; `Stopped` (align.engines.streaming) is meant for that. An answer ends where the
        model's context does.

        Raises:
            UserError: the processor refuses the conversation, or it is longer than the model's context or the memory.
        """
        results: list[SampleResult] = []
        try:
            inputs = self.prompter.encode([self.prompter.render(request.messages)], [request.images])
        except ValueError as error:
            raise UserError(f"the model cannot be asked this: {error}") from error
        settings = _within_context(self.model, inputs["input_ids"].shape[1], settings)

        def on_step(generated: list[list[int]]) -> None:
            # A character of several tokens is shown when it is whole.
            on_texts(tuple(self._read(tokens, False)[0].rstrip("\ufffd") for tokens in generated))

        self._sample(self._sample_queue([request], lambda _: inputs), settings, results.append, on_step=on_step)
        return results[0]

    def log_probs(self, prompts: Sequence[BranchedPrompt]) -> list[Any]:
        """Per prompt `(num_branches, num_options)` float64: log-probability of each option
        as the answer's beginning."""
        return self._answer(self._trees_of(prompts), lambda path, batch: path.log_probs(batch))

    def loglikelihood(
        self,
        given: Sequence[GivenResponses],
        on_result: Callable[[str, list[list[float]]], None],
        *,
        temperature: float = 1.0,
    ) -> None:
        """The log-probability of every token of given responses, all responses to a question behind it."""
        stops = placeholder_ids(self.model)
        known = [[_until(token_ids, stops) for token_ids in item.token_ids] for item in given]
        places = [i for i, responses in enumerate(known) if any(responses)]
        for item, responses in zip(given, known, strict=True):
            if not any(responses):
                on_result(item.id, [[] for _ in responses])

        def tree_of(i: int) -> PromptTree:
            segments = [Segment(tokens) for tokens in known[i]]
            prompt = self.prompter.render(given[i].messages)
            return PromptTree(prompt, segments, list(range(len(segments))), [])

        self._answer(
            [LazyTree(given[i].images, len(str(given[i].messages)), functools.partial(tree_of, i)) for i in places],
            lambda path, batch: path.loglikelihood(batch, temperature=temperature),
            on_value=lambda i, value: on_result(given[places[i]].id, value),
        )

    def generate(self, prompts: Sequence[BranchedPrompt], *, max_new_tokens: int) -> list[list[str | None]]:
        """Per prompt and branch the greedy answer."""
        answers = self._answer(
            self._trees_of(prompts),
            lambda path, batch: path.generate(batch, max_new_tokens=max_new_tokens),
            new_tokens=max_new_tokens,
        )
        count_tokens(written=sum(len(tokens) for branches in answers for tokens in branches))
        return [[self._text(tokens) for tokens in branches] for branches in answers]

    def _encode_record(self, who: str, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """`Prompter.encode`; what a decoder or the processor raises becomes an UnusableRecord about `who`."""
        with record_faults(who, CANNOT_READ):
            opened = [[self.prompter.open_image(image) for image in row] for row in images]
        with record_faults(who, CANNOT_ENCODE):
            return self.prompter.encode_opened(texts, opened)

    def _sample_queue(
        self,
        requests: Sequence[SampleRequest],
        encode: Callable[[list[SampleRequest]], dict[str, Any]],
        on_unusable: Callable[[SampleRequest, UnusableRecord], None] | None = None,
    ) -> SampleQueue:
        return BatchQueue(
            requests,
            encode,
            self._to_device,
            sizer=self.batch_sizer,
            kind=SAMPLES,
            alike=lambda request: bool(request.images),
            length=lambda request: len(str(request.messages)),
            on_unusable=on_unusable,
        )

    def _sample(
        self,
        queue: SampleQueue,
        settings: SamplingSettings,
        on_result: Callable[[SampleResult], None],
        *,
        further: FurtherSamples | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        def result_of(place: int, tokens: list[list[int]], stopped: list[bool]) -> SampleResult:
            return self._result(queue.items[place].id, tokens, stopped)

        def on_tokens(place: int, tokens: list[list[int]], stopped: list[bool], num_prompt_tokens: int) -> None:
            repeats = 1 if self.fallback_reason is None else len(tokens)
            count_tokens(read=repeats * num_prompt_tokens, written=sum(map(len, tokens)))
            on_result(result_of(place, tokens, stopped))

        def new_run() -> SamplingRun:
            return SamplingRun(
                queue,
                settings,
                on_tokens,
                device=self.device,
                eos=self.eos_token_ids,
                more=None if further is None else lambda *samples: further.wanted(result_of(*samples)),
                further_temperature=None if further is None else further.temperature,
                on_step=on_step,
            )

        def work() -> None:
            if self.path is None:
                self._check_samples(queue, new_run())
            if self.path is not None:
                self.path.sample(queue, new_run())

        self._until_done(queue, work)

    def _check_samples(self, queue: SampleQueue, run: SamplingRun) -> None:
        """Compute the first questions both ways; they are done where that decides for the shared path."""
        batch = queue.take(FIRST_ITEMS)
        if batch is None:
            return
        found, decoded = check_samples(
            self.model, batch.inputs, lambda: SharedPath(self.model, self.eos_token_ids).sample_batch(batch, run)
        )
        self._decide(found)
        if found.exact:
            for question in decoded:
                run.finish(question.ticket, question.tokens, question.stopped)
        else:
            queue.put_back()

    def _trees_of(self, prompts: Sequence[BranchedPrompt]) -> list[LazyTree]:
        return [
            LazyTree(
                prompt.images,
                len(prompt.head) + sum(len(piece) for branch in prompt.branches for piece in branch),
                functools.partial(self.prompter.build_tree, prompt),
            )
            for prompt in prompts
        ]

    def _answer(
        self,
        trees: Sequence[LazyTree],
        verb: Callable[[Path, Batch[PromptTree]], list[Any]],
        *,
        new_tokens: int = 0,
        on_value: Callable[[int, Any], None] = lambda place, value: None,
    ) -> list[Any]:
        """What the path's verb gives for every tree behind its images, in order."""
        results: dict[int, Any] = {}

        def encode(batch: list[LazyTree]) -> dict[str, Any]:
            with record_faults(PROMPT, CANNOT_RENDER):
                prompts = [item.tree.prompt for item in batch]
            return self._encode_record(PROMPT, prompts, [item.images for item in batch])

        queue = BatchQueue(
            trees,
            encode,
            self._to_device,
            sizer=self.batch_sizer,
            kind=BRANCHES,
            alike=lambda item: bool(item.images),
            length=lambda item: item.length,
        )

        def work() -> None:
            while queue:
                taken = queue.take(1 if isinstance(self.path, UnsharedPath) else None)
                if taken is None:
                    return None
                batch = Batch(taken.places, [item.tree for item in taken.items], taken.inputs, taken.num_prompt_tokens)
                widest = max(sum(len(segment.token_ids) for segment in tree.segments) for tree in batch.items)
                num_branches = max(len(tree.leaf_segments) for tree in batch.items)
                width = batch.inputs["input_ids"].shape[1]
                self.batch_sizer.saw(BRANCHES, width + widest, num_branches * new_tokens)
                if self.path is None:
                    self._decide(check_branches(self.model, self.eos_token_ids, batch))
                    if isinstance(self.path, UnsharedPath):
                        return queue.put_back()
                for place, value in zip(batch.places, self._values(batch, verb), strict=True):
                    queue.done(place)
                    results[place] = value
                    on_value(place, value)
            return None

        self._until_done(queue, work)
        return [results[i] for i in range(len(trees))]

    def _values(self, batch: Batch[PromptTree], verb: Callable[[Path, Batch[PromptTree]], list[Any]]) -> list[Any]:
        path = self.path
        assert path is not None
        try:
            values = verb(path, batch)
        except Exception as error:
            # A single prompt with very many branches: one after the other they need less.
            if not is_out_of_memory(error) or len(batch) > 1 or isinstance(path, UnsharedPath):
                raise
            path = UnsharedPath(self.model, self.eos_token_ids)
        if path is not self.path:
            # Not within `except`: as long as the error is held, so is the memory of the frames it came from.
            self.notes["large_prompts"] = "some prompts did not fit into memory as one, and went branch by branch"
            values = verb(path, batch)
        lengths = batch.num_prompt_tokens
        count_tokens(read=sum(num_read(path, *each) for each in zip(batch.items, lengths, strict=True)))
        return values

    def _until_done(self, queue: BatchQueue[Any], work: Callable[[], None]) -> None:
        """Let `work` empty the queue, again with what is not done when memory or the shared prefix has failed."""
        with queue:
            while queue:
                fits = True
                try:
                    work()
                except PrefixUnsupported as error:
                    self._decide(failed(error))
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    fits = False
                if not fits:
                    # Not within `except`, as above.
                    self.batch_sizer.halve(queue.num_begun)
                    self.notes["out_of_memory"] = (
                        f"{self.batch_sizer.num_halvings} times; the batch was halved each time"
                    )
                queue.put_back()

    def _encode(self, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
        return self._to_device(self.prompter.encode(texts, images))

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return to_device(inputs, self.device, self.dtype)

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

    def _decide(self, found: Equivalence) -> None:
        """Hold the path that a check of equivalence allows."""
        if found.exact:
            self.path = SharedPath(self.model, self.eos_token_ids)
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
        self.path = UnsharedPath(self.model, self.eos_token_ids)


@dataclass
class LazyTree:
    """A prompt's images, any measure of its length, and its tree, built where it is first wanted: beside the model."""

    images: Sequence[Any]
    length: int
    build: Callable[[], PromptTree]

    @functools.cached_property
    def tree(self) -> PromptTree:
        """The tree of the prompt, built when it is asked for."""
        return self.build()


def num_read(path: Path, tree: PromptTree, num_prompt: int) -> int:
    """Tokens of one tree that go through the model: each once, or along every branch where prompts are not shared."""
    options = sum(len(option) for option in tree.options)
    if not isinstance(path, UnsharedPath):
        segments = sum(len(segment.token_ids) for segment in tree.segments)
        return num_prompt + segments + len(tree.leaf_segments) * options
    rows = len(tree.leaf_segments) * max(1, len(tree.options))
    paths = sum(len(path_tokens(tree, leaf)) for leaf in tree.leaf_segments) * max(1, len(tree.options))
    return rows * num_prompt + paths + len(tree.leaf_segments) * options


def _within_context(model: PreTrainedModel, num_prompt_tokens: int, settings: SamplingSettings) -> SamplingSettings:
    """Settings with no more new tokens than the model's context has left behind the prompt."""
    context = _context_of(model)
    if context is None:
        return settings
    if num_prompt_tokens >= context:
        raise UserError(
            f"the conversation has {num_prompt_tokens} tokens, and the model reads at most {context}",
            fix="begin a new one, or ask with fewer or smaller images",
        )
    return replace(settings, max_new_tokens=min(settings.max_new_tokens, context - num_prompt_tokens))


def _context_of(model: PreTrainedModel) -> int | None:
    """How many tokens the model reads at most; None where its configuration does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _until(token_ids: Sequence[int], stops: set[int]) -> list[int]:
    """
    >>> _until([5, 6, 9, 7], {9})
    [5, 6]
    """
    return list(itertools.takewhile(lambda token: token not in stops, token_ids))


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a response: the generation config's end tokens, else the tokenizer's."""
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)

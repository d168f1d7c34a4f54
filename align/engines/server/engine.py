"""Servers with an OpenAI-compatible interface as an engine: vLLM, SGLang, `transformers serve` or a paid service.

Nothing is loaded in this process. A sample depends on its question's seed and its index as far as the server honours
seeds, and not on how many requests are in flight or which endpoint answers. Greedy answers and log-probabilities are
the server's own; they differ from those of a model in this process by its arithmetic and its image processing.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from align.config import ServerSettings
from align.engines.base import (
    FurtherSamples,
    GivenResponses,
    OnUnusable,
    SampleRequest,
    SampleResult,
    SamplingSettings,
)
from align.engines.server.chat import (
    Choice,
    bare_messages,
    branch_messages,
    chat_messages,
    data_uri,
    greedy_body,
    sample_seed,
    sampling_body,
)
from align.engines.server.comparison import PromptComparison
from align.engines.server.endpoint import Endpoint, RefusedError
from align.engines.server.events import OnTexts
from align.engines.server.fleet import Answer, Fleet, UnansweredError
from align.engines.server.options import Step, from_text, num_tokens_to_see, option_log_probs, read_steps
from align.engines.server.own_processor import OwnProcessor
from align.engines.server.probe import CONTINUE, continued
from align.engines.server.prompt_log_probs import Weighed, given_body, weigh
from align.errors import UserError
from align.log import log
from align.models.record_faults import CANNOT_READ, UnusableRecord, record_faults
from reward.judge_model import BranchedPrompt

ItemT = TypeVar("ItemT")

# When so many have failed one after the other, the rest is not tried; sooner where none was ever answered.
HOPELESS = 40
HOPELESS_FROM_THE_START = 8
# What questions are counted under that a server refuses.
REFUSED = "a server refused it"
# A written verdict is read where log-probabilities are not to be had; it stands at the beginning of the answer.
VERDICT_TOKENS = 64
SHOWN = 5


class ServerEngine:
    """`Engine` behind HTTP. `open_image` opens an image handle."""

    def __init__(
        self, endpoints: Sequence[Endpoint], *, open_image: Callable[[Any], Any], settings: ServerSettings
    ) -> None:
        self.fleet = Fleet(endpoints, settings)
        self.settings = settings
        self.open_image = open_image
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.num_missed_in_a_row = 0
        self.notes: dict[str, str] = {}
        self.about: dict[str, str] = {}
        self.comparison: PromptComparison | None = None
        self.own: OwnProcessor | None = None
        """The checkpoint's own processor, where it lies here."""

    def check(self) -> None:
        """Raises UserError where the servers do not answer or have another model."""
        self.fleet.check()

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        on_result: Callable[[SampleResult], None],
        *,
        further: FurtherSamples | None = None,
        on_unusable: OnUnusable | None = None,
    ) -> None:
        """Answer all requests; `on_result` is called as soon as a question is finished.

        A question that a server refuses (400, 413, 422) goes to `on_unusable`, as one whose image cannot be read does.

        Raises:
            UserError: a question could not be answered (the others were), or was refused and there is no `on_unusable`;
                nothing but failures for long; no server is left, or a key is wrong.
        """
        before = set(self.failures)

        async def one(request: SampleRequest) -> None:
            try:
                with record_faults(f"question {request.id}", CANNOT_READ):
                    uris = await self._uris(request.images)
            except UnusableRecord as fault:
                if on_unusable is None:
                    raise
                on_unusable(request.id, fault)
                return
            messages = chat_messages(request.messages, uris)
            try:
                greedy = []
                if settings.greedy_first:
                    greedy = await self._draw(messages, request, replace(settings, temperature=0.0), range(1))
                choices = await self._draw(messages, request, settings, range(request.num_samples))
                while further and (count := further.wanted(_result(request.id, greedy + choices))):
                    warmer = (
                        settings if further.temperature is None else replace(settings, temperature=further.temperature)
                    )
                    choices += await self._draw(messages, request, warmer, range(len(choices), len(choices) + count))
                choices = greedy + choices
            except RefusedError as error:
                self._missed(request.id, str(error), ends_stage=on_unusable is None)
                if on_unusable is not None:
                    on_unusable(request.id, UnusableRecord(REFUSED, str(error), where=f"question {request.id}"))
                return
            except UnansweredError as error:
                self._missed(request.id, str(error))
                return
            self._answered()
            on_result(_result(request.id, choices))

        self._run(requests, one)
        missed = {id_: reason for id_, reason in self.failures.items() if id_ not in before}
        if missed:
            raise UserError(
                f"{len(missed)} of {len(requests)} questions got no answer from the servers:\n{_listed(missed)}",
                fix="the others are kept: fix the server or these questions and run the same command again",
            )

    def stream(self, request: SampleRequest, settings: SamplingSettings, on_texts: OnTexts) -> SampleResult:
        """Answer one request as `sample` does; `on_texts` gets what each sample says so far, where the server streams.

        What it raises ends the answer; `Stopped` (align.engines.streaming) is meant for that.

        Raises:
            UserError: an image cannot be read, the server refuses the conversation, or no server answers.
        """

        async def work() -> list[Choice]:
            with record_faults("the conversation", CANNOT_READ):
                uris = await self._uris(request.images)
            messages = chat_messages(request.messages, uris)
            return await self._draw(messages, request, settings, range(request.num_samples), on_texts)

        try:
            return _result(request.id, self.fleet.run(work))
        except (RefusedError, UnansweredError) as error:
            raise UserError(f"the server does not answer this: {error}") from None

    def loglikelihood(
        self,
        given: Sequence[GivenResponses],
        on_result: Callable[[str, list[list[float]]], None],
        *,
        temperature: float = 1.0,
    ) -> None:
        """The log-probability of every token of given responses, from a server's prompt log-probabilities.

        A response that the server cuts into other tokens, or refuses, gets nan and is counted in `notes`.

        Raises:
            UserError: the server has no prompt log-probabilities, the temperature is above 1, or the checkpoint, whose
                tokenizer says what was drawn, does not lie here.
        """
        if self.own is None or temperature > 1:
            why = "the checkpoint does not lie here" if self.own is None else f"temperature {temperature:g} is above 1"
            raise UserError(f"servers cannot weigh given responses: {why}", fix="set evaluate.kl to false")
        own = self.own
        num_alternatives = 0 if temperature == 1 else self.settings.top_logprobs
        off: list[float] = []

        async def one(item: GivenResponses) -> None:
            uris = await self._uris(item.images)
            messages = chat_messages(item.messages, uris)
            prompt = await asyncio.to_thread(own.prompt_tokens, item.messages, item.images)

            async def row(token_ids: Sequence[int]) -> list[float]:
                found = None
                text = await asyncio.to_thread(own.text, token_ids) if prompt is not None and token_ids else None
                if text is not None:
                    body = given_body(messages, text, num_alternatives)
                    found = await self._weigh(item.id, body, prompt or [], token_ids, temperature)
                if found is None:
                    self.counts["responses not weighed"] += 1
                    return [math.nan] * max(len(token_ids), 1)
                off.append(found.uncertainty)
                return found.log_probs

            on_result(item.id, list(await asyncio.gather(*map(row, item.token_ids))))

        self._run(given, one)
        if off and num_alternatives:
            self.notes["log-probabilities"] = (
                f"from the {num_alternatives} likeliest tokens of each place: a response's may be off by up to "
                f"{max(off):.2g} nats, by {math.fsum(off) / len(off):.2g} on average"
            )

    async def _weigh(
        self,
        what: str,
        body: dict[str, Any],
        prompt: Sequence[int],
        token_ids: Sequence[int],
        temperature: float,
    ) -> Weighed | None:
        """None where the server refuses the request, or reads other tokens than were drawn."""
        try:
            answer = await self._post(lambda _: body, None)
        except RefusedError as error:
            self._missed(what, str(error))
            return None
        self._answered()
        try:
            return weigh(answer.data, prompt, token_ids, temperature)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the server gives no prompt log-probabilities ({type(error).__name__}: {error})",
                where=answer.endpoint.url,
                fix="serve it with vLLM, or set evaluate.kl to false",
            ) from None

    def log_probs(self, prompts: Sequence[BranchedPrompt]) -> list[Any]:
        """Per prompt `(num_branches, num_options)` float64; a row of nan where a branch failed.

        How far a value is the log-probability of a whole option depends on the server: `server_options`, `notes`.
        """
        tables = [np.full((len(branched.branches), len(branched.options)), np.nan) for branched in prompts]

        async def fill(index: int, branch: int, uris: list[str], prefer: Endpoint | None) -> Endpoint | None:
            tables[index][branch], endpoint = await self._log_probs(prompts[index], branch, uris, prefer)
            return endpoint

        self._answer(prompts, fill)
        return list(tables)

    def generate(self, prompts: Sequence[BranchedPrompt], *, max_new_tokens: int) -> list[list[str | None]]:
        """Per prompt and branch the greedy answer, None where it failed."""
        texts: list[list[str | None]] = [[None] * len(branched.branches) for branched in prompts]

        async def fill(index: int, branch: int, uris: list[str], prefer: Endpoint | None) -> Endpoint | None:
            messages = branch_messages(prompts[index], branch, uris)
            answer = await self._post(lambda e: greedy_body(messages, e.abilities, max_new_tokens), prefer)
            await self._compare(bare_messages(prompts[index], branch), prompts[index].images, answer)
            (choice,) = await asyncio.to_thread(self._own_texts, answer.choices[:1])
            texts[index][branch] = choice.text
            return answer.endpoint

        self._answer(prompts, fill)
        return texts

    def _run(self, items: Iterable[ItemT], work: Callable[[ItemT], Awaitable[None]]) -> None:
        """Work on all items; `notes` then say which servers answered how often and what had to be done without."""
        try:
            self.fleet.run(lambda: self.fleet.each(items, work))
        finally:
            servers = [
                f"{endpoint} ({endpoint.model}): {endpoint.num_answers} answers, {endpoint.num_failures} failed tries; "
                f"{endpoint.abilities.in_words()}"
                for endpoint in self.fleet.endpoints
            ]
            counts = {what: str(count) for what, count in sorted(self.counts.items()) if count}
            compared = {} if self.comparison is None else {"prompts": self.comparison.in_words()}
            self.notes = self.about | compared | {"servers": "; ".join(servers)} | counts

    async def _draw(
        self,
        messages: list[dict[str, Any]],
        request: SampleRequest,
        settings: SamplingSettings,
        indices: range,
        on_texts: OnTexts | None = None,
    ) -> list[Choice]:
        """These samples of a question: with `n` at once, else, and for those that are missing, one by one."""
        wanted = indices[:1] if settings.temperature == 0 else indices
        grown = dict.fromkeys(wanted, "")

        async def draw(first: int, num: int, prefer: Endpoint | None = None) -> tuple[list[Choice], Endpoint]:
            def body(endpoint: Endpoint) -> dict[str, Any]:
                can = endpoint.abilities
                if on_texts is not None:
                    # Tokens come with the events, and nobody counts them.
                    can = replace(can, token_ids=False, token_log_probs=False)
                seed = sample_seed(request.seed, first)
                return sampling_body(messages, settings, can, seed=seed, num=num if can.several else 1)

            def grow(texts: tuple[str, ...]) -> None:
                assert on_texts is not None
                grown.update(zip(range(first, first + num), texts, strict=False))
                on_texts(tuple(grown.values()) * (len(indices) // len(wanted)))

            answer = await self._post(body, prefer, None if on_texts is None else grow)
            await self._compare(request.messages, request.images, answer)
            choices = answer.choices
            if answer.endpoint.abilities.several and len(choices) < num:
                answer.endpoint.abilities.several = False
                log.info("asked one by one: %s gave %d choices instead of %d", answer.endpoint, len(choices), num)
            return await asyncio.to_thread(self._own_texts, choices[:num]), answer.endpoint

        choices, endpoint = await draw(wanted[0], len(wanted))
        rest = await asyncio.gather(*(draw(index, 1, endpoint) for index in wanted[len(choices) :]))
        choices = [*choices, *(choice for (choice,), _ in rest)]
        if settings.temperature == 0:
            choices = choices * len(indices)
        self.counts["token counts guessed from lengths"] += sum(not choice.exact for choice in choices)
        return choices

    def _answer(
        self, prompts: Sequence[BranchedPrompt], fill: Callable[[int, int, list[str], Endpoint | None], Any]
    ) -> None:
        """Fill every branch: a prompt's first one alone, so that the server has its prompt
        in the cache for the others."""

        async def guarded(index: int, branch: int, uris: list[str], prefer: Endpoint | None) -> Endpoint | None:
            try:
                endpoint = await fill(index, branch, uris, prefer)
            except (RefusedError, UnansweredError) as error:
                self.counts["judgements without an answer"] += 1
                self._missed(f"the judgement on ...{prompts[index].head.strip()[-60:]!r}", str(error))
                return None
            self._answered()
            return endpoint

        async def one(index: int) -> None:
            with record_faults("the critic's prompt", CANNOT_READ):
                uris = await self._uris(prompts[index].images)
            first = await guarded(index, 0, uris, None)
            others = range(1, len(prompts[index].branches))
            await asyncio.gather(*(guarded(index, branch, uris, first) for branch in others))

        self._run(range(len(prompts)), one)

    async def _log_probs(
        self, branched: BranchedPrompt, branch: int, uris: list[str], prefer: Endpoint | None
    ) -> tuple[np.ndarray, Endpoint]:
        messages = branch_messages(branched, branch, uris)
        to_see = num_tokens_to_see(branched.options)
        first = await self._post(lambda e: _options_body(messages, e, to_see), prefer)
        await self._compare(bare_messages(branched, branch), branched.images, first)
        written = read_steps(first.data["choices"][0])
        if written is None:
            self.counts["verdicts read from text, without log-probabilities"] += 1
            return from_text(branched.options, first.choices[0].text), first.endpoint

        async def after(begun: bytes) -> list[Step] | None:
            if not begun:
                return written
            answer = await self.fleet.post(lambda e: _continued_body(messages, e, begun, to_see), prefer=first.endpoint)
            return None if answer is None else read_steps(answer.data["choices"][0])

        values, whole = await option_log_probs(branched.options, after)
        self.counts["options judged by their first tokens alone"] += not whole
        return values, first.endpoint

    def _own_texts(self, choices: Sequence[Choice]) -> list[Choice]:
        """Choices with the texts that the checkpoint's own tokenizer makes of their tokens, where both are known."""
        if self.own is None:
            return list(choices)
        texts = [self.own.text(choice.token_ids) if choice.token_ids else None for choice in choices]
        return [
            choice if text is None else replace(choice, text=text) for choice, text in zip(choices, texts, strict=True)
        ]

    async def _compare(self, messages: list[dict[str, Any]], images: Sequence[Any], answer: Answer) -> None:
        if self.comparison is not None:
            compare = self.comparison.compare
            await asyncio.to_thread(compare, messages, images, answer.data, answer.endpoint.url)

    async def _post(
        self,
        build: Callable[[Endpoint], dict[str, Any]],
        prefer: Endpoint | None,
        on_texts: OnTexts | None = None,
    ) -> Answer:
        answer = await self.fleet.post(build, prefer=prefer, on_texts=on_texts)
        assert answer is not None, "every endpoint takes this body"
        return answer

    async def _uris(self, images: Sequence[Any]) -> list[str]:
        made = [await asyncio.to_thread(self._uri, image) for image in images]
        self.counts["images scaled down"] += sum(smaller for _, smaller in made)
        return [uri for uri, _ in made]

    def _uri(self, image: Any) -> tuple[str, bool]:
        settings = self.settings
        return data_uri(
            self.open_image(image), max_pixels=settings.max_image_pixels, image_format=settings.image_format
        )

    def _answered(self) -> None:
        self.counts["answered by servers"] += 1
        self.num_missed_in_a_row = 0

    def _missed(self, what: str, reason: str, *, ends_stage: bool = True) -> None:
        """Remember a failure; raise UserError where nothing but failures is seen.

        `ends_stage`: the question must be answered before the stage is complete; else somebody counts it.
        """
        remembered = self.failures if ends_stage else self.refused
        if reason not in remembered.values():
            log.warning("no answer to %s: %s", what, reason)
        remembered[what] = reason
        self.num_missed_in_a_row += 1
        if self.num_missed_in_a_row >= (HOPELESS if self.counts["answered by servers"] else HOPELESS_FROM_THE_START):
            raise UserError(
                f"the servers answered none of the last {self.num_missed_in_a_row} questions:\n{_listed(remembered)}",
                fix="fix what they say, then run the same command again: what was answered is kept",
            )


def _options_body(messages: list[dict[str, Any]], endpoint: Endpoint, max_tokens: int) -> dict[str, Any]:
    can = endpoint.abilities
    if not can.top_log_probs:
        return greedy_body(messages, can, VERDICT_TOKENS)
    return greedy_body(messages, can, max_tokens) | {"logprobs": True, "top_logprobs": can.top_log_probs}


def _continued_body(
    messages: list[dict[str, Any]], endpoint: Endpoint, begun: bytes, max_tokens: int
) -> dict[str, Any] | None:
    """None where the endpoint does not continue answers, or this one ends within a character."""
    try:
        text = begun.decode()
    except UnicodeDecodeError:
        return None
    if not endpoint.abilities.continues:
        return None
    return _options_body(continued(messages, text), endpoint, max_tokens) | CONTINUE


def _result(request_id: str, choices: Sequence[Choice]) -> SampleResult:
    return SampleResult(
        id=request_id,
        texts=tuple(choice.text for choice in choices),
        num_tokens=tuple(choice.num_tokens for choice in choices),
        finish_reasons=tuple(choice.finish_reason for choice in choices),
        token_ids=tuple(choice.token_ids for choice in choices) if all(choice.token_ids for choice in choices) else (),
    )


def _listed(failures: dict[str, str]) -> str:
    lines = [f"  - {what}: {reason}" for what, reason in list(failures.items())[-SHOWN:]]
    return "\n".join([*lines, *([f"  ... and {len(failures) - SHOWN} more"] if len(failures) > SHOWN else [])])

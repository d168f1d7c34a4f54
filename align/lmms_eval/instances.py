"""lmms-eval's Instances in, requests with unique ids out, and the record of what was answered.

Nothing of lmms-eval is imported here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from align.engines.base import SamplingSettings
from align.errors import UserError
from align.records import Record
from align.run.hashes import text_hash

# What lmms-eval's own models write at most where a task does not say.
MAX_NEW_TOKENS = 1024
# lmms-eval fills it in where a task names no end; it is the end of a few-shot example, and would cut any answer that
# has paragraphs. Its models for chat leave it out as well.
NOT_AN_END = "\n\n"
FOLLOWED = {
    "until", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty",
    "max_new_tokens", "max_gen_toks",
}  # fmt: skip


class Answered(Record):
    """One request with what the checkpoint said, or why it could not be asked (`skipped`)."""

    id: str
    task: str
    doc_id: int
    prompt: str
    continuation: str | None = None
    text: str = ""
    num_tokens: int = 0
    finish_reason: Literal["stop", "length"] = "stop"
    log_prob: float | None = None
    is_greedy: bool = False
    note: str | None = None
    skipped: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Request:
    """An Instance of lmms-eval, read. `look` makes of a document its visuals, or all of its messages."""

    id: str
    task: str
    split: str
    doc_id: int
    prompt: str
    look: Callable[[Any], Any]
    gives_messages: bool = False
    settings: SamplingSettings | None = None
    ends: tuple[str, ...] = ()
    continuation: str | None = None
    note: str | None = None

    def answered(self, **said: Any) -> Answered:
        """The request with its answer, as a record."""
        return Answered(
            id=self.id,
            task=self.task,
            doc_id=self.doc_id,
            prompt=self.prompt,
            continuation=self.continuation,
            note=self.note,
            **said,
        )


def generation_request(instance: Any) -> Request:
    """An Instance whose request type is generate_until; its id is not yet unique among repeats."""
    first, second, third, doc_id, task, split = instance.args
    messages = callable(second)
    look, wanted = (second, third) if messages else (third, second)
    settings, ends, note = read_generation(dict(wanted or {}))
    return Request(
        id=f"{task}/{doc_id}/{text_hash(split, first, json.dumps(wanted, sort_keys=True, default=str))[:12]}",
        task=task,
        split=split,
        doc_id=int(doc_id),
        prompt=first,
        look=look,
        gives_messages=messages,
        settings=settings,
        ends=ends,
        note=note,
    )


def scoring_request(instance: Any, document: Callable[[str, str, int], Any]) -> Request:
    """An Instance whose request type is loglikelihood."""
    if len(instance.args) != 6:
        raise UserError(
            "the metric acc_mutual_info asks for probabilities without a question, which is not supported",
            where=str(instance.task_name),
            fix="leave that metric out of the task",
        )
    prompt, wanted, look, doc_id, task, split = instance.args
    continuation = wanted(document(task, split, doc_id)) if callable(wanted) else wanted
    if not continuation:
        raise UserError(f"a continuation of document {doc_id} is empty", where=str(task))
    return Request(
        id=f"{task}/{doc_id}/{text_hash(split, prompt, continuation)[:12]}",
        task=task,
        split=split,
        doc_id=int(doc_id),
        prompt=prompt,
        look=look,
        continuation=continuation,
    )


def read_generation(wanted: dict[str, Any]) -> tuple[SamplingSettings, tuple[str, ...], str | None]:
    """A task's generation_kwargs as settings, texts that end the answer, and what is not followed.

    >>> read_generation({"max_new_tokens": 16, "temperature": 0, "top_p": 0, "num_beams": 1, "until": ["\\n\\n", "Q:"]})
    (SamplingSettings(temperature=0.0, max_new_tokens=16, ...), ('Q:',), None)
    >>> read_generation({"temperature": 0.2, "num_beams": 5, "image_aspect_ratio": "pad"})[2]
    'not followed: image_aspect_ratio, num_beams'
    """
    samples = wanted.get("do_sample")
    temperature = float(wanted.get("temperature") or (1.0 if samples else 0.0))
    settings = SamplingSettings(
        temperature=0.0 if samples is False else temperature,
        max_new_tokens=int(wanted.get("max_new_tokens") or wanted.get("max_gen_toks") or MAX_NEW_TOKENS),
        top_p=float(wanted.get("top_p") or 1.0),
        top_k=int(wanted.get("top_k") or 0),
        repetition_penalty=float(wanted.get("repetition_penalty") or 1.0),
    )
    until = wanted.get("until") or ()
    ends = tuple(end for end in ([until] if isinstance(until, str) else until) if end and end != NOT_AN_END)
    ignored = sorted(wanted.keys() - FOLLOWED) + (["num_beams"] if (wanted.get("num_beams") or 1) > 1 else [])
    return settings, ends, f"not followed: {', '.join(ignored)}" if ignored else None


def cut_at(text: str, ends: Sequence[str]) -> str:
    """The text in front of the first of the ends.

    >>> cut_at("yes\\nQ: and now?", ("Q:", "ASSISTANT:"))
    'yes\\n'
    """
    return text[: min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]


def numbered(requests: Iterable[Request]) -> list[Request]:
    """Requests with unique ids: a task may ask the same several times."""
    seen: Counter[str] = Counter()
    unique = []
    for request in requests:
        unique.append(replace(request, id=f"{request.id}/{seen[request.id]}"))
        seen[request.id] += 1
    return unique

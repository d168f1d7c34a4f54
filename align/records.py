"""The lines of a run's JSONL files as typed records: Question, Samples, Pair (a line of scores:
reward.judgement.Judgement).

Text in, validated objects out, and back. Nothing here opens an image or imports torch.
"""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticSerializationError

from align.errors import UserError

IMAGE_TAG = "<image>"
# Of the values of a line: far from where Python's own limit makes reading succeed and writing fail.
MAX_DEPTH = 64
# Half of a character outside the basic plane. JSON can write it, as a server may; UTF-8 and tokenizers cannot.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Record(BaseModel):
    """A JSONL line: unknown keys are refused, so that a misspelt column is seen and not lost."""

    model_config = ConfigDict(extra="forbid")

    def check_text(self, info: ValidationInfo) -> None:
        """Raises ValueError for text that no tokenizer takes."""
        if info.mode == "json":  # whose parser takes no such text
            return
        with contextlib.suppress(PydanticSerializationError):
            # UTF-8 has no bytes for it: what can be serialised has none. Many times as fast as looking for it.
            self.model_dump_json()
            return
        if found := _LONE_SURROGATE.search(json.dumps(self.model_dump(), ensure_ascii=False)):
            raise ValueError(f"half of a character (\\u{ord(found[0]):04x}) stands alone in its text; write it whole")


class Turn(Record):
    """An earlier turn of the dialogue that a question continues."""

    role: Literal["user", "assistant"]
    content: str


class Question(Record):
    """An image question: what is asked, the images it is asked of, and, where known, the reference answer."""

    id: str = Field(min_length=1)
    question: str
    images: list[str] = Field(default_factory=list, description="paths inside the image root, in the order of the text")
    video: str | None = Field(None, description="a video file or a folder of frames inside the image root")
    answer: str | None = Field(None, description="reference answer, for the verifier and for accuracy")
    answer_kind: str | None = Field(None, description="how the verifier compares answers (see reward.critics.verifier)")
    absent_objects: list[str] = Field(
        default_factory=list,
        description="words for things that are not in the image; a response that names one hallucinates (as in CHAIR)",
    )
    system: str | None = Field(None, description="system prompt; absent means the model's default")
    history: list[Turn] = Field(default_factory=list, description="earlier turns of the dialogue")
    source: str | None = Field(None, description="which of several files of questions it is from; set by the run")
    meta: dict[str, Any] = Field(default_factory=dict, description="anything else; carried along, never read")

    @field_validator("answer_kind")
    @classmethod
    def _known_kind(cls, kind: str | None) -> str | None:
        from reward.critics.verifier import ANSWER_KINDS

        if kind is not None and kind not in ANSWER_KINDS:
            raise ValueError(f"must be one of {', '.join(ANSWER_KINDS)}, found {kind!r}")
        return kind

    @field_validator("question")
    @classmethod
    def _not_empty(cls, text: str) -> str:
        if not text.replace(IMAGE_TAG, "").strip():
            raise ValueError("the question is empty")
        return text

    @model_validator(mode="after")
    def _tags_match_images(self, info: ValidationInfo) -> Question:
        texts = [turn.content for turn in self.history if turn.role == "user"] + [self.question]
        tags = sum(text.count(IMAGE_TAG) for text in texts)
        if tags not in (0, len(self.images)):
            raise ValueError(f"the text names {tags} {IMAGE_TAG} but there are {len(self.images)} images")
        self.check_text(info)
        return self

    def as_text(self) -> str:
        """The dialogue up to the question in one text without image tags, as a critic reads it.

        >>> greeting = Turn(role="user", content="Hi")
        >>> Question(id="q", question="<image>And this?", images=["b"], history=[greeting]).as_text()
        'user: Hi\\nAnd this?'
        """
        turns = [f"{turn.role}: {turn.content}" for turn in self.history] + [self.question]
        return "\n".join(turns).replace(IMAGE_TAG, "").strip()

    def with_frames(self, references: list[str]) -> Question:
        """The question about the frames of its video, as images behind its own ones; `meta` keeps the video's name."""
        meta = {**self.meta, "video": self.video}
        return self.model_copy(update={"images": [*self.images, *references], "video": None, "meta": meta})

    def messages(self) -> list[dict[str, Any]]:
        """The chat messages of the prompt, images as bare ``{"type": "image"}`` parts in the order of `images`.

        Images that the text does not name stand before the text of the first user turn.

        >>> Question(id="q", question="What is it?", images=["a.png"]).messages()
        [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]}]
        """
        assert self.video is None, f"the frames of {self.video} were not picked"
        turns = [*((turn.role, turn.content) for turn in self.history), ("user", self.question)]
        named = any(IMAGE_TAG in content for role, content in turns if role == "user")
        unnamed = 0 if named else len(self.images)
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        for role, content in turns:
            # The user shows images; a tag in an answer is what the assistant wrote.
            parts = _content_parts(content) if role == "user" else _text_part(content)
            if role == "user" and unnamed:
                parts, unnamed = [{"type": "image"}] * unnamed + parts, 0
            messages.append({"role": role, "content": parts})
        return messages


class Response(Record):
    """One sample of the policy."""

    text: str
    num_tokens: int
    finish_reason: Literal["stop", "length"] = "stop"

    @field_validator("text")
    @classmethod
    def _whole(cls, text: str) -> str:
        """Halves of characters, as a server's JSON may hold, become U+FFFD,
        as tokenizers decode bytes that are no text."""
        return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)


class Evaluated(Response):
    """A response to a held-out question, held against what is known of it."""

    correct: bool | None = Field(None, description="by the reference answer; None where there is none")
    absent_named: list[str] = Field(
        default_factory=list, description="words of `absent_objects` that the response names"
    )
    token_ids: list[int] = Field(
        default_factory=list, description="as drawn, where the response is weighed again (KL, other images)"
    )


class Evaluation(Record):
    """A held-out question with the greedy and the sampled responses of one checkpoint."""

    id: str
    question: Question
    greedy: Evaluated
    sampled: list[Evaluated] = Field(default_factory=list)


class OtherImageAnswer(Record):
    """The greedy response to a held-out question with other images than its own; `id` is `CONTROL:QUESTION`."""

    id: str
    answer: Evaluated


class ResponseLogProbs(Record):
    """How likely a policy finds given responses to a question, in their order.

    `log_probs` are in nats, summed over `num_tokens` tokens each.
    """

    id: str
    log_probs: list[float]
    num_tokens: list[int]


class Compared(Record):
    """Whether the critic prefers a round's greedy response to those of other rounds, by the name of the other.

    1 is preferred, 0 the other one is, 0.5 a tie; None could not be judged.
    """

    id: str
    preferred: dict[str, float | None]


class Samples(Record):
    """A question with its K responses."""

    id: str
    question: Question
    responses: list[Response]
    seed: int


class LeftOut(Record):
    """A question that a stage could not work on: `reason` is what it is counted under, `message` what was wrong."""

    id: str
    reason: str
    message: str


class Pair(Record):
    """A preference in TRL's conversational format, with where it came from."""

    id: str = Field(min_length=1)
    images: list[str] = Field(default_factory=list)
    prompt: list[dict[str, Any]]
    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    margin: FiniteFloat | None = None
    rewards: dict[str, FiniteFloat] = Field(
        default_factory=dict, description="of the chosen and of the rejected response"
    )
    question_id: str | None = None
    responses: dict[str, int] = Field(default_factory=dict, description="indices of chosen and rejected in samples")
    meta: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _differ(self, info: ValidationInfo) -> Pair:
        if self.chosen == self.rejected:
            raise ValueError("chosen equals rejected")
        if not self.prompt:
            raise ValueError("the prompt is empty")
        self.check_text(info)
        return self


def _text_part(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text.strip() else []


def _content_parts(text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(text.split(IMAGE_TAG)):
        if index:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


RecordT = TypeVar("RecordT", bound=BaseModel)
_ENCODER = json.JSONEncoder(ensure_ascii=False)
# More bad lines than this, and more than half of the file: nobody corrects them one by one.
MANY = 3
MEND_LINE = "correct that line, or take it out of the file"
_SEAL = re.compile(r', "crc": "([0-9a-f]{8})"\}\s*$')


def to_line(record: BaseModel) -> str:
    """One line of JSON that any file takes: a lone surrogate, which UTF-8 has no bytes for, stays as `\\ud83d`."""
    line = _ENCODER.encode(record.model_dump(exclude_defaults=True))
    return line if line.isascii() else _LONE_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def sealed(line: str) -> str:
    """A line as `to_line` writes it with a checksum for its last key; `parse_line` holds the two against each other.

    For files that nobody edits.
    """
    return f'{line[:-1]}, "crc": "{zlib.crc32(line.encode("utf-8", "surrogateescape")):08x}"}}'


def _unsealed(line: str, where: str) -> str:
    """A line without its checksum; raises UserError where that does not fit."""
    seal = _SEAL.search(line) if '"crc"' in line[-40:] else None
    if seal is None:
        return line
    body = line[: seal.start()] + "}"
    if f"{zlib.crc32(body.encode('utf-8', 'surrogateescape')):08x}" != seal[1]:
        raise UserError("the line is damaged: its checksum does not fit", where=where)
    return body


def _is_too_deep(data: Any) -> bool:
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _items(value)]
    return bool(level)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def parse_line(line: str, kind: type[RecordT], where: str) -> RecordT:
    """One JSONL line as a record; raises UserError with file and line when it is not one."""
    line = _unsealed(line, where)
    if line.count("[") + line.count("{") <= MAX_DEPTH:
        # Twice as fast; what it refuses is looked at again below, for the message.
        with contextlib.suppress(ValidationError):
            return kind.model_validate_json(line)
    try:
        data = json.loads(line)
        if not isinstance(data, dict):
            raise UserError(f"expected a JSON object, found {type(data).__name__}", where=where)
        if line.count("[") + line.count("{") > MAX_DEPTH and _is_too_deep(data):
            raise RecursionError
        return kind.model_validate(data)
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON ({error.msg} at column {error.colno})", where=where) from None
    except RecursionError:
        raise UserError("nested too deep", where=where, fix="leave the nested key out") from None
    except ValidationError as error:
        raise UserError(f"not a valid {kind.__name__}: {explain(error, kind)}", where=where) from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise UserError(f"not valid JSON ({str(error).partition(';')[0]})", where=where) from None


def iter_jsonl(path: Path, kind: type[RecordT]) -> Iterator[RecordT]:
    """The records of a file in order; blank lines and a byte order mark are skipped."""
    if not path.is_file():
        raise UserError("no such file", where=str(path), fix=f"expected a JSONL file of {kind.__name__} records")
    with path.open(encoding="utf-8-sig", errors="strict") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield parse_line(line, kind, f"{path}:{number}")
        except UnicodeDecodeError:
            where = f"{path}:{_first_undecodable(path)}"
            raise UserError("not UTF-8 text", where=where, fix=MEND_LINE) from None
        except UserError as error:
            if error.fix is not None:
                raise
            bad, total = _count_bad(path, kind)
            if bad > MANY and 2 * bad > total:
                fix = (
                    f"{bad} of {total} lines cannot be read: another file stands in its place; put it back from a copy"
                )
                raise UserError(error.message, where=error.where, fix=fix) from None
            raise UserError(error.message, where=error.where, fix=MEND_LINE) from None


def _count_bad(path: Path, kind: type[BaseModel]) -> tuple[int, int]:
    """How many lines of a file are no records, and how many there are."""
    bad = total = 0
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            total += bool(line.strip())
            try:
                if line.strip():
                    parse_line(line, kind, "")
            except UserError:
                bad += 1
    return bad, total


def _first_undecodable(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return number
    return 1


def read_jsonl(path: Path, kind: type[RecordT]) -> list[RecordT]:
    """All records of a file; raises UserError naming the first bad line."""
    return list(iter_jsonl(path, kind))


def read_questions(path: Path) -> list[Question]:
    """All questions of a file; raises UserError when there are none or when two share an id."""
    seen: dict[str, int] = {}
    questions = []
    for number, question in enumerate(iter_jsonl(path, Question), start=1):
        if question.id in seen:
            raise UserError(
                f"the id {question.id!r} is duplicated (records {seen[question.id]} and {number})",
                where=str(path),
                fix="give every question an id of its own",
            )
        seen[question.id] = number
        questions.append(question)
    if not questions:
        raise UserError("no questions in the file", where=str(path))
    return questions


def write_jsonl(path: Path, records: Iterable[BaseModel]) -> None:
    """Write all records at once: a temporary file beside `path`, renamed when complete."""
    write_lines(path, map(to_line, records))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """As `write_jsonl`, of lines that `to_line` made."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    temporary.replace(path)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A validation error in one line: which key, what is wrong with it,
    and the nearest known key for an unknown one."""
    from difflib import get_close_matches

    problems = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = get_close_matches(str(fault["loc"][-1]), list(model.model_fields), n=1)
            problems.append(f"unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        else:
            message = fault["msg"].removeprefix("Value error, ")
            problems.append(f"{key}: {message}" if key else message)
    return "; ".join(problems)

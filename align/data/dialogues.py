"""Formats whose rows hold a dialogue: LLaVA, POVID, LLaMA-Factory, ms-swift, OpenAI, Alpaca.

What they share: the last question of the dialogue is the question, earlier turns are its history, a system turn or
column its system prompt. They differ in where the preference stands:

* LLaMA-Factory (data/README.md of hiyouga/LLaMA-Factory, "Preference dataset"): "conversations" or "messages" ends with
  the question, "chosen" and "rejected" are one turn each.
* ms-swift (docs, "Custom dataset", RLHF): the last turn of "messages" is the chosen response, "rejected_response" is a
  text, or "rejected_messages" the dialogue with the other response.
* OpenAI (guide "Direct preference optimization"): "input" holds the messages, "preferred_output" and
  "non_preferred_output" the responses. Images are `image_url` parts.
* POVID (YiyangAiLab/POVID_preference_data_for_VLLMs): "rejected_conversations" beside "conversations".
* LLaVA-RLHF (zhiqings/LLaVA-Human-Preference-10K): "output_1", "output_2" and "preference" 1 or 2.

What is answered to the question in a file without preferences is no reference answer; it is not used, and that is said.
"""

from __future__ import annotations

from typing import Any

from align.data.entry import BadRow, Entry, Preference
from align.data.fields import Fields
from align.data.messages import Dialogue, Tags, dialogue_of, history_of, messages_of, response_of

MESSAGES = ("messages", "conversations", "conversation", "dialogue")
IMAGES = ("images", "image", "image_path", "img_path", "image_url")


def read_dialogue(row: Fields, tags: Tags | None = None) -> Entry:
    """The last question of a dialogue, and the preference between its responses where the row has one."""
    name = next(
        (name for name in MESSAGES if row.has(name)), next((name for name in MESSAGES if name in row), MESSAGES[0])
    )
    dialogue = dialogue_of(messages_of(row.take("history, question", name), name, tags))
    preference = _preference(row, dialogue, tags)
    if dialogue.answer is not None:
        if preference is None or row.has("chosen"):
            row.note_unused(f"{name} (the last answer)")
        else:
            row.take("chosen", name)
    return _without_marks(row, entry_of(row, dialogue, [preference] if preference else []))


def read_llava_preference(row: Fields) -> Entry:
    """The question with the human's preference between the two outputs."""
    dialogue = dialogue_of(messages_of(row.take("history, question", "conversations"), "conversations"))
    outputs = [row.take("chosen, rejected", name) for name in ("output_1", "output_2")]
    given = [output.get("value") if isinstance(output, dict) else None for output in outputs]
    texts = [text for text in given if isinstance(text, str) and text.strip()]
    if len(texts) != len(outputs):
        raise BadRow("output_1 or output_2 has no text")
    preferred = row.take("chosen, rejected", "preference")
    if preferred not in (1, 2):
        raise BadRow("preference is neither 1 nor 2", repr(preferred))
    chosen, rejected = texts if preferred == 1 else texts[::-1]
    return entry_of(row, dialogue, [Preference(chosen, rejected)])


def read_openai(row: Fields) -> Entry:
    """A dialogue of OpenAI's fine-tuning files, with its preferred and its other output where it has them."""
    given = row.take("history, question", "input")
    if given is None:
        return read_dialogue(row)
    if not isinstance(given, dict):
        raise BadRow("input is no object", f"found {type(given).__name__}")
    for key in given:
        if key != "messages" and given[key]:
            row.note_unused(f"input.{key}")
    dialogue = dialogue_of(messages_of(given.get("messages"), "input.messages"))
    chosen = _one(row, "chosen", "preferred_output")
    return entry_of(row, dialogue, [Preference(chosen, _one(row, "rejected", "non_preferred_output"))])


def read_alpaca(row: Fields) -> Entry:
    """Alpaca's instruction with its input, or ms-swift's query; history is a list of [question, answer]."""
    name = "instruction" if row.has("instruction") else "query" if row.has("query") else "input"
    question = row.text("question", name)
    more = row.take("question", "input") if name != "input" else None
    if more is not None:
        question = f"{question}\n{more}"
    preferences = []
    if row.has("rejected_response"):
        chosen = row.text("chosen", "response", "output")
        preferences = [Preference(chosen, row.text("rejected", "rejected_response"))]
    elif row.has("chosen") or row.has("rejected"):
        preferences = [Preference(_one(row, "chosen"), _one(row, "rejected"))]
    elif isinstance(row.get("output"), list):
        preferences = [_ranked(row.take("chosen, rejected", "output"))]
    entry = Entry(
        question,
        row.images(*IMAGES),
        row.label("id"),
        history_of(row.take("history")),
        system=row.optional_text("system"),
        video=row.video(),
        preferences=preferences,
    )
    return _without_marks(row, entry)


def _ranked(output: list[Any]) -> Preference:
    """The preference in an `output` that holds the better response and the worse one (LLaMA-Factory before 0.7)."""
    if len(output) != 2 or not all(isinstance(text, str) and text.strip() for text in output):
        raise BadRow("output is no pair of texts", repr(output)[:80])
    return Preference(*output)


# What other trainers put into a text where the mark stands, and the columns that it comes from.
_MARKS = {"<audio>": ("audios", "audio"), "<ref-object>": ("objects",), "<bbox>": ("objects",)}


def _without_marks(row: Fields, entry: Entry) -> Entry:
    """The entry, whose texts are complete as they are.

    Raises:
        BadRow: a text has a mark that stands for a sound, or for an object or box of the row.
    """
    texts = [entry.question, *(turn.content for turn in entry.history)]
    texts += [text for preference in entry.preferences for text in (preference.chosen, preference.rejected)]
    for mark, columns in _MARKS.items():
        if any(mark in text for text in texts) and any(row.has(column) for column in columns):
            raise BadRow(f"{mark} stands for something that is not read", f"column {columns[0]}")
    return entry


def _one(row: Fields, role: str, column: str | None = None, tags: Tags | None = None) -> str:
    """The one response in a column: text, or one turn."""
    column = column or role
    value = row.take(role, column)
    if value is None:
        raise BadRow(f"no {column}")
    before, text = response_of(value, column, tags)
    if before:
        raise BadRow(f"{column} holds more than one response")
    return text


def _preference(row: Fields, dialogue: Dialogue, tags: Tags | None) -> Preference | None:
    for column in ("rejected_messages", "rejected_conversations"):
        if row.has(column):
            _same_images(row)
            return Preference(
                _last_answer(dialogue), _other_answer(row.take("rejected", column), column, dialogue, tags)
            )
    if row.has("rejected_response"):
        return Preference(_last_answer(dialogue), row.text("rejected", "rejected_response"))
    if not row.has("chosen") and not row.has("rejected"):
        return None
    return Preference(_one(row, "chosen", tags=tags), _one(row, "rejected", tags=tags))


def _last_answer(dialogue: Dialogue) -> str:
    if dialogue.answer is None:
        raise BadRow("a conversation ends without an answer")
    return dialogue.answer


def _other_answer(value: Any, column: str, dialogue: Dialogue, tags: Tags | None) -> str:
    """The answer at the end of a dialogue that asks the same, or of the answer alone."""
    messages = messages_of(value, column, tags)
    if any(message.role == "user" for message in messages):
        other = dialogue_of(messages)
        if (other.question, other.history) != (dialogue.question, dialogue.history):
            raise BadRow("the two conversations ask different things")
        return _last_answer(other)
    before, text = response_of(value, column, tags)
    if before:
        raise BadRow(f"{column} holds more than one response")
    return text


def _same_images(row: Fields) -> None:
    other = row.images("rejected_images") if row.has("rejected_images") else None
    if other is not None and other != row.images(*IMAGES):
        raise BadRow("the rejected response is about other images")


def entry_of(row: Fields, dialogue: Dialogue, preferences: list[Preference]) -> Entry:
    """A dialogue and what is preferred in it, with what the row says besides: id, images, system prompt, video."""
    return Entry(
        dialogue.question,
        dialogue.all_images(lambda: row.images(*IMAGES)),
        row.label("id"),
        dialogue.history,
        system=dialogue.system if dialogue.system is not None else row.optional_text("system"),
        video=row.video(),
        preferences=preferences,
    )

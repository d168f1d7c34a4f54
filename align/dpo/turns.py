"""A processor in; what is wrong with how its chat template begins and ends the assistant's turn, in words, out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from align.models.files import read_json

if TYPE_CHECKING:
    from transformers import ProcessorMixin

QUESTION, ANSWER = "What is shown?", "A boat."
NO_END = (
    "the chat template writes no end token behind a response: training does not teach where responses end, and the "
    "policy may come to write on"
)
NO_HEADER = (
    "the chat template writes no beginning of the assistant's turn (add_generation_prompt): it is trained as part of "
    "every response, and samples are drawn without it"
)


def turn_faults(processor: ProcessorMixin, checkpoint: str) -> list[str]:
    """What a training on this template would teach that nobody wants; empty where turns begin and end as they should.

    An end token is one that stops generation: the tokenizer's, or one of `generation_config.json`.
    """
    user = {"role": "user", "content": [{"type": "text", "text": QUESTION}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
    prompt = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    bare = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=False)
    dialogue = processor.apply_chat_template([user, reply], tokenize=False)
    header = dialogue[len(bare) :].partition(ANSWER)[0] if dialogue.startswith(bare) else ""
    tail = dialogue.rpartition(ANSWER)[2]
    ids = set(processor.tokenizer(tail, add_special_tokens=False)["input_ids"])
    faults = [] if ids & end_token_ids(processor, checkpoint) else [NO_END]
    return faults + ([NO_HEADER] if prompt == bare and header.strip() else [])


def end_token_ids(processor: ProcessorMixin, checkpoint: str) -> set[int]:
    """The tokens at which generation stops."""
    path = Path(checkpoint) / "generation_config.json"
    stated = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = stated if isinstance(stated, list) else [stated]
    return {id_ for id_ in [processor.tokenizer.eos_token_id, *ids] if isinstance(id_, int)}

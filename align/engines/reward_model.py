"""Dialogues in, one number each out: a sequence-classification reward model in this process.

A model with a processor of images and text sees the images. One that has only a tokenizer scores the text alone; its
`notes` and the log say so, and the controls of `align score` show it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer

from align.config import ModelSettings
from align.engines.prompts import to_device
from align.errors import UserError
from align.log import log
from align.models.device import pick_device, pick_dtype
from align.models.record_faults import CANNOT_ENCODE, CANNOT_READ, CANNOT_RENDER, record_faults
from align.monitoring.cost import count_tokens
from reward.critics.scalar import Dialogue

BATCH_SIZE = 8


def open_scorer(
    checkpoint: str,
    settings: ModelSettings,
    *,
    open_image: Callable[[Any], Any],
    processor: dict[str, Any] | None = None,
) -> LocalScorer:
    """Load a reward model.

    Raises:
        UserError: the checkpoint cannot be opened, or gives more than one number.
    """
    device = pick_device(settings.device)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            checkpoint, dtype=pick_dtype(settings.dtype, device), use_safetensors=True, trust_remote_code=False
        )
        reader = _reader(checkpoint, processor or {})
    except (ValueError, ImportError, OSError, RuntimeError, KeyError) as error:
        raise UserError(
            f"the reward model cannot be opened: {error}",
            where=checkpoint,
            fix="a scalar critic is a sequence-classification checkpoint in safetensors",
        ) from None
    if model.config.num_labels != 1:
        raise UserError(
            f"expected a reward model with one output, found {model.config.num_labels}",
            where=checkpoint,
            fix="use a checkpoint whose config has num_labels: 1",
        )
    return LocalScorer(model.to(device).eval(), reader, open_image)


def _reader(checkpoint: str, settings: dict[str, Any]) -> Any:
    try:
        return AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False, **settings)
    except (ValueError, OSError, KeyError):
        return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)


class LocalScorer:
    """`Scorer` with a loaded model; `reader` is its processor, or its tokenizer where it reads text only."""

    def __init__(self, model: Any, reader: Any, open_image: Callable[[Any], Any]) -> None:
        self.model, self.reader, self.open_image = model, reader, open_image
        self.tokenizer = getattr(reader, "tokenizer", reader)
        takes_pixels = "pixel_values" in inspect.signature(model.forward).parameters
        self.sees = takes_pixels and getattr(reader, "image_processor", None) is not None
        self.notes: dict[str, str] = {}
        if not self.sees:
            self.notes["images"] = "not shown: the reward model reads text only"
            log.warning("the reward model reads text only: it never sees an image")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, dialogues: Sequence[Dialogue]) -> list[float | None]:
        """One number a dialogue, in order."""
        numbers: list[float | None] = [None] * len(dialogues)
        for alike in (True, False):
            places = [i for i, dialogue in enumerate(dialogues) if bool(self.sees and dialogue.images) is alike]
            for start in range(0, len(places), BATCH_SIZE):
                batch = places[start : start + BATCH_SIZE]
                for place, number in zip(batch, self._score([dialogues[i] for i in batch]), strict=True):
                    numbers[place] = number
        return numbers

    @torch.no_grad()
    def _score(self, batch: Sequence[Dialogue]) -> list[float]:
        with record_faults("the dialogue", CANNOT_RENDER):
            texts = [self._render(dialogue) for dialogue in batch]
        arguments: dict[str, Any] = {"text": texts}
        if self.sees and batch[0].images:
            with record_faults("the dialogue", CANNOT_READ):
                arguments["images"] = [[self.open_image(image) for image in dialogue.images] for dialogue in batch]
        reader = self.reader if "images" in arguments else self.tokenizer
        with record_faults("the dialogue", CANNOT_ENCODE):
            inputs = reader(**arguments, padding=True, return_tensors="pt", add_special_tokens=False)
        inputs = to_device(dict(inputs), self.model.device, self.model.dtype)
        inputs.pop("token_type_ids", None)
        self._mark_padding(inputs["input_ids"], inputs["attention_mask"])
        count_tokens(read=inputs["attention_mask"].sum().item())
        return self.model(**inputs).logits[:, 0].float().tolist()

    def _mark_padding(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Pad with a token that no dialogue of the batch has:
        transformers reads the score before the last padding token.

        With the end token for padding it would be read before the end of the dialogue.
        """
        used = set(input_ids[attention_mask.bool()].tolist())
        unused = next(token for token in itertools.count() if token not in used)
        input_ids.masked_fill_(~attention_mask.bool(), unused)
        for config in (self.model.config, self.model.config.get_text_config()):
            config.pad_token_id = unused

    def _render(self, dialogue: Dialogue) -> str:
        """The dialogue as the chat template writes it; plain text where the model has none."""
        template_of = self.reader if getattr(self.reader, "chat_template", None) else self.tokenizer
        if getattr(template_of, "chat_template", None) is None:
            return f"{dialogue.question}\n{dialogue.response}"
        parts = [{"type": "image"}] * (len(dialogue.images) if self.sees else 0)
        user: Any = [*parts, {"type": "text", "text": dialogue.question}]
        reply: Any = [{"type": "text", "text": dialogue.response}]
        if not self.sees:
            user, reply = dialogue.question, dialogue.response
        chat = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        return template_of.apply_chat_template(chat, tokenize=False)

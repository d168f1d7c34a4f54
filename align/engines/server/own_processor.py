"""The processor of a checkpoint that a server has and that lies here too: what it makes of prompts and of tokens.

It is opened when it is first asked, by whichever thread comes first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.log import log
from align.models.messages import IMAGE_MARK

if TYPE_CHECKING:
    from align.engines.prompts import Prompter


class OwnProcessor:
    """`open_processor` opens the checkpoint's own; `open_image` gives an image as it is sent."""

    def __init__(self, open_processor: Callable[[], Any], open_image: Callable[[Any], Any]) -> None:
        self._open_processor, self._open_image = open_processor, open_image
        self._prompter: Prompter | None = None
        self._fault = ""
        self._one_at_a_time = threading.Lock()

    def prompt_tokens(self, messages: Sequence[dict[str, Any]], images: Sequence[Any]) -> list[int] | None:
        """The tokens of a prompt (messages with bare image parts); None where it cannot be made here.

        Nor is it made where a text spells out a special token, which a server may take for one
        and a model here never does.
        """
        prompter = self._opened()
        if prompter is None:
            return None
        try:
            if _says_special(prompter, messages):
                return None
            with self._one_at_a_time:
                text = prompter.render(messages)
                return prompter.encode([text], [list(images)])["input_ids"][0].tolist()
        except (UserError, ValueError, OSError) as error:
            log.warning("a prompt is not compared with the server's: %s", error)
            return None

    def text(self, token_ids: Sequence[int]) -> str | None:
        """A response as text, as a model in this process gives it; None where the processor cannot be opened.

        Servers put an answer together token by token behind its prompt, which a tokenizer with a space in front of
        words begins with that space.
        """
        prompter = self._opened()
        return None if prompter is None else prompter.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def _opened(self) -> Prompter | None:
        from align.engines.prompts import Prompter

        with self._one_at_a_time:
            if self._prompter is None and not self._fault:
                try:
                    self._prompter = Prompter(self._open_processor(), self._open_image)
                except (UserError, ValueError, OSError) as error:
                    self._fault = str(error)
                    log.warning("what a server reads and writes is not compared: %s", error)
            return self._prompter


def _says_special(prompter: Prompter, messages: Sequence[dict[str, Any]]) -> bool:
    special = [IMAGE_MARK, *prompter.tokenizer.all_special_tokens]
    texts = [part.get("text", "") for message in messages for part in _parts(message["content"])]
    return any(token in text for text in texts for token in special)


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)

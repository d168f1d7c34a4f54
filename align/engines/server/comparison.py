"""What a server says of itself, held against the checkpoint that it is to serve: prompts, weights, positions.

A server tokenises and cuts images by itself, and may do it otherwise: on vLLM a LLaVA-OneVision reads two images as 88
tokens where its own processor makes 58, and answers otherwise. So the first prompts of each kind (no image, one,
several) are made here too, and compared by their tokens where the server returns them, else by how many it counts.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.engines.server.chat import num_prompt_tokens
from align.engines.server.own_processor import OwnProcessor
from align.errors import UserError
from align.run.hashes import checkpoint_hash

PER_KIND = 2


class PromptComparison:
    """Compares the first prompts of each kind with what the checkpoint's own processor makes of them."""

    def __init__(self, own: OwnProcessor) -> None:
        self._own = own
        self._one_at_a_time = threading.Lock()
        self._taken: Counter[str] = Counter()
        self.compared: Counter[str] = Counter()

    def compare(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Any], answer: dict[str, Any], url: str
    ) -> None:
        """Compare a prompt with what was answered to it, unless enough of its kind have been.

        `messages` with bare image parts, as in `SampleRequest`. Raises UserError where they differ.
        """
        kind = "no image" if not images else "one image" if len(images) == 1 else "several images"
        with self._one_at_a_time:
            if self._taken[kind] >= PER_KIND:
                return
            self._taken[kind] += 1
        ours = self._own.prompt_tokens(messages, images)
        if ours is None:
            return
        theirs = answer.get("prompt_token_ids")
        count = len(theirs) if isinstance(theirs, list) else num_prompt_tokens(answer)
        if count is None:
            return
        if count != len(ours) or (isinstance(theirs, list) and theirs != ours):
            at = f"{count} tokens, the checkpoint's own processor makes {len(ours)} of it"
            if count == len(ours):
                assert isinstance(theirs, list)
                first = next(index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
                at = f"other tokens than the checkpoint's own processor, from the {first + 1}th on"
            raise UserError(
                f"the server reads a prompt with {kind} as {at}: it would answer another question",
                where=url,
                fix=("serve the checkpoint as `align serve` does, or set server.compare_prompts=false to continue"),
            )
        self.compared[kind] += 1

    def in_words(self) -> str:
        """For the manifest: what was equal."""
        kinds = ", ".join(f"{count} with {kind}" for kind, count in sorted(self.compared.items()))
        return f"equal to the checkpoint's own processor: {kinds}" if kinds else "not compared"


def check_weights(url: str, root: str | None, checkpoint: str) -> str:
    """What is known of the weights that a server has under a name; for the manifest.

    Raises UserError where it names a folder (vLLM: `root`) whose contents are another checkpoint.
    """
    if root is None or not Path(root).is_dir() or not Path(checkpoint).is_dir():
        return "the name alone: the server does not say which folder it serves, or it is not seen from here"
    if Path(root).resolve() != Path(checkpoint).resolve() and checkpoint_hash(root) != checkpoint_hash(checkpoint):
        raise UserError(
            f"the server has other weights under this name: {root}, which is not {checkpoint}",
            where=url,
            fix="serve the checkpoint itself",
        )
    return "the folder that the server names has the checkpoint's contents"

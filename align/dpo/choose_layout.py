"""A model and its first pairs in; whether training shares prompts out, proved on those pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.dpo.collator import LayoutName, PairCollator, layout_of, prompt_inputs_of
from align.dpo.tokenize import TokenizedPair
from align.errors import UserError
from align.log import log
from align.prefix.attention import PrefixUnsupported, stop_shared_prefix
from align.prefix.equivalence import check_equivalence

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose_layout(
    setting: str, model: PreTrainedModel, collator: PairCollator, pairs: Sequence[TokenizedPair]
) -> tuple[LayoutName, str]:
    """`shared` where the first batch shows that it is exact, else `plain`; and what was found, for the manifest.

    `collator` makes batches of the shared layout.

    Raises:
        UserError: the setting is `on` and the shared prefix cannot be used.
    """
    if setting == "off":
        return "plain", "off"
    text_config = model.config.get_text_config()
    if getattr(text_config, "router_aux_loss_coef", 0.0) and hasattr(text_config, "output_router_logits"):
        exact, reason = False, "the load-balancing loss of experts is not defined on shared prompts"
    else:
        batch = {name: value.to(model.device) for name, value in collator.collate(pairs).items()}
        found = check_equivalence(model, prompt_inputs_of(batch), layout_of(batch))
        exact, reason = found.exact, found.reason
    if exact:
        log.info("shared prefix: %s", reason)
        return "shared", reason
    if setting == "on":
        raise UserError(f"shared_prefix is on, but it cannot be used: {reason}", fix="set shared_prefix: auto")
    with contextlib.suppress(PrefixUnsupported, AttributeError):
        stop_shared_prefix(model)
    log.warning("shared prefix: not used, every response repeats its prompt: %s", reason)
    return "plain", f"not used: {reason}"

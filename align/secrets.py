"""Text in, the same without passwords and keys out: for what libraries say of addresses and of the environment."""

from __future__ import annotations

import os
import re

_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_USER = re.compile(r"(://)[^/@\s]+@")
_QUERY = re.compile(r"([?&](?:[\w-]*(?:key|token|secret|password|signature|sig))=)[^&\s'\"]+", re.IGNORECASE)
# Shorter values are words that may stand anywhere.
SHORTEST = 6


def without_secrets(text: str) -> str:
    """Leave out users and passwords in addresses, keys in their queries, and values of the environment that are keys.

    >>> without_secrets("cannot reach http://me:pass@host:5000/api?run=1&token=abc")
    'cannot reach http://***@host:5000/api?run=1&token=***'
    """
    for name, value in os.environ.items():
        if _NAMES.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, "***")
    return _QUERY.sub(r"\1***", _USER.sub(r"\1***@", text))

"""The error of this package: a setting or a prompt file that a person must fix."""

from __future__ import annotations


class RewardError(ValueError):
    """A bad setting or prompt; the text says what was expected, what was found, where, and what to do."""

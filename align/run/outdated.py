"""A run's manifests in, the rounds out that were made from a checkpoint which no longer exists.

A round remembers the content hash of the policy it began with, and the round before that of the checkpoint it wrote.
`--redo` of an earlier round parts the two: what later rounds hold still stands on the disk, but nothing leads to it.
"""

from __future__ import annotations

from collections.abc import Iterable

from align.errors import UserError
from align.run.folder import Round
from align.run.manifest import StageEntry


def outdated_rounds(rounds: Iterable[Round]) -> dict[int, str]:
    """By round, in order: what it was built on, as the end of a sentence; empty where every round has its parent.

    All rounds after the first such one are outdated too. A damaged manifest is passed over: reading it says so.
    """
    found: dict[int, str] = {}
    before: dict[str, StageEntry] | None = None
    for this in sorted(rounds, key=lambda this: this.number):
        stages = _stages(this)
        if this.number < 2 or not stages:
            before = stages
            continue
        parent = this.number - 1
        if parent in found:
            found[this.number] = f"is built on round {parent}, which itself {found[parent]}"
        elif before is not None and not _is_parent(before.get("dpo"), stages):
            found[this.number] = f"is built on a checkpoint of round {parent} that no longer exists"
        before = stages
    return found


def policy_hash(stages: dict[str, StageEntry]) -> str | None:
    """The content hash of the policy that a round began with; None where no stage has looked at one."""
    entries = (stages.get(name) for name in ("sample", "dpo"))
    return next((entry.inputs["policy"] for entry in entries if entry and "policy" in entry.inputs), None)


def _is_parent(dpo: StageEntry | None, stages: dict[str, StageEntry]) -> bool:
    policy = policy_hash(stages)
    if policy is None:
        return True
    if dpo is None or not dpo.complete:
        return False
    return dpo.outputs.get("checkpoint", policy) == policy


def _stages(this: Round) -> dict[str, StageEntry] | None:
    try:
        return this.manifest.stages()
    except UserError:
        return None

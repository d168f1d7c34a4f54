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

    All rounds after the first such one are outdated too, unless they start from an earlier one
    (`evaluate.select: best`). A damaged manifest is passed over: reading it says so.
    """
    found: dict[int, str] = {}
    known = {this.number: _stages(this) for this in rounds}
    for number in sorted(known):
        stages, before = known[number], known.get(number - 1)
        if number < 2 or not stages:
            continue
        selected = before["evaluate"].selected if before and "evaluate" in before else None
        chosen = selected is not None and selected.checkpoint == policy_hash(stages)
        parent = selected.round if selected is not None and chosen else number - 1
        trained = known.get(parent)
        if parent in found:
            found[number] = f"is built on round {parent}, which itself {found[parent]}"
        elif parent and trained is not None and not _is_parent(trained.get("dpo"), stages):
            found[number] = f"is built on a checkpoint of round {parent} that no longer exists"
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

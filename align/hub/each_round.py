"""A round that is complete in, its checkpoint on the Hub out; a push that fails is a warning and never ends a run.

What is on the Hub (align.run.pushes) is not pushed again; what failed is tried again after the next round and by the
next `align run`. Every round is a commit of the one repository and has a tag of its own, `round-N`.
"""

from __future__ import annotations

from align.config import Config
from align.errors import UserError
from align.hub.push import push
from align.log import log
from align.run.folder import RunDir
from align.run.hashes import checkpoint_hash
from align.run.manifest import now
from align.run.pushes import FailedPush, pushes_path, read_pushes


def push_rounds(config: Config, last: int, result: int | None = None) -> list[str]:
    """Push the rounds up to `last` that are to be on the Hub and are not; gives a warning for each that failed.

    All of them with `hub.each_round`, else the `result` of the run alone, once it has ended: its last round, or the one
    that was chosen; nothing where that is the first policy.
    """
    if config.hub.repo is None:
        return []
    wanted = range(1, last + 1) if config.hub.each_round else [result] if result else []
    try:
        return [warning for number in wanted if (warning := _push_round(config, config.hub.repo, number)) is not None]
    except UserError as error:
        return [str(error)]


def _push_round(config: Config, repo: str, number: int) -> str | None:
    run = RunDir(config.run_dir)
    known, checkpoint = read_pushes(run), run.round(number).checkpoint
    weights = checkpoint_hash(str(checkpoint))
    if known.pushed.get(number, {}).get("checkpoint") == weights:
        return None
    known.pushed.pop(number, None)
    warning = None
    try:
        done = push(checkpoint, repo, public=not config.hub.private, tag=f"round-{number}")
        log.info("round %d is on the Hub: %s", number, done.url)
        known.pushed[number] = {"checkpoint": weights, "url": str(done.url), "when": now()}
    except UserError as error:
        known.failed.append(FailedPush(round=number, error=str(error), when=now()))
        times = len(known.open_failures()[number])
        warning = f"round {number} was not pushed to {repo}{f' ({times} tries so far)' if times > 1 else ''}: {error}"
    known.write(pushes_path(run))
    return warning

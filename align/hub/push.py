"""A checkpoint folder in, a repository on the Hugging Face Hub out. Private unless asked for otherwise.

The token is that of `hf auth login` or of the environment (HF_TOKEN); it is never an argument. What a stage has
not written to its end is refused, and so is what was never meant to travel (hidden files, trainer checkpoints).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.models.load import check_checkpoint
from align.models.weights import weight_files
from align.run.manifest import Manifest

STAYS = ("optimizer", "rng_state", "scheduler", "checkpoint-")


@dataclass(frozen=True)
class Upload:
    """What goes up: paths in the folder with their bytes; `url` once it is there."""

    files: dict[str, int]
    url: str | None = None

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(self.files.values())


def push(checkpoint: Path, repo: str, *, public: bool = False, dry_run: bool = False, tag: str | None = None) -> Upload:
    """Upload a checkpoint folder to `repo` (owner/name), which is made if it is not there.

    `tag` names this state of the repository.

    Raises:
        UserError: the folder is not a complete checkpoint, the name is no repository's, there is no token, or the Hub
            refuses.
    """
    check_name(repo)
    files = checked_files(checkpoint)
    if dry_run:
        return Upload(files)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        message = "Upload checkpoint" if tag is None else f"Upload checkpoint {tag}"
        done = api.upload_folder(
            folder_path=checkpoint, repo_id=repo, allow_patterns=list(files), commit_message=message
        )
        if tag is not None:
            _tag(api, repo, tag, done.oid)
    except Exception as error:
        # No token, no network, no permission: each version's HTTP library has errors of its own.
        raise _refusal(error, repo, api.endpoint) from None
    return Upload(files, f"{api.endpoint}/{repo}")


def _tag(api: Any, repo: str, tag: str, commit: str) -> None:
    """Let a tag name this commit, whatever it named before."""
    from huggingface_hub.errors import RevisionNotFoundError

    with contextlib.suppress(RevisionNotFoundError):
        api.delete_tag(repo, tag=tag)
    api.create_tag(repo, tag=tag, revision=commit)


def check_name(repo: str) -> None:
    """Raise UserError for a name that the Hub would refuse."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"expected a repository as owner/name, found {repo!r}")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"the Hub takes no repository of this name ({str(error).splitlines()[0]})",
            where=repo,
            fix="use letters, digits, '-', '_' and '.', at most 96 characters",
        ) from None


def _refusal(error: Exception, repo: str, endpoint: str) -> UserError:
    """What a failed upload means to the person who asked for it."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if _is_unreachable(error):
        return UserError(
            f"the Hub cannot be reached at {endpoint} ({said})",
            where=repo,
            fix="check the network (HF_ENDPOINT, HTTPS_PROXY, HF_HUB_OFFLINE), then push again",
        )
    return UserError(
        f"the Hub did not take it: {said}",
        where=repo,
        fix="log in with `hf auth login` or set HF_TOKEN, and check that the token may write there",
    )


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether no server answered, by the names that requests, httpx and huggingface_hub give that, up to its cause."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"ConnectionError", "TransportError", "Timeout", "OfflineModeIsEnabled"}:
            return getattr(error, "response", None) is None
        error = error.__cause__ or error.__context__
    return False


def checked_files(checkpoint: Path) -> dict[str, int]:
    """The files of a complete checkpoint with their sizes.

    Raises:
        UserError: weights are missing or cut, there is no config, or the round that makes the folder has not finished.
    """
    check_checkpoint(checkpoint)
    if not checkpoint.is_dir():
        raise UserError("expected a folder", where=str(checkpoint))
    if not weight_files(checkpoint):
        raise UserError("expected weights in safetensors, found none", where=str(checkpoint))
    manifest = Manifest(checkpoint.parent / "manifest.json")
    if checkpoint.name == "checkpoint" and manifest.path.is_file() and not manifest.complete("dpo"):
        raise UserError(
            "the round that writes this checkpoint has not finished",
            where=str(checkpoint),
            fix="run align dpo to its end",
        )
    half = sorted(path.name for path in checkpoint.iterdir() if path.name.endswith(".tmp"))
    if half:
        raise UserError(
            f"the folder holds half-written files ({half[0]})", where=str(checkpoint), fix="write the checkpoint again"
        )
    return {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and _travels(path.relative_to(checkpoint))
    }


def _travels(path: Path) -> bool:
    """False for hidden files and for what only an interrupted training needs."""
    return not any(part.startswith((".", *STAYS)) for part in path.parts)

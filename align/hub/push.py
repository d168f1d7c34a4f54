"""A checkpoint folder in, a repository on the Hugging Face Hub out. Private unless asked for otherwise.

The token is that of `huggingface-cli login` or of the environment (HF_TOKEN); it is never an argument. What a stage has
not written to its end is refused, and so is what was never meant to travel (hidden files, intermediate states).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
        return sum(self.files.values())


def push(checkpoint: Path, repo: str, *, public: bool = False, dry_run: bool = False) -> Upload:
    """Upload a checkpoint folder to `repo` (owner/name), which is made if it is not there.

    Raises:
        UserError: the folder is not a complete checkpoint, the name is no repository's, there is no token, or the Hub
            refuses.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"expected a repository as owner/name, found {repo!r}")
    files = checked_files(checkpoint)
    if dry_run:
        return Upload(files)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            folder_path=checkpoint, repo_id=repo, allow_patterns=list(files), commit_message="Upload checkpoint"
        )
    except Exception as error:
        # No token, no network, no permission: each version's HTTP library has errors of its own.
        raise UserError(
            f"the Hub did not take it: {str(error).splitlines()[0]}",
            where=repo,
            fix="log in with `hf auth login` or set HF_TOKEN, and check that the token may write there",
        ) from None
    return Upload(files, f"{api.endpoint}/{repo}")


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

"""Files, checkpoints and texts in, their sha256 out: what a stage read and wrote, and where every weight came from."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from align.errors import UserError
from align.files import file_sha256


def content_hash(path: Path) -> str:
    """sha256 of a file, or of a folder's weights, config and tokenizer (names and contents, in order of name).

    Files that do not change what the model computes (cards, trainer state, hidden files) are left out.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _is_model_file(file.name))
        if not files:
            raise UserError("no model files in the folder", where=str(path))
        with ThreadPoolExecutor(8) as pool:
            parts = [f"{file.name}:{digest}" for file, digest in zip(files, pool.map(file_sha256, files), strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return file_sha256(path)


def checkpoint_hash(reference: str) -> str:
    """The content hash of a local checkpoint; for a hub id, the id itself (its files carry their own hashes there)."""
    path = Path(reference)
    if path.is_absolute() and not path.is_dir():
        raise UserError("there is no such checkpoint folder", where=reference, fix="check policy or critic.model")
    return content_hash(path) if path.exists() else f"hub:{reference}"


def text_hash(*parts: str) -> str:
    """sha256 of texts, in order."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _is_model_file(name: str) -> bool:
    if name.startswith(".") or name in {"README.md", "trainer_state.json", "manifest.json"}:
        return False
    return name.endswith((".safetensors", ".bin", ".json", ".jinja", ".txt", ".model", ".py"))

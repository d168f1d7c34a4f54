"""What a training that was stopped resumes from: trainer checkpoints,
each with a manifest of its own that is written last.

The manifest holds size and sha256 of every file. A checkpoint without one, or with a file that differs from it, is not
used: the one before is, and that is reported.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from align.distributed.ranks import is_main_process
from align.files import file_sha256, write_text
from align.log import log

MANIFEST = "complete.json"


def seal(folder: Path) -> None:
    """Write the manifest of a trainer checkpoint whose files are all there; on one process, after all have written."""
    write_text(folder / MANIFEST, json.dumps({"files": _file_facts(folder)}, indent=1) + "\n")


def unseal(folder: Path) -> None:
    """Take the manifest away before files of its checkpoint are written again."""
    (folder / MANIFEST).unlink(missing_ok=True)


def remove_older(folder: Path, limit: int | None, best: str | None = None) -> None:
    """Remove all trainer checkpoints of a round but `limit` of them: the `best`, and the newest; None keeps all.

    The newest is always kept, to resume from.
    """
    others = [path for path in _by_step(folder) if best is None or path.name != Path(best).name]
    kept = limit if limit is None or best is None else max(limit - 1, 1)
    for path in others[: -kept if kept else 0]:
        shutil.rmtree(path)


def last_checkpoint(folder: Path, num_processes: int) -> Path | None:
    """The newest complete trainer checkpoint, the same on every process of the launch; None where there is none.

    Newer ones are reported and removed, on the main process, which alone reads them.
    """
    found = _newest_complete(folder, num_processes) if is_main_process() else None
    chosen = [str(found) if found else None]
    if num_processes > 1:
        broadcast_object_list(chosen)
    return Path(chosen[0]) if chosen[0] else None


def fault_of(folder: Path, num_processes: int) -> str | None:
    """Why training cannot resume from a trainer checkpoint, or None where it can."""
    try:
        expected = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return "it was not written to its end"
    missing = [f"rng_state_{rank}.pth" for rank in range(num_processes) if num_processes > 1]
    if lacking := [name for name in missing if name not in expected]:
        return f"it is that of fewer processes ({lacking[0]} is missing)"
    found = _file_facts(folder)
    changed = [name for name, facts in expected.items() if found.get(name) != facts]
    return f"{changed[0]} is damaged" if changed else None


def _newest_complete(folder: Path, num_processes: int) -> Path | None:
    for path in reversed(_by_step(folder)):
        fault = fault_of(path, num_processes)
        if fault is None:
            return path
        log.warning("%s is not used and is removed: %s", path, fault)
        shutil.rmtree(path)
    return None


def _by_step(folder: Path) -> list[Path]:
    paths = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    return sorted(paths, key=lambda path: int(path.name.split("-")[-1]))


def _file_facts(folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor(8) as pool:
        hashes = list(pool.map(file_sha256, files))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes, strict=True)
    }

"""The manifest of a round: an entry per stage with its settings, inputs, outputs, counts, cost and versions."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.files import make_folder, write_text
from align.monitoring.cost import spent_on
from align.run.hashes import content_hash
from align.run.stages import STAGES

PACKAGES = ("valley-align", "torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "datasets")


@dataclass(frozen=True)
class Manifest:
    """manifest.json of a round: one entry a stage, `status` running or complete; rewritten as a whole each time."""

    path: Path

    def read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {"stages": {}}
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(
                f"the manifest is damaged ({error})",
                where=str(self.path),
                fix="restore it from a copy, or remove the round's folder and run it again",
            ) from None

    def stage(self, name: str) -> dict[str, Any] | None:
        return self.read()["stages"].get(name)

    def complete(self, name: str) -> bool:
        entry = self.stage(name)
        return entry is not None and entry["status"] == "complete"

    def begin(self, name: str, *, settings: dict[str, Any], inputs: dict[str, str]) -> bool:
        """Enter a stage; returns False when it is complete already.

        Raises:
            UserError: the stage was begun with other settings or other inputs; going on would mix the two.
        """
        settings = json.loads(json.dumps(settings, default=str))
        entry = self.stage(name)
        if entry is None:
            self._put(
                name,
                {
                    "status": "running",
                    "started": now(),
                    "settings": settings,
                    "inputs": inputs,
                    "versions": versions(),
                },
            )
            return True
        changed = _differences(entry["settings"], settings) + _differences(entry["inputs"], inputs)
        if changed:
            raise UserError(
                f"stage {name} was {'finished' if entry['status'] == 'complete' else 'begun'} with other inputs: {'; '.join(changed)}",
                where=str(self.path.parent),
                fix=f"run it again from the start with --redo (this discards the round from {name} on), or give the run another name",
            )
        if entry.pop("refused", None) is not None:
            self._put(name, entry)
        return entry["status"] != "complete"

    def note(self, name: str, **facts: Any) -> None:
        """Add facts to a stage that has begun and is not complete: `counts` so far, why it `refused` to go on."""
        entry = self.stage(name)
        if entry is not None and entry["status"] != "complete":
            self._put(name, entry | facts)

    def finish(
        self, name: str, *, outputs: Iterable[Path], counts: dict[str, Any], seconds: float = 0.0, **more: Any
    ) -> None:
        """Mark a stage complete, with what it wrote (hashed), what it counted and what it cost.

        The cost is that of all attempts, in all processes (align.monitoring.cost); `seconds` counts where no meter has run.
        """
        entry = self.stage(name)
        assert entry is not None, f"stage {name} was finished before it began"
        hashes = {path.name: content_hash(path) for path in outputs}
        cost = spent_on(self.path.parent, name) or {"seconds": round(seconds, 3)}
        entry |= {
            "status": "complete",
            "finished": now(),
            "seconds": cost.pop("seconds"),
            "cost": cost,
            "outputs": hashes,
            "counts": counts,
        } | more
        self._put(name, entry)

    def forget(self, name: str) -> None:
        """Take back a stage and every later one of the round (for --redo)."""
        data = self.read()
        for later in STAGES[STAGES.index(name) :]:
            data["stages"].pop(later, None)
        write_text(self.path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")

    def _put(self, name: str, entry: dict[str, Any]) -> None:
        data = self.read()
        data["stages"][name] = entry
        make_folder(self.path.parent)
        write_text(self.path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    """The versions of Python and of every package that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {_short(old)} and is now {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

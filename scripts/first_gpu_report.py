"""What the steps of `scripts/first_gpu.sh` have left in a folder in, results.json and results.md there out.

python scripts/first_gpu_report.py first-gpu
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def report(folder: Path) -> str:
    """All steps that left something, as one table and one JSON; called after every step."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.status"), key=lambda path: path.stat().st_mtime):
        code, seconds = path.read_text(encoding="utf-8").split()
        result = folder / f"{path.stem}.json"
        numbers = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
        found[path.stem] = {"exit_code": int(code), "seconds": int(seconds), "result": numbers}
    (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    lines = ["| step | exit code | s | result |", "|---|---|---|---|"]
    lines += [f"| {name} | {step['exit_code']} | {step['seconds']} | {_cell(step)} |" for name, step in found.items()]
    text = "\n".join(lines) + "\n"
    (folder / "results.md").write_text(text, encoding="utf-8")
    return text


def _cell(step: dict[str, Any]) -> str:
    result = step["result"]
    if "checks" in result:
        checks = result["checks"]
        failed = [check["name"] for check in checks if check["verdict"] == "failed"]
        return f"{len(checks)} checks, failed: {', '.join(failed) or 'none'}"
    shown = (f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, int | float))
    return result.get("left_out") or ", ".join(shown) or ("124: out of time" if step["exit_code"] == 124 else "see log")


if __name__ == "__main__":
    report(Path(sys.argv[1]))

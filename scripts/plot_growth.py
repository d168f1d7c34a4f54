"""Pictures of how cost grows, from the numbers that bench_sample.py and bench_score.py write with --json.

    python scripts/plot_growth.py sample.json sampling docs/growth-sampling.png

Left: seconds against prompt tokens at the target's K; right: against K at the target's prompt length; below the same
for memory where it was measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDES = {"ours": ("shared prefix", "#1b7f5c", "o-"), "theirs": ("stock transformers", "#b5452c", "s--")}


def value(comparison: dict[str, Any], side: str, unit: str) -> float:
    return statistics.median(comparison[f"{side}_s"]) if unit == "s" else comparison[f"{side}_mib"]


def draw(axes: Any, comparisons: list[dict[str, Any]], by: str, unit: str, clock: str) -> None:
    """One panel: both sides against `by` ("prompt" or "K"), the other held at the first comparison's value."""
    target = comparisons[0]["label"]
    other = "K" if by == "prompt" else "prompt"
    line = sorted((c for c in comparisons if c["label"][other] == target[other]), key=lambda c: c["label"][by])
    at = [c["label"][by] for c in line]
    for side, (name, colour, style) in SIDES.items():
        axes.plot(at, [value(c, side, unit) for c in line], style, color=colour, label=name)
    axes.set_xlabel("prompt tokens" if by == "prompt" else "responses K")
    axes.set_ylabel(f"{clock} seconds" if unit == "s" else "peak MiB above weights")
    axes.set_title(f"K = {target['K']}" if by == "prompt" else f"{target['prompt']} prompt tokens")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("numbers", type=Path)
    parser.add_argument("title")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    numbers = json.loads(options.numbers.read_text())
    comparisons = numbers["comparisons"]
    units = ["s", "mib"] if comparisons[0]["ours_mib"] is not None else ["s"]
    figure, panels = plt.subplots(len(units), 2, figsize=(9, 3.4 * len(units)), squeeze=False, layout="constrained")
    for unit, row in zip(units, panels, strict=True):
        for by, axes in zip(("prompt", "K"), row, strict=True):
            draw(axes, comparisons, by, unit, numbers.get("clock", "wall"))
    panels[0][0].legend()
    figure.suptitle(options.title)
    figure.savefig(options.picture, dpi=120)
    print(options.picture)


if __name__ == "__main__":
    main()

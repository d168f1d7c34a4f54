"""A round's manifests and evaluations in, the model card of its checkpoint out (README.md in its folder)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from align.config import Config
from align.evaluation.split import PARTS
from align.evaluation.table import COLUMNS, benchmark_rows, columns_of, metrics_by_round, with_interval
from align.files import write_text
from align.models.inspect import licence_of
from align.models.remote_code import whose_code
from align.monitoring.cost import Cost
from align.monitoring.format import duration
from align.run.folder import RunDir
from align.run.manifest import StageEntry
from align.run.outdated import outdated_rounds, policy_hash
from align.run.parents import parent_of
from reward.reliability import MEASURES, read_figures


def write_model_card(config: Config, number: int) -> Path:
    """Write the card of round `number`'s checkpoint from what the run directory says; called again when more is known.

    Cards of later rounds that are built on an earlier checkpoint of this round are written again, to say so.
    """
    run = RunDir(config.run_dir)
    outdated = outdated_rounds(run.rounds())
    for later in outdated:
        if later > number and (run.round(later).checkpoint / "README.md").is_file():
            _write_card(config, run, later, outdated[later])
    return _write_card(config, run, number, outdated.get(number))


def _write_card(config: Config, run: RunDir, number: int, outdated: str | None) -> Path:
    before = parent_of(run, number)
    parent = str(run.round(before).checkpoint) if before else config.policy
    path = run.round(number).checkpoint / "README.md"
    stages = run.round(number).manifest.stages()
    heading = yaml.safe_dump(_heading(config, parent), sort_keys=False).strip()
    sections = [
        f"# {config.name}, round {number}",
        _summary(stages),
        f"**Round {number} {outdated}.** Its parent cannot be looked at any more." if outdated else "",
        _lineage(config, run, number),
        _data(stages),
        _training(config, stages),
        _results(run, number),
        _cost(run, number),
        _benchmarks(run.round(number).benchmarks),
        (
            f"## Use\n\nThis folder opens where its parent opened{_code(path.parent)}. Intended for research on"
            " preference alignment; it inherits its parent's licence, biases and limits, and what its critic prefers"
            " is not a guarantee of truth."
        ),
    ]
    write_text(path, f"---\n{heading}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n")
    return path


CODE = {
    "parent": (
        "; with `trust_remote_code=True` it runs the modelling files that the parent brought, in the environment that "
        "those ask for"
    ),
    "toolkit": "; with `trust_remote_code=True` it runs the toolkit's modelling files, which need transformers 5",
    None: "",
}


def _code(folder: Path) -> str:
    """Whose modelling files are in the folder, as the end of a sentence."""
    return CODE[whose_code(folder)] if (folder / "config.json").is_file() else ""


def _summary(stages: dict[str, StageEntry]) -> str:
    """What was done to the parent, as this round's manifest tells it."""
    pairs = (
        "the policy answered image questions several times, a critic judged the answers, and DPO trained"
        if "sample" in stages
        else "DPO trained"
    )
    on = "on the resulting preference pairs" if "sample" in stages else "on existing preference pairs (off-policy)"
    return f"A vision-language model aligned by iterative DPO: {pairs} {_trained(stages.get('dpo'))} {on}."


def _trained(dpo: StageEntry | None) -> str:
    settings = dpo.settings.get("dpo", {}) if dpo else {}
    lora = settings.get("lora")
    frozen = ", ".join(map(str, settings.get("freeze") or ()))
    if lora is not None:
        how = ", ".join(f"{name} {lora[key]}" for key, name in (("r", "rank"), ("lora_alpha", "alpha")) if key in lora)
        kind = "QLoRA" if lora.get("quantize") else "LoRA"
        where = f", none in {frozen}" if frozen else ""
        return f"an adapter ({kind}{', ' + how if how else ''}{where}), merged into the weights,"
    return f"the model but for its frozen parts ({frozen})" if frozen else "the full model"


def _heading(config: Config, parent: str) -> dict[str, Any]:
    heading: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    licence = licence_of(parent)
    if licence:
        heading["license"] = licence
    if not Path(config.policy).exists():
        heading["base_model"] = config.policy
    return heading | {"tags": ["dpo", "valley-align", "trl"]}


def lineage_of(checkpoint: str | Path) -> str | None:
    """What the checkpoint's own card says of its lineage, as Markdown without the heading;
    None where it says nothing."""
    card = Path(checkpoint) / "README.md"
    if not card.is_file():
        return None
    _, heading, rest = card.read_text(encoding="utf-8", errors="replace").partition("\n## Lineage\n")
    return rest.split("\n## ")[0].strip() if heading else None


def _lineage(config: Config, run: RunDir, number: int) -> str:
    rows = ["## Lineage", "", "| round | parent (sha256) | questions | pairs | seed |", "|---|---|---|---|---|"]
    chain = [number]
    while before := parent_of(run, chain[-1]):
        chain.append(before)
    for earlier in reversed(chain):
        stages = run.round(earlier).manifest.stages()
        sample, pairs = stages.get("sample"), stages.get("pairs")
        parent = (policy_hash(stages) or "")[:16]
        counts = [sample.counts.get("questions", "") if sample else "", pairs.counts.get("pairs", "") if pairs else ""]
        rows.append(f"| {earlier} | `{parent}` | {counts[0]} | {counts[1]} | {config.seed} |")
    name = config.policy if not Path(config.policy).exists() else Path(config.policy).name
    return "\n".join([*rows, "", f"First policy: `{name}`."])


def _data(stages: dict[str, StageEntry]) -> str:
    lines = ["## Data and critic", ""]
    for stage in ("sample", "score"):
        for name, digest in (stages[stage].inputs if stage in stages else {}).items():
            lines.append(f"* {name}: sha256 `{digest[:16]}`")
    if "score" in stages:
        lines.append(f"* critic: {json.dumps(stages['score'].settings.get('critic'))}")
        for name, figure in read_figures(stages["score"].counts.get("critic")).items():
            counted = f"{figure.count} {MEASURES[name].counted}" if name in MEASURES else str(figure.count)
            lines.append(f"* critic, {name.replace('_', ' ')}: {figure.value:.3g} ({counted})")
    return "\n".join(lines)


def _training(config: Config, stages: dict[str, StageEntry]) -> str:
    entry = stages.get("dpo")
    settings = entry.settings if entry else config.dpo.model_dump(mode="json")
    lines = ["## Training", "", "```json", json.dumps(settings, indent=2, default=str), "```"]
    effective = (entry.model_extra or {}).get("training") if entry else None
    if effective:
        lines += [
            "",
            "In effect, defaults with them:",
            "",
            "```json",
            json.dumps(effective, indent=2, default=str),
            "```",
        ]
    if entry and entry.versions:
        lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in entry.versions.items()) + "."]
    return "\n".join(lines)


def _results(run: RunDir, number: int) -> str:
    rounds = {key: value for key, value in metrics_by_round(run.path).items() if key <= number}
    names = columns_of(rounds.values())
    if not rounds or not names:
        return ""
    rows = ["## Results on held-out questions (95 % intervals)", ""]
    rows += [
        "| round | questions | " + " | ".join(COLUMNS[name] for name in names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for key, metrics in rounds.items():
        cells = [with_interval(name, metrics.get(name)) for name in names]
        count = max((interval.count for interval in metrics.values()), default=0)
        rows.append(f"| {key} | {count} | " + " | ".join(cells) + " |")
    evaluated = run.round(number).manifest.stage("evaluate")
    if evaluated is None:
        return "\n".join(rows)
    notes, chosen = evaluated.notes, evaluated.selected
    if "kl" in notes:
        rows += ["", f"KL divergence from the first policy: {notes['kl']}."]
    if PARTS in notes:
        rows += ["", f"{notes[PARTS]}: the table has the latter."]
    if chosen is not None:
        rows += ["", f"Best of the rounds up to this one: {chosen.why}."]
    return "\n".join(rows)


def _cost(run: RunDir, number: int) -> str:
    """What every stage up to this round took, all processes and attempts together."""
    rows, total = [], Cost()
    for this in run.rounds():
        for stage, entry in this.manifest.stages().items():
            cost = entry.cost
            if this.number > number or "device" not in cost:
                continue
            spent = Cost.of(cost | {"seconds": entry.seconds})
            total += spent
            device = f"{cost['num_processes']} x {cost['device']}"
            device += ", and servers" if "servers" in entry.notes else ""
            rows.append(f"| {this.number} | {stage} | {_spent(spent)} | {device} |")
    if not rows:
        return ""
    names = ["round", "stage", "time", "tokens read", "tokens written", "GPU hours", "CPU hours", "on"]
    head = ["## Cost", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*head, *rows, f"| | all | {_spent(total)} | |"])


def _spent(spent: Cost) -> str:
    tokens = [f"{spent.tokens_read:,}", f"{spent.tokens_written:,}"]
    hours = [f"{seconds / 3600:,.3f}" for seconds in (spent.gpu_seconds, spent.cpu_seconds)]
    return " | ".join([duration(spent.seconds), *tokens, *hours])


def _benchmarks(path: Path) -> str:
    if not path.is_file():
        return ""
    rows = ["## Benchmarks (lmms-eval)", "", "| task | metric | value | standard error | documents |", "|---" * 5 + "|"]
    for row in benchmark_rows(json.loads(path.read_text(encoding="utf-8"))):
        rows.append(f"| {row.task} | {row.metric} | {row.value} | {row.stderr} | {row.documents} |")
    return "\n".join(rows)

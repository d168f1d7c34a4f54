"""Everything that was read and measured in, one HTML file out.

All that comes from a run (questions, responses, rationales, names) is untrusted text. It is escaped by the templates,
and the page forbids itself to load or run anything but what it was written with (Content-Security-Policy). The file
depends on the run alone: writing it twice gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from align.errors import UserError
from align.files import make_folder, write_text
from align.report import funnel, metrics
from align.report.by_category import by_category
from align.report.changes import Change, history
from align.report.critic_quality import critic_figures
from align.report.critic_quality import rows as critic_rows
from align.report.examples import letter, marks, pick_examples
from align.report.facts import run_facts
from align.report.leaks import find_leaks
from align.report.metrics import Metric
from align.report.read import RoundData, RunData, read_run
from align.report.thumbnails import Pictures
from align.report.training_curves import ENDING_KEYS, endings, held_out_figures, published_source, training_figures
from align.report.verdict import judge
from align.report.warnings import find_warnings
from align.run.folder import RunDir
from align.run.stages import STAGES

TEMPLATES = Path(__file__).with_name("templates")


def write_report(
    run: Path,
    *,
    control: Path | None = None,
    image_root: Path | None = None,
    evaluation_image_root: Path | None = None,
    out: Path | None = None,
    max_held_out: int = 60,
    max_training: int = 40,
    reference_curve: bool = True,
) -> Path:
    """Write the report of a run, finished or not, and return its path (default: report.html in the run's folder).

    `control` is another run whose curves stand beside this one's. The image roots default to those of the run's
    configuration. At most `max_held_out` and `max_training` questions are embedded with their images. `reference_curve`
    adds the published curves of Valley2-DPO, which the reader can switch on behind the training curves.

    Raises:
        UserError: `run` or `control` is not a run directory, or the file cannot be written.
    """
    data = read_run(run)
    beside = read_run(control) if control is not None else None
    page = render(
        data,
        beside,
        question_images=_pictures_by_round(data, image_root),
        evaluation_images=Pictures(evaluation_image_root or data.evaluation_images),
        max_held_out=max_held_out,
        max_training=max_training,
        reference_curve=reference_curve,
    )
    path = out or RunDir(run).report
    make_folder(path.parent)
    try:
        write_text(path, page)
    except OSError as error:
        raise UserError(f"the report cannot be written ({error.strerror})", where=str(path)) from None
    return path


def render(
    run: RunData,
    control: RunData | None,
    *,
    question_images: Callable[[RoundData], Pictures],
    evaluation_images: Pictures,
    max_held_out: int,
    max_training: int,
    reference_curve: bool,
) -> str:
    """The page as text."""
    critics = {data.number: critic_figures(data) for data in run.trained}
    changes = history(run)
    figures = held_out_figures(run, changes, control)
    examples = pick_examples(
        run,
        question_images=question_images,
        evaluation_images=evaluation_images,
        max_held_out=max_held_out,
        max_training=max_training,
    )
    costs = funnel.costs(run)
    warnings = find_warnings(run, changes, critics, find_leaks(run, evaluation_images.root))
    critics = {number: found for number, found in critics.items() if found}
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    return environment().get_template("report.html.j2").render(
        run=run,
        control=control,
        verdict=judge(run, changes, control, critics),
        figures=figures,
        steps=_table_of_steps([changes.steps.get(figure.metric.name, []) for figure in figures if not figure.quiet]),
        by_category=by_category(run),
        training=training_figures(run, reference_curve=reference_curve),
        endings=endings(run),
        ending_names=list(ENDING_KEYS.values()),
        published_source=published_source(),
        critics=critics,
        critic_rows=critic_rows(critics),
        funnels=funnel.funnels(run),
        costs=costs,
        stages=[stage for stage in STAGES if any(cost.stage == stage for cost in costs)],
        gpu_hours=_total(cost.gpu_hours for cost in costs),
        cpu_hours=_total(cost.cpu_hours for cost in costs),
        tokens_read=_total(cost.tokens_read for cost in costs),
        tokens_written=_total(cost.tokens_written for cost in costs),
        kl_note=_kl_left_out(run),
        warnings=warnings,
        facts=run_facts(run),
        examples=examples,
        written=max((time for data in run.rounds for it in data.stages.values() if (time := it.written)), default=None),
        versions=_versions(run),
        problems=list(dict.fromkeys(run.problems + (control.problems if control else []))),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )  # fmt: skip


def _pictures_by_round(run: RunData, image_root: Path | None) -> Callable[[RoundData], Pictures]:
    """The images of a round's questions: in the folder named, else where the round itself found them."""

    @cache
    def in_folder(root: Path | None) -> Pictures:
        return Pictures(root)

    def of(data: RoundData) -> Pictures:
        noted = data.images_of("sample")
        return in_folder(image_root or (noted if noted is not None and noted.is_dir() else run.question_images))

    return of


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _table_of_steps(rows: list[list[Change]]) -> tuple[list[tuple[int, int]], list[tuple[Metric, list[Change | None]]]]:
    """The steps (from round, to round) that any number has, and each number's changes in them."""
    columns = sorted({(step.first_round, step.last_round) for row in rows for step in row})
    by_step = [{(step.first_round, step.last_round): step for step in row} for row in rows if row]
    return columns, [(next(iter(row.values())).metric, [row.get(column) for column in columns]) for row in by_step]


def _kl_left_out(run: RunData) -> str | None:
    """Why a round that was evaluated has no distance from the first policy."""
    notes = [str(data.stages["evaluate"].notes.get("kl", "")) for data in run.trained if "evaluate" in data.stages]
    return next((note for note in notes if note.startswith("left out")), None)


def _versions(run: RunData) -> dict[str, str]:
    """Of the last stage that says."""
    found = [stage.versions for data in run.rounds for stage in data.stages.values() if stage.versions]
    return found[-1] if found else {}


@cache
def environment() -> Environment:
    """Templates that escape everything; text is also freed of characters that no HTML file may hold."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {"letter": letter, "marks": marks, "points": _points}
    found.filters |= {
        "percent": metrics.percent,
        "plain": metrics.plain,
        "count": lambda value: f"{value:,.0f}",
        "duration": funnel.duration,
        "hours": funnel.hours,
    }
    found.filters["shorten_paths"] = shorten_paths
    return found


def _points(value: float) -> str:
    return metrics.metric("greedy_accuracy").show_change(value)


def shorten_paths(text: str) -> str:
    """Absolute paths by their last two names: a report is handed on, and where somebody keeps files is theirs.

    >>> shorten_paths("policy: /home/ann/models/eagle  # see http://host/a/b/c")
    'policy: …/models/eagle  # see http://host/a/b/c'
    """
    return _PATH.sub(r"…/\1", text)


_PATH = re.compile(r"""(?<![^\s'"])/(?:[^/\s'"]+/)+([^/\s'"]+/[^/\s'"]+)""")


def printable(value: Any) -> Any:
    """Text without control characters (shown as their pictures) and lone surrogates (which no file can hold).

    >>> printable("a\\x00b"), printable("caf\\ud800"), printable("next\\x85line") == "next" + chr(10) + "line"
    ('a␀b', 'caf\ufffd', True)
    """
    if not isinstance(value, str):
        return value
    clean = _BAD.sub(lambda match: _picture(match.group()), str(value))
    return Markup(clean) if isinstance(value, Markup) else clean


_BAD = re.compile("\r\n?|[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def _picture(bad: str) -> str:
    if bad[0] in "\r\x85":
        return "\n"
    if bad == "\x7f":
        return "␡"
    return chr(0x2400 + ord(bad)) if ord(bad) < 0x20 else "\ufffd"

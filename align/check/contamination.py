"""`align check`: the data of a run in; what is wrong with its images, and what comes near to evaluation images, out.

Near by perceptual hash always, by cosine of embeddings where a vision tower is named. Valley2.5 trained without the
images near to its benchmarks and lost nothing; with a tenth of them it lost 1.5 points.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.config import Config
from align.data.duplicates import Duplicates
from align.data.entry import BadRow
from align.data.evaluation import EvaluationImages, evaluation_images
from align.data.fingerprint import MAX_BITS, near_pairs, stack
from align.data.pictures import Picture, PictureStore
from align.errors import UserError
from align.log import log
from align.media.images import question_images
from align.records import Pair, Question, Record, iter_jsonl, write_jsonl
from align.sources import read_all_questions

MIN_COSINE = 0.9
MIN_SIDE = 28


@dataclass(frozen=True)
class Near:
    """An image of the data that comes near to an evaluation image: by `bits` of 128 that differ, or by `cosine`."""

    image: str
    evaluation_image: str
    evaluation_question: str
    bits: int | None = None
    cosine: float | None = None


@dataclass
class CheckReport:
    """What was found in the data; `bad_images` and `near` are by image."""

    records: int = 0
    images: int = 0
    same_pictures: int = 0
    bad_images: dict[str, str] = field(default_factory=dict)
    bad_reasons: dict[str, int] = field(default_factory=dict)
    near: list[Near] = field(default_factory=list)
    near_records: int = 0

    def as_dict(self) -> dict[str, Any]:
        """By the names of the fields."""
        return asdict(self)


def run_check(
    config: Config,
    *,
    against: Path | None = None,
    against_root: Path | None = None,
    tower: str | None = None,
    max_bits: int = MAX_BITS,
    min_cosine: float = MIN_COSINE,
    write: Path | None = None,
) -> CheckReport:
    """Check the run's questions (or its pairs file). `write` gets the records with no bad and no near image.

    Raises:
        UserError: a file is not what it must be, or the tower cannot be opened.
    """
    if against is None and config.evaluate.questions is not None:
        against, against_root = config.evaluate.questions, config.evaluation_images
    records = _records(config)
    report = CheckReport(records=len(records))
    pictures = _look(records, config, report)
    if against is not None:
        evaluation = evaluation_images(against, against_root)
        report.near = _near_by_hash(pictures, evaluation, max_bits)
        if tower is not None:
            report.near += _near_by_tower(pictures, evaluation, config, tower, min_cosine)
    elif tower is not None:
        raise UserError("--tower needs something to compare with", fix="name evaluation questions with --against")
    unwanted = report.bad_images.keys() | {near.image for near in report.near}
    left = [record for record in records if not unwanted.intersection(record.images)]
    near = {near.image for near in report.near}
    report.near_records = sum(bool(near.intersection(record.images)) for record in records)
    if write is not None:
        write_jsonl(write, left)
    return report


def report_text(report: CheckReport, *, shown: int = 10) -> str:
    """The report as a person reads it."""
    lines = [f"{report.records} records with {report.images} different images"]
    if report.same_pictures:
        lines.append(f"{report.same_pictures} images show nearly the same as an earlier one")
    lines += [f"{count} images: {reason}" for reason, count in report.bad_reasons.items()]
    lines += [f"  {image}: {problem}" for image, problem in list(report.bad_images.items())[:shown]]
    if report.near:
        lines.append(f"{report.near_records} records have an image near to an evaluation image")
        for near in report.near[:shown]:
            how = f"{near.bits} of 128 bits differ" if near.bits is not None else f"cosine {near.cosine:.3f}"
            lines.append(f"  {near.image} ~ {near.evaluation_image} (question {near.evaluation_question}; {how})")
    return "\n".join(lines)


def save_report(report: CheckReport, path: Path) -> None:
    """Write everything that was found as JSON."""
    path.write_text(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _records(config: Config) -> Sequence[Question | Pair]:
    if config.questions is not None:
        return read_all_questions(config)
    assert config.pairs_file is not None
    return list(iter_jsonl(config.pairs_file, Pair))


def _look(records: Sequence[Record], config: Config, report: CheckReport) -> list[Picture]:
    """Open every image once; what cannot be used goes into the report."""
    store = PictureStore(config.question_images, config.question_images, min_side=MIN_SIDE)
    pictures: dict[str, Picture] = {}
    for record in records:
        for reference in record.images:  # type: ignore[attr-defined]
            if reference in pictures or reference in report.bad_images:
                continue
            try:
                pictures[reference] = store.take(reference)
            except BadRow as problem:
                report.bad_images[reference] = str(problem)
                report.bad_reasons[problem.reason] = report.bad_reasons.get(problem.reason, 0) + 1
    report.images = len(pictures) + len(report.bad_images)
    found = list(pictures.values())
    duplicates = Duplicates()
    report.same_pictures = sum(duplicates.seen([], (picture,)) for picture in found)
    return found


def _near_by_hash(pictures: Sequence[Picture], evaluation: EvaluationImages, max_bits: int) -> list[Near]:
    prints = stack([picture.print for picture in pictures])
    return [
        Near(pictures[i].reference, evaluation.pictures[j].reference, evaluation.questions[j], bits=bits)
        for i, j, bits in near_pairs(prints, evaluation.prints, max_bits=max_bits)
    ]


def _near_by_tower(
    pictures: Sequence[Picture], evaluation: EvaluationImages, config: Config, tower: str, min_cosine: float
) -> list[Near]:
    from align.engines.image_embeddings import open_image_embedder

    embed = open_image_embedder(tower, config.model)
    images = question_images(config)
    log.info("embedding %d and %d images", len(pictures), len(evaluation.pictures))
    ours = embed(images.open(picture.reference) for picture in pictures)
    theirs = embed(evaluation.images.open(picture.reference) for picture in evaluation.pictures)
    found = []
    for start in range(0, len(ours), 1024):
        cosines = ours[start : start + 1024] @ theirs.T
        for i, j in zip(*np.nonzero(cosines >= min_cosine), strict=True):
            found.append(
                Near(
                    pictures[start + i].reference,
                    evaluation.pictures[j].reference,
                    evaluation.questions[j],
                    cosine=round(float(cosines[i, j]), 4),
                )
            )
    return found

"""The question files of a configuration in; all questions, and those of a round by weight or limit, out.

With several sources a question's id begins with its source's name (`vqa/q1`), and its images count from the folder that
all image roots lie in; so what follows (samples, pairs, images, report) knows one folder and distinct ids. One file is
taken as it stands.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Sequence

from align.config import Config, Source
from align.errors import UserError
from align.records import Question, read_questions


def read_all_questions(config: Config) -> list[Question]:
    """The questions of all sources, in order.

    Raises:
        UserError: there are none, two of a file share an id, or an image lies outside of its source's image root.
    """
    return [question for source in config.sources for question in read_source(config, source)]


def questions_of_round(config: Config, number: int) -> list[Question]:
    """The questions of a round, source after source: the next ones of each in file order, then from the start.

    Raises:
        UserError: as `read_all_questions`; or there are fewer places in a round than limits take.
    """
    by_source = [read_source(config, source) for source in config.sources]
    shares = shares_of_round(config.sources, list(map(len, by_source)), config.sample.questions_per_round)
    return [
        question
        for questions, share in zip(by_source, shares, strict=True)
        for question in round_questions(questions, number, share)
    ]


def read_source(config: Config, source: Source) -> list[Question]:
    """The questions of one source, as they are known in the run."""
    questions = read_questions(source.file)
    if len(config.sources) == 1:
        return questions
    folder = config.image_root_of(source).resolve().relative_to(config.question_images).as_posix()
    return [_named(question, source, folder) for question in questions]


def round_questions(questions: list[Question], number: int, per_round: int | None) -> list[Question]:
    """The questions of a round: the next `per_round` in file order, starting over when all are used.

    >>> questions = [Question(id=str(i), question="?") for i in range(5)]
    >>> [[q.id for q in round_questions(questions, n, 2)] for n in (1, 2, 3)]
    [['0', '1'], ['2', '3'], ['4', '0']]
    """
    if per_round is None or per_round >= len(questions):
        return questions
    start = (number - 1) * per_round
    return [questions[(start + index) % len(questions)] for index in range(per_round)]


def shares_of_round(sources: Sequence[Source], sizes: Sequence[int], per_round: int | None) -> list[int]:
    """How many questions each source of these sizes gives to a round.

    A source with a limit gives that many (all it has, where those are fewer); the others share what is left of
    `per_round` by weight, none more than it has. Without `per_round` they give all they have.

    >>> a, b, c = Source(file="a", weight=3), Source(file="b"), Source(file="c", limit=10)
    >>> shares_of_round([a, b, c], [1000, 1000, 1000], 110), shares_of_round([a, b, c], [30, 1000, 1000], 110)
    ([75, 25, 10], [30, 70, 10])
    >>> shares_of_round([a, c], [1000, 5], None)
    [1000, 5]
    """
    shares = [min(size, source.limit) if source.limit else 0 for source, size in zip(sources, sizes, strict=True)]
    open_ = [place for place, source in enumerate(sources) if not source.limit]
    if per_round is None:
        return [sizes[place] if place in open_ else shares[place] for place in range(len(sources))]
    left = per_round - sum(shares)
    if left < 0 or (open_ and left == 0):
        raise UserError(
            f"the limits of the sources take {sum(shares)} questions, and a round has {per_round}",
            fix="raise sample.questions_per_round, or lower the limits",
        )
    while open_ and left:
        parts = _by_weight(left, [sources[place].weight for place in open_])
        full = [place for place, part in zip(open_, parts, strict=True) if part >= sizes[place]]
        for place, part in zip(open_, parts, strict=True):
            if not full:
                shares[place] = part
            elif place in full:
                shares[place] = sizes[place]
        left = per_round - sum(shares) if full else 0
        open_ = [place for place in open_ if place not in full]
    return shares


def count_by_source(names: Sequence[str | None]) -> dict[str, int]:
    """How many there are of each source; empty where there is one file."""
    return dict(Counter(name for name in names if name is not None))


def _by_weight(total: int, weights: Sequence[float]) -> list[int]:
    """Whole parts of a total, the largest remainders rounded up, the first of equal ones first.

    >>> _by_weight(10, [1, 1, 1])
    [4, 3, 3]
    """
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(value) for value in exact]
    for place in sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])[: total - sum(parts)]:
        parts[place] += 1
    return parts


def _named(question: Question, source: Source, folder: str) -> Question:
    """The question with its source in its id, and its images counted from the folder of all sources."""

    def inside(reference: str) -> str:
        if "://" in reference or reference.startswith("data:"):
            return reference  # refused where images are opened, with what to do
        found = posixpath.normpath(reference)
        if found.startswith(("../", "/")) or found == "..":
            raise UserError(
                f"the image {reference[:200]!r} of question {question.id!r} lies outside of its source's image root",
                where=str(source.file),
                fix=f"move it, or set image_root of the source {source.label}",
            )
        return posixpath.normpath(posixpath.join(folder, reference))

    return question.model_copy(
        update={
            "id": f"{source.label}/{question.id}",
            "images": [inside(reference) for reference in question.images],
            "video": None if question.video is None else inside(question.video),
            "source": source.label,
        }
    )

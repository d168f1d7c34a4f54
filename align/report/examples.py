"""A run in, the questions that the report embeds out: images, responses of every round, verdicts.

Held-out questions are picked evenly from the four ways a question can go (gained, lost, stayed right, stayed wrong), so
that every filter shows something; training questions are spread evenly over the rounds and their files. The report
says how many of how many it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from align.media.images import ImageStore
from align.records import Evaluated, Evaluation, Pair, Question, Samples
from align.report.read import RoundData, RunData, find_records, list_ids
from align.report.thumbnails import Pictures
from reward.critics.verifier import is_correct
from reward.judgement import Judgement, Verdict

KINDS = ("gained", "lost", "stayed wrong", "stayed right", "open")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_TABLE = 8
ROLES = ("chosen", "rejected", "")
MAX_RATIONALES = 24
MAX_PICTURES = 6


@dataclass(frozen=True)
class Picture:
    reference: str
    uri: str | None


@dataclass(frozen=True)
class Pictured:
    """Some of a question's images; `about` says which, where they are not all, or frames of a video."""

    shown: list[Picture]
    about: str = ""
    frames: bool = False


@dataclass(frozen=True)
class HeldOut:
    """A held-out question with each round's responses; `kind` tells how the greedy response went, first to last."""

    question: Question
    kind: str
    rounds: list[tuple[int, Evaluation]]
    pictures: Pictured


@dataclass(frozen=True)
class Candidate:
    """One response to a training question and what became of it; `role` is chosen, rejected or empty."""

    letter: str
    text: str
    num_tokens: int
    truncated: bool
    correct: bool | None
    reward: float | None
    role: str
    unscored: str | None


@dataclass(frozen=True)
class Trained:
    """A training question in one round.

    `table` holds the verdicts by (shown first, shown second) when it fits; `rationales` are some of the verdicts that
    have one, those about chosen and rejected first, of `num_rationales`. Where the candidates are too many for a table,
    chosen and rejected come first, the others by reward.
    """

    question: Question
    number: int
    candidates: list[Candidate]
    table: list[list[Verdict | None]]
    rationales: list[Verdict]
    num_rationales: int
    num_verdicts: int
    pictures: Pictured
    margin: float | None = None


@dataclass
class Examples:
    """`totals` and `shown` count held-out questions by kind; `num_training` all sampled questions of all rounds."""

    held_out: list[HeldOut] = field(default_factory=list)
    training: list[Trained] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)
    shown: dict[str, int] = field(default_factory=dict)
    num_held_out: int = 0
    num_training: int = 0
    missing: list[str] = field(default_factory=list)


def pick_examples(
    run: RunData,
    *,
    question_images: Callable[[RoundData], Pictures],
    evaluation_images: Pictures,
    max_held_out: int,
    max_training: int,
) -> Examples:
    """The questions to embed; `question_images` opens the images of a round's questions."""
    examples = Examples()
    _add_held_out(examples, run, evaluation_images, max_held_out)
    _add_training(examples, run, question_images, max_training)
    for pictures in {id(found): found for found in [evaluation_images, *map(question_images, run.trained)]}.values():
        examples.missing += [f"{count} × {reason}" for reason, count in pictures.missing.most_common()]
    return examples


def _add_held_out(examples: Examples, run: RunData, pictures: Pictures, most: int) -> None:
    rounds = [data for data in run.rounds if data.lines]
    if not rounds:
        return
    tables = [(data.number, {line.id: line for line in data.lines}) for data in rounds]
    ids = list(dict.fromkeys(line.id for data in rounds for line in data.lines))
    by_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for id_ in ids:
        by_kind[_kind([table[id_] for _, table in tables if id_ in table])].append(id_)
    picked = set(share_out(by_kind, most))
    examples.num_held_out = len(ids)
    examples.totals = {kind: len(members) for kind, members in by_kind.items() if members}
    examples.shown = {kind: sum(id_ in picked for id_ in members) for kind, members in by_kind.items() if members}
    kinds = {id_: kind for kind, members in by_kind.items() for id_ in members}
    for id_ in ids:
        if id_ in picked:
            lines = [(number, table[id_]) for number, table in tables if id_ in table]
            question = lines[-1][1].question
            examples.held_out.append(HeldOut(question, kinds[id_], lines, picture(question, pictures)))


def _kind(lines: Sequence[Evaluation]) -> str:
    first, last = lines[0].greedy.correct, lines[-1].greedy.correct
    if first is None or last is None:
        return "open"
    if first == last:
        return "stayed right" if last else "stayed wrong"
    return "gained" if last else "lost"


def share_out(groups: dict[str, list[str]], most: int) -> list[str]:
    """At most `most` members, taken in turn from every group in order, so that small groups come whole.

    >>> share_out({"a": ["1", "2", "3", "4"], "b": ["5"]}, 3)
    ['1', '5', '2']
    """
    picked: list[str] = []
    longest = max((len(members) for members in groups.values()), default=0)
    for rank in range(longest):
        picked += [members[rank] for members in groups.values() if rank < len(members)]
    return picked[:most]


def spread(items: Sequence[str], most: int) -> list[str]:
    """At most `most` items, evenly spaced.

    >>> spread(["a", "b", "c", "d", "e", "f"], 3)
    ['a', 'c', 'e']
    """
    if len(items) <= most:
        return list(items)
    return [items[index * len(items) // most] for index in range(most)]


def _add_training(examples: Examples, run: RunData, pictures: Callable[[RoundData], Pictures], most: int) -> None:
    rounds = [data for data in run.trained if data.folder.samples.is_file()]
    left = most
    for index, data in enumerate(rounds):
        ids = list_ids(data.folder.samples)
        examples.num_training += len(ids)
        quota = left // (len(rounds) - index)
        wanted = spread(ids, quota)
        left -= len(wanted)
        examples.training += _trained(data, wanted, pictures(data), run.problems)


def _trained(data: RoundData, ids: list[str], pictures: Pictures, problems: list[str]) -> list[Trained]:
    wanted = set(ids)
    if not wanted:
        return []
    samples = {line.id: line for line in find_records(data.folder.samples, Samples, wanted, problems)}
    scores = {line.id: line for line in find_records(data.folder.scores, Judgement, wanted, problems)}
    pairs: dict[str, list[Pair]] = {}
    for pair in find_records(data.folder.pairs, Pair, wanted, problems, key="question_id"):
        pairs.setdefault(pair.question_id or pair.id, []).append(pair)
    return [
        _join(data.number, samples[id_], scores.get(id_), pairs.get(id_, []), pictures) for id_ in ids if id_ in samples
    ]


def _join(number: int, line: Samples, scores: Judgement | None, pairs: list[Pair], pictures: Pictures) -> Trained:
    roles = {}
    for pair in pairs:
        for role in ("rejected", "chosen"):
            if role in pair.responses:
                roles[pair.responses[role]] = role
    candidates = []
    for index, response in enumerate(line.responses):
        rewards = scores.rewards if scores else []
        candidates.append(
            Candidate(
                letter=letter(index),
                text=response.text,
                num_tokens=response.num_tokens,
                truncated=response.finish_reason == "length",
                correct=_correct(response.text, line.question),
                reward=rewards[index] if index < len(rewards) else None,
                role=roles.get(index, ""),
                unscored=scores.unscored.get(index) if scores else None,
            )
        )
    verdicts = scores.verdicts if scores else []
    spoken = [verdict for verdict in verdicts if verdict.rationale]
    table = verdict_table(len(candidates), verdicts)
    if len(candidates) > MAX_TABLE:
        candidates.sort(key=lambda candidate: (ROLES.index(candidate.role), -(candidate.reward or 0.0)))
    return Trained(
        question=line.question,
        number=number,
        candidates=candidates,
        table=table,
        rationales=sorted(spoken, key=lambda verdict: -(verdict.first in roles) - (verdict.second in roles))[
            :MAX_RATIONALES
        ],
        num_rationales=len(spoken),
        num_verdicts=len(verdicts),
        pictures=picture(line.question, pictures),
        margin=pairs[0].margin if pairs else None,
    )


def _correct(text: str, question: Question) -> bool | None:
    if question.answer is None:
        return None
    return is_correct(text, question.answer, question=question.question, kind=question.answer_kind)


def letter(index: int) -> str:
    """A, B, C ... for responses."""
    return LETTERS[index] if index < len(LETTERS) else str(index + 1)


def verdict_table(size: int, verdicts: Iterable[Verdict]) -> list[list[Verdict | None]]:
    """Verdicts by (shown first, shown second); empty when there are none or too many responses for a table."""
    table: list[list[Verdict | None]] = [[None] * size for _ in range(size)]
    any_verdict = False
    for verdict in verdicts:
        if 0 <= verdict.first < size and 0 <= verdict.second < size:
            table[verdict.first][verdict.second] = verdict
            any_verdict = True
    return table if any_verdict and size <= MAX_TABLE else []


def marks(responses: Sequence[Evaluated]) -> str:
    """How many of the responses are right, in words; empty where there is no reference answer."""
    known = [response.correct for response in responses if response.correct is not None]
    return f"{sum(known)} of {len(known)} right" if known else ""


def picture(question: Question, pictures: Pictures) -> Pictured:
    """The first few of a question's images; of a video's frames some from its first to its last."""
    references, video = question.images, question.meta.get("video")
    frames = len(references) > 1 and all(ImageStore.is_frame(reference) for reference in references)
    if frames and len(references) > MAX_PICTURES:
        references = [references[round(i * (len(references) - 1) / (MAX_PICTURES - 1))] for i in range(MAX_PICTURES)]
    shown = [Picture(reference, pictures.uri(reference)) for reference in references[:MAX_PICTURES]]
    about = f"{len(shown)} of {len(question.images)} " if len(shown) < len(question.images) else ""
    if frames:
        about = f"{about or len(shown)} frames".replace("  ", " ") + (f" of {video}" if isinstance(video, str) else "")
    elif about:
        about += "images"
    return Pictured(shown, about, frames)

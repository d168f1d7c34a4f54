"""Which responses meet next: the matches played so far in, the matches to play now out (none: it is over).

A match is an unordered pair `(i, j)` that the critic judges in both orders; its result is what `i` gained minus what
`j` gained, or None where a judgement failed. All is a pure function of the results, so rounds of many items can be
asked together.

Matches for n = 5: all pairs 10, Swiss at most 8 (4 rounds), knock-out 6. For n = 16: 120, 40 (5 rounds), 22. Knock-out
finds best and worst only; what it says about the order between them is coarse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

Match = tuple[int, int]
Results = Mapping[Match, float | None]

PAIRINGS = ("all", "swiss", "knockout")


def next_matches(pairing: str, order: Sequence[int], results: Results, *, rounds: int | None = None) -> list[Match]:
    """The matches to play now. `order` is the starting order (shuffled by the caller); `rounds` is for Swiss only.

    >>> next_matches("all", [0, 1, 2], {})
    [(0, 1), (0, 2), (1, 2)]
    >>> next_matches("knockout", [0, 1, 2, 3], {(0, 1): 2.0, (2, 3): -2.0})
    [(0, 3), (1, 2)]
    """
    assert pairing in PAIRINGS
    if pairing == "all":
        return [match for match in combinations(sorted(order), 2) if match not in results]
    if pairing == "swiss":
        return _swiss(list(order), results, rounds or swiss_rounds(len(order)))
    return _knockout(list(order), results)


def swiss_rounds(num_responses: int) -> int:
    """Rounds of a Swiss tournament: enough to single out a winner and one more to sort the rest.

    >>> [swiss_rounds(n) for n in (2, 3, 5, 16)]
    [1, 2, 4, 5]
    """
    return min(num_responses - 1, (num_responses - 1).bit_length() + 1)


def gain(results: Results, one: int, other: int) -> float:
    """What `one` gained over `other` in their match (0 if it failed)."""
    result = results[_match(one, other)] or 0.0
    return result if one < other else -result


def _match(one: int, other: int) -> Match:
    return (one, other) if one < other else (other, one)


def _swiss(order: list[int], results: Results, rounds: int) -> list[Match]:
    """Neighbours in the table meet unless they have met; with an odd number the lowest that had none has a bye.

    It is over early when not everybody can be paired with somebody new.
    """
    points = dict.fromkeys(order, 0.0)
    met: set[Match] = set()
    rested: set[int] = set()
    # Up to half of n rounds new opponents are sure to be there (Dirac); beyond, only small fields are searched quickly.
    for _ in range(min(rounds, max(swiss_rounds(len(order)), len(order) // 2))):
        table = sorted(order, key=lambda index: -points[index])
        matches = _swiss_round(table, met, rested)
        new = [match for match in matches if match not in results]
        if new or not matches:
            return sorted(new)
        rested |= set(order) - {index for match in matches for index in match}
        for one, other in matches:
            points[one] += gain(results, one, other)
            points[other] -= gain(results, one, other)
            met.add(_match(one, other))
    return []


def _swiss_round(table: list[int], met: set[Match], rested: set[int]) -> list[Match]:
    if len(table) % 2 == 0:
        return _new_matches(table, met) or []
    for resting in [*_upwards(table, without=rested), *_upwards(table, without=set(table) - rested)]:
        matches = _new_matches([index for index in table if index != resting], met)
        if matches:
            return matches
    return []


def _upwards(table: list[int], *, without: set[int]) -> list[int]:
    return [index for index in reversed(table) if index not in without]


def _new_matches(table: list[int], met: set[Match]) -> list[Match] | None:
    """Pair all of the table (even in number), each with the nearest possible;
    None if they cannot all meet somebody new.

    The search goes back where the last two have met already. In the few rounds of a Swiss tournament that is rare, so
    it is short.
    """
    if not table:
        return []
    one, rest = table[0], table[1:]
    for other in rest:
        if _match(one, other) not in met:
            matches = _new_matches([index for index in rest if index != other], met)
            if matches is not None:
                return [_match(one, other), *matches]
    return None


def _knockout(order: list[int], results: Results) -> list[Match]:
    """Winners play on for the best place and the losers of the first round for the worst: about 1.5 n matches."""
    matches = _paired(order)
    new = [match for match in matches if match not in results]
    if new:
        return sorted(new)
    resting = order[-1:] if len(order) % 2 else []
    winners = [_winner(results, *match) for match in matches] + resting
    losers = [one + other - _winner(results, one, other) for one, other in matches] + resting
    return sorted(set(_bracket(winners, results, best=True) + _bracket(losers, results, best=False)))


def _bracket(left: list[int], results: Results, *, best: bool) -> list[Match]:
    while len(left) > 1:
        matches = _paired(left)
        new = [match for match in matches if match not in results]
        if new:
            return new
        resting = left[-1:] if len(left) % 2 else []
        through = [_winner(results, one, other) for one, other in matches]
        if not best:
            through = [one + other - winner for (one, other), winner in zip(matches, through, strict=True)]
        # The one that rested plays first next time, so that nobody comes through on rests alone.
        left = resting + through
    return []


def _paired(order: list[int]) -> list[Match]:
    return [_match(one, other) for one, other in zip(order[::2], order[1::2], strict=False)]


def _winner(results: Results, one: int, other: int) -> int:
    return one if gain(results, one, other) >= 0 else other

"""Which responses meet next: the games played so far in, the games to play now out (none: it is over).

A game is an unordered pair `(i, j)` that the critic judges in both orders; its result is what `i` gained minus what
`j` gained, or None where a judgement failed. All is a pure function of the results, so rounds of many items can be
asked together.

Games for n = 5: all pairs 10, Swiss at most 8 (4 rounds), knock-out 6. For n = 16: 120, 40 (5 rounds), 22. Knock-out
finds best and worst only; what it says about the order between them is coarse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

Game = tuple[int, int]
Results = Mapping[Game, float | None]

PAIRINGS = ("all", "swiss", "knockout")


def next_games(pairing: str, order: Sequence[int], results: Results, *, rounds: int | None = None) -> list[Game]:
    """The games to play now. `order` is the starting order (shuffled by the caller); `rounds` is for Swiss only.

    >>> next_games("all", [0, 1, 2], {})
    [(0, 1), (0, 2), (1, 2)]
    >>> next_games("knockout", [0, 1, 2, 3], {(0, 1): 2.0, (2, 3): -2.0})
    [(0, 3), (1, 2)]
    """
    assert pairing in PAIRINGS
    if pairing == "all":
        return [game for game in combinations(sorted(order), 2) if game not in results]
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
    """What `one` gained over `other` in their game (0 if it failed)."""
    result = results[_game(one, other)] or 0.0
    return result if one < other else -result


def _game(one: int, other: int) -> Game:
    return (one, other) if one < other else (other, one)


def _swiss(order: list[int], results: Results, rounds: int) -> list[Game]:
    """Neighbours in the table meet unless they have met; with an odd number the lowest that had none has a bye.

    It is over early when not everybody can be paired with somebody new.
    """
    points = dict.fromkeys(order, 0.0)
    met: set[Game] = set()
    rested: set[int] = set()
    # Up to half of n rounds new opponents are sure to be there (Dirac); beyond, only small fields are searched quickly.
    for _ in range(min(rounds, max(swiss_rounds(len(order)), len(order) // 2))):
        table = sorted(order, key=lambda index: -points[index])
        games = _swiss_round(table, met, rested)
        new = [game for game in games if game not in results]
        if new or not games:
            return sorted(new)
        rested |= set(order) - {index for game in games for index in game}
        for one, other in games:
            points[one] += gain(results, one, other)
            points[other] -= gain(results, one, other)
            met.add(_game(one, other))
    return []


def _swiss_round(table: list[int], met: set[Game], rested: set[int]) -> list[Game]:
    if len(table) % 2 == 0:
        return _new_games(table, met) or []
    for resting in [*_upwards(table, without=rested), *_upwards(table, without=set(table) - rested)]:
        games = _new_games([index for index in table if index != resting], met)
        if games:
            return games
    return []


def _upwards(table: list[int], *, without: set[int]) -> list[int]:
    return [index for index in reversed(table) if index not in without]


def _new_games(table: list[int], met: set[Game]) -> list[Game] | None:
    """Pair all of the table (even in number), each with the nearest possible; None if they cannot all meet somebody new.

    The search goes back where the last two have met already. In the few rounds of a Swiss tournament that is rare, so
    it is short.
    """
    if not table:
        return []
    one, rest = table[0], table[1:]
    for other in rest:
        if _game(one, other) not in met:
            games = _new_games([index for index in rest if index != other], met)
            if games is not None:
                return [_game(one, other), *games]
    return None


def _knockout(order: list[int], results: Results) -> list[Game]:
    """Winners play on for the best place and the losers of the first round for the worst: about 1.5 n games."""
    games = _paired(order)
    new = [game for game in games if game not in results]
    if new:
        return sorted(new)
    resting = order[-1:] if len(order) % 2 else []
    winners = [_winner(results, *game) for game in games] + resting
    losers = [one + other - _winner(results, one, other) for one, other in games] + resting
    return sorted(set(_bracket(winners, results, best=True) + _bracket(losers, results, best=False)))


def _bracket(left: list[int], results: Results, *, best: bool) -> list[Game]:
    while len(left) > 1:
        games = _paired(left)
        new = [game for game in games if game not in results]
        if new:
            return new
        resting = left[-1:] if len(left) % 2 else []
        through = [_winner(results, one, other) for one, other in games]
        if not best:
            through = [one + other - winner for (one, other), winner in zip(games, through, strict=True)]
        # The one that rested plays first next time, so that nobody comes through on rests alone.
        left = resting + through
    return []


def _paired(order: list[int]) -> list[Game]:
    return [_game(one, other) for one, other in zip(order[::2], order[1::2], strict=False)]


def _winner(results: Results, one: int, other: int) -> int:
    return one if gain(results, one, other) >= 0 else other

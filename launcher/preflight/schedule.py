"""Who tries whom, and when: rounds in which every rank has at most one partner. Pure."""

from collections.abc import Hashable, Sequence

Pair = tuple[int, int]


def round_robin(players: int, number: int) -> list[Pair]:
    """Returns the pairs of one of the `players - 1` rounds (`players`, if odd) in which each meets each other once.

    The circle method: one sits still, the others move on by a seat each round.
    """
    even = players + players % 2
    others = even - 1
    pairs = [(number % others, others)]
    pairs += [((number + k) % others, (number - k) % others) for k in range(1, even // 2)]
    return [(min(pair), max(pair)) for pair in pairs if max(pair) < players]


def rounds(hosts: Sequence[Hashable], *, most_ranks: int, most_rounds: int) -> list[list[Pair]]:
    """Returns rounds of pairs of ranks, the lower first.

    Up to `most_ranks`, every rank tries every other. Beyond, every host tries every other, by another of its ranks each
    round, and ranks of a host try their neighbours. Of more than `most_rounds`, as many are taken, evenly spread: then
    every host tries so many others.

    Args:
        hosts: Of each rank, anything that is the same for ranks of one host.
    """
    if len(hosts) <= most_ranks:
        chosen = [round_robin(len(hosts), number) for number in _spread(_rounds_of(len(hosts)), most_rounds)]
    else:
        members: dict[Hashable, list[int]] = {}
        for rank, host in enumerate(hosts):
            members.setdefault(host, []).append(rank)
        groups = list(members.values())
        chosen = [_neighbours(groups, first) for first in (0, 1)]
        for turn, number in enumerate(_spread(_rounds_of(len(groups)), most_rounds)):
            pairs = round_robin(len(groups), number)
            chosen.append(
                [_ordered(groups[a][turn % len(groups[a])], groups[b][turn % len(groups[b])]) for a, b in pairs]
            )
    return [pairs for pairs in chosen if pairs]


def _rounds_of(players: int) -> int:
    return players - 1 + players % 2 if players > 1 else 0


def _spread(count: int, most: int) -> list[int]:
    return list(range(count)) if count <= most else [number * count // most for number in range(most)]


def _neighbours(groups: Sequence[Sequence[int]], first: int) -> list[Pair]:
    return [_ordered(*pair) for group in groups for pair in zip(group[first::2], group[first + 1 :: 2])]


def _ordered(a: int, b: int) -> Pair:
    return min(a, b), max(a, b)


def regroup(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Returns the pairs in rounds, each in the first that both its ranks are free in."""
    made: list[tuple[list[Pair], set[int]]] = []
    for pair in pairs:
        found = next((entry for entry in made if not entry[1] & set(pair)), None)
        if found is None:
            made.append(found := ([], set()))
        found[0].append(pair)
        found[1].update(pair)
    return [entry[0] for entry in made]

"""The slow way to simulate a step: every message of every rank is listed, with the links that it crosses."""

from collections import defaultdict
from dataclasses import dataclass

EPS = 1e-12


@dataclass(frozen=True)
class Messages:
    """A collective: (source, destination, bytes), and seconds before the first byte."""

    messages: tuple[tuple[int, int, float], ...]
    latency: float


def path(network, source, destination):
    """Yields (kind, number) of the links from a rank to another."""
    node = network.hardware.ranks_per_node
    if source // node == destination // node:
        yield from (("port out", source), ("port in", destination))
        return
    share = node // network.hardware.nics
    yield from (("nic out", source // share), ("nic in", destination // share))
    leaf = network.hardware.nodes_per_leaf * node
    if leaf and source // leaf != destination // leaf:
        yield from (("leaf up", source // leaf), ("leaf down", destination // leaf))


def rate_of(network, kind):
    hardware = network.hardware
    if kind.startswith("port"):
        return hardware.inside.bytes_per_second * hardware.link_share
    between = hardware.between.bytes_per_second * hardware.link_share
    if kind.startswith("nic"):
        return between * hardware.ranks_per_node / hardware.nics
    return between * hardware.nodes_per_leaf * hardware.ranks_per_node / hardware.oversubscription


def all_to_all(network, name, rows, *, transport):
    group, node, messages, hops = len(rows), network.hardware.ranks_per_node, [], []
    links = network.hardware
    for source in range(network.ranks):
        start = source // group * group
        for place in range(group):
            messages.append((source, start + place, float(rows[place])))
    if transport != "hierarchical" or group <= node:
        return [Messages(tuple(messages), (links.between if group > node else links.inside).latency)]
    for source, destination, size in messages:
        relay = source // node * node + destination % node
        hops.append(((source, relay, size), (relay, destination, size)))
    return [
        Messages(tuple(first for first, _ in hops), links.inside.latency),
        Messages(tuple(second for _, second in hops), links.between.latency),
    ]


def back(transfer, name):
    return Messages(tuple((d, s, size) for s, d, size in transfer.messages), transfer.latency)


def rings(network, name, kind, size, *, ranks, stride):
    passes = 2 if kind == "all_reduce" else 1
    node, messages = network.hardware.ranks_per_node, []
    for first in range(network.ranks):
        if first // stride % ranks:
            continue  # not the first of its group
        group = [first + i * stride for i in range(ranks)]
        nodes = defaultdict(list)
        for rank in group:
            nodes[rank // node].append(rank)
        members = list(nodes.values())
        here = len(members[0])
        for number, own in enumerate(members):
            for place, rank in enumerate(own):
                inside = passes * size * (here - 1) / here
                messages.append((rank, own[(place + 1) % here], inside))
                beside = members[(number + 1) % len(members)][place]
                messages.append((rank, beside, passes * size / here * (len(members) - 1) / len(members)))
    return Messages(tuple(messages), 0.0)


def loads(network, transfer):
    """Returns bytes by link."""
    found = defaultdict(float)
    for source, destination, size in transfer.messages:
        if source != destination and size:
            for link in path(network, source, destination):
                found[link] += size
    return found


def speeds_of(network, active):
    """Returns the share of its own speed that each of some transfers gets, by raising all of them in turns.

    active: task -> (bytes by link, seconds alone).
    """
    speeds, rising = dict.fromkeys(active, 0.0), set(active)
    use = defaultdict(dict)
    for task, (by_link, alone) in active.items():
        for link, size in by_link.items():
            use[link][task] = size / alone / rate_of(network, link[0])
    while rising:
        room = 1.0 - max(speeds[task] for task in rising)
        for tasks in use.values():
            more = sum(share for task, share in tasks.items() if task in rising)
            if more:
                room = min(room, (1.0 - sum(share * speeds[task] for task, share in tasks.items())) / more)
        for task in rising:
            speeds[task] += room
        for tasks in use.values():
            if sum(share * speeds[task] for task, share in tasks.items()) >= 1.0 - 1e-9:
                rising -= set(tasks)
        rising -= {task for task in rising if speeds[task] >= 1.0 - 1e-9}
    return speeds


def run(network, tasks):
    """Returns (seconds, start and end of every task, bytes by link, highest use of any link over its rate)."""
    by_link = {i: loads(network, task.transfer) for i, task in enumerate(tasks) if task.transfer is not None}
    alone = {
        i: max((s / rate_of(network, k) for (k, _), s in found.items()), default=0.0) for i, found in by_link.items()
    }
    waiting, running, spans, now = list(range(len(tasks))), {}, {}, 0.0
    carried, highest = defaultdict(float), 0.0
    while waiting or running:
        for stream in ("compute", "exchange", "reduction"):
            own = [i for i in waiting if tasks[i].stream == stream]
            taken = any(tasks[i].stream == stream for i in running)
            if own and not taken and all(j in spans and j not in running for j in tasks[own[0]].after):
                latency = 0.0 if tasks[own[0]].transfer is None else tasks[own[0]].transfer.latency
                running[own[0]] = [latency, tasks[own[0]].seconds if own[0] not in alone else alone[own[0]]]
                spans[own[0]] = (now, None)
                waiting.remove(own[0])
        flowing = {
            i: (by_link[i], alone[i]) for i, (late, _) in running.items() if i in alone and not late and alone[i]
        }
        speeds = speeds_of(network, flowing)
        used = defaultdict(float)
        for i in flowing:
            for source, destination, size in tasks[i].transfer.messages:
                if source != destination:
                    for link in path(network, source, destination):
                        used[link] += size / alone[i] * speeds[i]  # bytes/s of this message
        highest = max([highest, *(rate / rate_of(network, link[0]) for link, rate in used.items())])
        step = min(late if late else left / speeds.get(i, 1.0) for i, (late, left) in running.items())
        for i, state in list(running.items()):
            if state[0]:
                state[0] = state[0] - step if state[0] > step * (1 + EPS) else 0.0
                continue
            done = min(state[1], speeds.get(i, 1.0) * step)
            for link, size in by_link.get(i, {}).items():
                carried[link] += size * done / alone[i]
            state[1] -= done
            if state[1] <= EPS * max(tasks[i].seconds, alone.get(i, 0.0)):
                spans[i] = (spans[i][0], now + step)
                del running[i]
        now += step
    return now, [spans[i] for i in range(len(tasks))], carried, highest

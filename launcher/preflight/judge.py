"""From figures to verdicts: who cannot be used, and who is out of line. Pure: a document in, findings out."""

import statistics
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.machine.topology import short_list
from launcher.preflight import gpu
from launcher.preflight.fit import behind, slow_links
from launcher.preflight.resources import CHECKS, PACES

CLOCK_SECONDS = 1.0
_OF_INTERFACE = 10.0  # as many times slower than the interface says
_ENOUGH = 100e6  # bytes per second; above, one thread of Python may be what is slow
_AGAIN = 4  # links of a slow end that are measured again
_ONE_WAY = 3.0  # as many times slower than the other way is worth a word
_LATE = 1e-3  # seconds; less may be a core that was busy
Link = dict[str, Any]
Finding = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A figure of a link, and when it is out of line."""

    name: str  # in the file
    title: str  # of the column
    words: str
    end_factor: float  # as many times worse than the median end, over every one of its links
    link_factor: float  # as many times worse than both of its ends can
    speed: Callable[[float], float]  # what is better, the more it is
    show: Callable[[float], str]
    matters: Callable[[float], bool] = lambda value: True


METRICS = (
    Metric("bytes_per_s", "send", "slow", 3.0, 4.0, lambda value: value, lambda value: f"{value / 1e6:,.1f} MB/s"),
    Metric(
        "latency_s",
        "latency",
        "late",
        5.0,
        5.0,
        lambda value: 1 / value,
        lambda value: f"{1e6 * value:,.0f} us",
        lambda value: value > _LATE,
    ),
)


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the document with all findings, the worst first, and the hosts whose ranks cannot be used."""
    for rule in RULES:
        document["findings"] += rule(document)
    return _sum_up(document)


def blame(document: dict[str, Any], host: str, ranks: Sequence[int], words: str) -> None:
    """Adds the finding that a host cannot be used."""
    document["findings"].append(make_finding("unusable", "start", host, ranks, words))
    _sum_up(document)


def _sum_up(document: dict[str, Any]) -> dict[str, Any]:
    document["findings"].sort(key=lambda finding: finding["severity"] != "unusable")
    blamed = (finding["host"] for finding in document["findings"] if finding["severity"] == "unusable")
    document["unusable_hosts"] = list(dict.fromkeys(filter(None, blamed)))
    return document


def is_usable(document: dict[str, Any]) -> bool:
    """Returns whether every rank can be used."""
    return not any(finding["severity"] == "unusable" for finding in document["findings"])


def typical(kind: str, points: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """Returns the median seconds of every size, as entries of the document's collectives."""
    found: dict[float, list[float]] = {}
    for size, seconds in points:
        found.setdefault(size, []).append(seconds)
    common = {"kind": kind, "backend": "tcp", "world": 2}
    return [common | {"bytes": size, "seconds": statistics.median(found[size])} for size in sorted(found)]


def suspects(links: Sequence[Link]) -> list[tuple[int, int]]:
    """Returns the ranks of links that look out of line, for a second look."""
    found: dict[tuple[int, int], None] = {}
    for metric, best, _ in _compared(links):
        ends, slow = _out_of_line(metric, best)
        chosen = [best[pair] for pair in slow]
        for end in ends:
            chosen += [link for pair, link in best.items() if end in pair][:_AGAIN]
        found.update({(link["ranks"][0], link["ranks"][1]): None for link in chosen})
    return list(found)


def slow_ranks(ranks: Sequence[dict[str, Any]]) -> list[int]:
    """Returns the ranks whose pace looks out of line, for another look."""
    found: set[int] = set()
    for pace in PACES:
        found |= behind({r["rank"]: r[pace.name] for r in ranks if pace.name in r}, pace.factor).keys()
    return sorted(found)


def _unreached(document: dict[str, Any]) -> Iterator[Finding]:
    """Yields the links that do not work, each put down to that end of it which explains most of them.

    Ends are hosts if hosts do not reach each other, else ranks. Of two that explain as many, it is not rank 0's, where
    the launcher is, and it is the one that was called.
    """
    broken = [link for link in document["links"] if link["cause"]]
    ends_of = _ends_of_hosts if any(link["hosts"][0] != link["hosts"][1] for link in broken) else _ends_of_ranks
    spared = {ends_of(link)[0] for link in broken if link["ranks"][0] == 0}
    called = {ends_of(link)[link["ranks"].index(link["called"])] for link in broken}
    left: dict[Hashable, set[int]] = {}  # the broken links of every end, by number
    for number, link in enumerate(broken):
        for end in ends_of(link):
            left.setdefault(end, set()).add(number)
    while any(left.values()):
        blamed = max(left, key=lambda end: (len(left[end]), end not in spared, end in called))
        for number in sorted(left.pop(blamed)):
            link = broken[number]
            yield make_finding(
                "unusable", "link", link["hosts"][ends_of(link).index(blamed)], link["ranks"], _describe(link)
            )
            for end in ends_of(link):
                left.get(end, set()).discard(number)


def _ends_of_hosts(link: Link) -> list[Hashable]:
    return list(link["hosts"])


def _ends_of_ranks(link: Link) -> list[Hashable]:
    return list(link["ranks"])


def _describe(link: Link) -> str:
    to = link["ranks"].index(link["called"])
    who = [f"rank {rank} ({host})" for rank, host in zip(link["ranks"], link["hosts"])]
    return f"{who[1 - to]} cannot connect to {who[to]} at {link['address']}: {link['cause']}"


def _lacking(document: dict[str, Any]) -> Iterator[Finding]:
    for host in document["hosts"]:
        for check in CHECKS:
            value = host.get(check.name)
            if value is not None and value < check.enough:
                severity = "unusable" if value < check.least else "marked"
                limit = check.least if value < check.least else check.enough
                words = f"{mib(value)} of {check.words}, less than {mib(limit)}"
                yield make_finding(severity, check.title, host["name"], host["ranks"], f"{host['name']} has {words}")


def _clocks(document: dict[str, Any]) -> Iterator[Finding]:
    ahead = {host["name"]: host["clock_offset_s"] for host in document["hosts"] if "clock_offset_s" in host}
    median = statistics.median(ahead.values()) if ahead else 0.0
    for host in document["hosts"]:
        off = ahead.get(host["name"], median) - median
        if abs(off) > CLOCK_SECONDS + host.get("clock_doubt_s", 0.0):
            words = f"the clock of {host['name']} is off by {off:+.1f} s from the median host's"
            yield make_finding("marked", "clock", host["name"], host["ranks"], words)


def _gpus(document: dict[str, Any]) -> Iterator[Finding]:
    for host in document["hosts"]:
        for found in host.get("gpus", ()):
            for unusable, words in gpu.complaints(found):
                severity = "unusable" if unusable else "marked"
                yield make_finding(severity, "gpu", host["name"], host["ranks"], f"{host['name']}: {words}")


def _paces(document: dict[str, Any]) -> Iterator[Finding]:
    for pace in PACES:
        values = {rank["rank"]: rank[pace.name] for rank in document["ranks"] if pace.name in rank}
        slow = behind(values, pace.factor)
        for host in document["hosts"]:
            ranks = [rank for rank in host["ranks"] if rank in slow]
            if ranks:
                share = statistics.median(slow[rank] for rank in ranks)
                who = f"rank{'s' * (len(ranks) > 1)} {short_list(ranks)} ({host['name']})"
                words = f"the {pace.words} of {who} is slow: {share:.2f} of the median rank's pace"
                yield make_finding(
                    "marked", pace.title, host["name"], ranks, f"{words} (marked below 1/{pace.factor:g})"
                )


def _out_of_line_links(document: dict[str, Any]) -> Iterator[Finding]:
    for metric, best, far in _compared(document["links"]):
        ends, links = _out_of_line(metric, best)
        for end, share in ends.items():
            mine = [link for pair, link in best.items() if end in pair]
            link = max(mine, key=lambda link: metric.speed(link[metric.name]))
            host = str(end) if far else link["hosts"][0]
            who = f"host {end}" if far else f"rank {end} ({host})"
            limit = f"(marked below 1/{metric.end_factor:g})"
            shown = f"{metric.show(link[metric.name])} at best, {share:.2f} of the median's {limit}"
            ranks = [rank for rank, other in zip(link["ranks"], link["hosts"]) if (other if far else rank) == end]
            yield make_finding("marked", metric.title, host, ranks, f"{who} is {metric.words} over every link: {shown}")
        for pair, share in links.items():
            link = best[pair]
            a, b = (f"rank {rank} ({host})" for rank, host in zip(link["ranks"], link["hosts"]))
            if link["up_bytes_per_s"] * _ONE_WAY < link["down_bytes_per_s"]:
                b += ", from the first to the second,"
            elif link["down_bytes_per_s"] * _ONE_WAY < link["up_bytes_per_s"]:
                b += ", from the second to the first,"
            shown = f"{metric.show(link[metric.name])}, {share:.2f} of what both reach with others"
            words = f"the link between {a} and {b} is {metric.words}: {shown} (marked below 1/{metric.link_factor:g})"
            yield make_finding("marked", metric.title, "", link["ranks"], words)


def _below_interface(document: dict[str, Any]) -> Iterator[Finding]:
    """Yields hosts that reach far less than their interface says: what two hosts alone cannot tell from each other."""
    promised = {rank["host"]: rank.get("interface_bytes_per_s", 0) for rank in document["ranks"]}
    best: dict[str, float] = {}
    for link in document["links"]:
        for host in link["hosts"] if link["bytes_per_s"] and link["hosts"][0] != link["hosts"][1] else ():
            best[host] = max(best.get(host, 0.0), link["bytes_per_s"])
    known = {finding["host"] for finding in document["findings"] if finding["about"] == "send"}
    for host, speed in best.items():
        if host not in known and speed < min(promised[host] / _OF_INTERFACE, _ENOUGH):
            words = (
                f"reaches {speed / 1e6:,.1f} MB/s at best, where its interface says {promised[host] / 1e6:,.0f} MB/s"
            )
            yield make_finding("marked", "send", host, [], f"host {host} {words}")


def _compared(links: Sequence[Link]) -> Iterator[tuple[Metric, dict[tuple, Link], bool]]:
    """Yields (metric, the best link between any two ends, whether ends are hosts): ends are hosts for links between
    hosts, and ranks for links within each host."""
    groups: dict[str, list[Link]] = {}
    for link in links:
        if link["bytes_per_s"] and not link["cause"]:
            groups.setdefault(link["hosts"][0] if link["hosts"][0] == link["hosts"][1] else "", []).append(link)
    for host, group in groups.items():
        for metric in METRICS:
            best: dict[tuple, Link] = {}
            for link in group:
                pair = tuple(link["ranks"] if host else sorted(link["hosts"]))
                if pair not in best or metric.speed(link[metric.name]) > metric.speed(best[pair][metric.name]):
                    best[pair] = link
            yield metric, best, not host


def _out_of_line(metric: Metric, best: dict[tuple, Link]) -> tuple[dict, dict]:
    speeds = {pair: metric.speed(link[metric.name]) for pair, link in best.items()}
    found: tuple[dict, dict] = slow_links(speeds, end_factor=metric.end_factor, link_factor=metric.link_factor)
    ends, links = found
    matters = {pair for pair, link in best.items() if metric.matters(link[metric.name])}
    late = {end: share for end, share in ends.items() if all(pair in matters for pair in best if end in pair)}
    return late, {pair: share for pair, share in links.items() if pair in matters}


def make_finding(severity: str, about: str, host: str, ranks: Sequence[int], words: str) -> Finding:
    """Returns a finding as it stands in the document."""
    return {"severity": severity, "about": about, "host": host, "ranks": list(ranks), "words": words}


def mib(size: float) -> str:
    """Returns bytes as people read them."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


RULES: tuple[Callable[[dict[str, Any]], Iterator[Finding]], ...] = (
    _unreached,
    _lacking,
    _clocks,
    _gpus,
    _paces,
    _out_of_line_links,
    _below_interface,
)

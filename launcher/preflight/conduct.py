"""The order of the checks: what all ranks are told, and what becomes of their answers: the document (__init__.py)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.machine import network
from launcher.machine.network import Interface, Place
from launcher.preflight import collectives, judge, schedule
from launcher.preflight.fit import fit
from launcher.preflight.hub import Hub
from launcher.preflight.schedule import Pair

LOOPBACK = "127.0.0.1"
_REACH = {"most_ranks": 64, "most_rounds": 256}  # probes of one rank: 64 at most, beyond 64 ranks 256
_MEASURE = {"most_ranks": 16, "most_rounds": 64}
_TURNS = 16  # in which ranks of a host show their pace
_LONGEST_COLLECTIVE = 1.0  # seconds; a larger size that would take longer is left out
_GROWTH = 8  # from a size to the next
_IMPORT_SECONDS = 300.0  # of torch, by all ranks of a host at once, from a cold file system
_TRIES = 3  # of what looks out of line
_ALONE = 8  # links that are measured again one by one; more of them at a time
_SUSPECTS = 64  # links that are measured again, alone


@dataclass(frozen=True)
class Settings:
    """What the user chose."""

    over: str = "auto"  # of collectives.CHOICES
    seconds: float = 120.0  # in which a rank must come, and answer an order


class Conductor:
    """Runs the checks over a hub and keeps what is known of each rank."""

    def __init__(self, hub: Hub, settings: Settings, name_of: Callable[[int], str] | None = None) -> None:
        """name_of: The host of a rank as the user calls it; None = as it calls itself."""
        self._hub, self._settings, self._name_of = hub, settings, name_of
        self._facts: dict[int, Any] = {}
        self._places: dict[int, Place] = {}
        self._addresses: dict[int, str] = {}
        self._ports: dict[int, dict] = {}
        self._links: dict[Pair, dict[str, Any]] = {}
        self._hosts: dict[str, dict[str, Any]] = {}  # by stack
        self._ranks: dict[int, dict[str, Any]] = {}
        self._samples: dict[str, list[tuple[float, float]]] = {}
        self._document: dict[str, Any] = {
            "version": 1,
            "hosts": [],
            "ranks": [],
            "links": [],
            "collectives": [],
            "fit": {},
            "notes": [],
            "findings": [],
            "unusable_hosts": [],
        }

    def run(self) -> dict[str, Any]:
        """Returns the document. Ranks that are lost on the way are in its findings."""
        self._meet()
        if self._facts:
            self._choose_addresses()
            self._read_hosts()
            self._reach()
            self._measure(self._rounds_of_links())
            self._measure_again()
            self._pace()
            self._collect()
        return self._finish()

    def _order(self, orders: dict[int, Any], seconds: float | None = None) -> dict[int, Any]:
        return self._hub.order(orders, seconds or self._settings.seconds)

    def _meet(self) -> None:
        self._facts = self._hub.meet(self._settings.seconds)
        for rank, facts in sorted(self._facts.items()):
            place = dict(facts["place"])
            interfaces = tuple(Interface(**interface) for interface in place["interfaces"])
            self._places[rank] = Place(place["host"], place["stack"], interfaces)
            name = self._name_of(rank) if self._name_of else place["host"]
            host = self._hosts.setdefault(place["stack"], {"name": name, "ranks": [], "cores": 0})
            host["ranks"].append(rank)
            host["cores"] = max(host["cores"], facts["cores"])
            self._ranks[rank] = {
                "rank": rank,
                "host": host["name"],
                "pid": facts["pid"],
                "address": "",
                "interface": "",
            }

    def _choose_addresses(self) -> None:
        """Has every rank listen on its address in the network that rank 0 would have them meet in."""
        first = min(self._facts)
        shared = None
        if len(self._hosts) == 1:
            self._addresses = dict.fromkeys(self._facts, LOOPBACK)
        else:
            others = list(dict.fromkeys(p.host for p in self._places.values() if p.host != self._places[first].host))
            routed = self._order({first: {"do": "route", "hosts": others[:8]}}).get(first, "")
            try:
                shared = network.shared_network(list(self._places.values()), self._facts[first]["wanted"], routed)
            except ValueError as error:
                self._find("unusable", first, str(error))
            if shared is None:
                self._route(first, routed)
        orders = {}
        for rank, place in self._places.items():
            interface = network.interface_in(place, shared) if shared else None
            address = interface.address if interface else self._addresses.get(rank, "")
            named = next(
                (i.name for i in place.interfaces if i.address == address), "lo" if address == LOOPBACK else ""
            )
            if address:
                self._ranks[rank] |= {"address": address, "interface": named}
                speed = interface.speed if interface else 0
                self._ranks[rank]["interface_bytes_per_s"] = speed * 125_000  # of Mbit/s
                orders[rank] = {"do": "listen", "address": address, "interface": named}
        for rank, answer in self._order(orders).items():
            if "problem" in answer:
                self._find("unusable", rank, answer["problem"])
            else:
                self._addresses[rank], self._ports[rank] = orders[rank]["address"], answer

    def _route(self, first: int, routed: str) -> None:
        """Has every rank take the address from which it reaches the first one's host, as they share no subnet."""
        self._document["notes"].append(
            "the hosts share no subnet: every rank takes the address of its route to the others"
        )
        name = self._places[first].host
        orders = {rank: {"do": "route", "hosts": [name]} for rank in self._facts if rank != first}
        for rank, address in ({first: routed} | self._order(orders)).items():
            self._addresses[rank] = address
            if not address:
                self._find("unusable", rank, f"has no route to {name if rank != first else 'the other hosts'}")

    def _read_hosts(self) -> None:
        speakers = {host["ranks"][0]: host for host in self._hosts.values()}
        for rank, answer in self._order({rank: {"do": "read"} for rank in speakers}).items():
            speakers[rank].update(answer)
        for rank, (ahead, doubt) in self._order({rank: {"do": "clock"} for rank in speakers}).items():
            speakers[rank].update(clock_offset_s=ahead, clock_doubt_s=doubt)

    def _target(self, rank: int) -> tuple[int, str, int]:
        return rank, self._addresses[rank], self._ports[rank]["port"]

    def _reach(self) -> None:
        """Has every rank connect to the others, or to some of them; which of a pair does takes turns."""
        targets: dict[int, list] = {}
        stacks = self._stacks()
        for pairs in schedule.rounds(stacks, **_REACH):
            for low, high in self._usable(pairs):
                caller, called = (low, high) if (low + high) % 2 else (high, low)
                targets.setdefault(caller, []).append(self._target(called))
        orders = {rank: {"do": "reach", "targets": found} for rank, found in targets.items()}
        for caller, answers in self._order(orders).items():
            for called, cause in answers:
                self._link(caller, called).update(cause=cause, called=called, address=self._addresses[called])

    def _stacks(self) -> list[str]:
        """Returns the host of every rank, one of its own for a rank that is not there."""
        return [self._places[r].stack if r in self._places else f"lost {r}" for r in range(self._hub.world)]

    def _usable(self, pairs: Sequence[Pair]) -> list[Pair]:
        here = self._ports.keys() - self._hub.lost.keys()
        return [pair for pair in pairs if pair[0] in here and pair[1] in here]

    def _link(self, a: int, b: int) -> dict[str, Any]:
        pair = (min(a, b), max(a, b))
        names = [self._ranks[rank]["host"] for rank in pair]
        return self._links.setdefault(
            pair,
            {
                "ranks": list(pair),
                "hosts": names,
                "called": b,
                "address": self._addresses[b],
                "cause": "",
                "latency_s": None,
                "bytes_per_s": None,
                "up_bytes_per_s": None,
                "down_bytes_per_s": None,
            },
        )

    def _rounds_of_links(self) -> list[list[Pair]]:
        broken = {pair for pair, link in self._links.items() if link["cause"]}
        rounds = schedule.rounds(self._stacks(), **_MEASURE)
        return [[pair for pair in self._usable(pairs) if pair not in broken] for pairs in rounds]

    def _measure(self, rounds: Sequence[Sequence[Pair]]) -> None:
        """Measures links round by round; of a link that was measured before, the better figures count."""
        for pairs in rounds:
            orders = {low: {"do": "measure", "target": self._target(high)} for low, high in self._usable(pairs)}
            partner = dict(pairs)
            for rank, answer in (self._order(orders) if orders else {}).items():
                link = self._link(rank, partner[rank])
                if "cause" in answer:
                    link["cause"] = answer["cause"]
                    continue
                link["latency_s"] = min(answer["latency_s"], link["latency_s"] or answer["latency_s"])
                for way, name in (("there", "up_bytes_per_s"), ("back", "down_bytes_per_s")):
                    size, seconds = answer[way][-1]
                    link[name] = max(size / seconds, link[name] or 0.0)
                link["bytes_per_s"] = min(link["up_bytes_per_s"], link["down_bytes_per_s"])
                near = self._places[rank].stack == self._places[partner[rank]].stack
                kind = "send_on_host" if near and len(self._hosts) > 1 else "send"
                self._samples.setdefault(kind, []).extend([(1, answer["latency_s"]), *answer["there"], *answer["back"]])

    def _measure_again(self) -> None:
        """Measures links that look slow again, alone, as a rank that had no core for a moment makes one look slow."""
        for _ in range(_TRIES):
            suspects = judge.suspects(list(self._links.values()))[:_SUSPECTS]
            self._measure([[pair] for pair in suspects] if len(suspects) <= _ALONE else schedule.regroup(suspects))

    def _pace(self) -> None:
        """Has ranks of a host show their pace in turns, as they may share cores; twice, and the better counts."""
        turns: list[list[int]] = [[] for _ in range(_TURNS)]
        for host in self._hosts.values():
            for local, rank in enumerate(host["ranks"]):
                turns[local * _TURNS // max(_TURNS, len(host["ranks"]))].append(rank)
        for ranks in [turn for turn in turns if turn] * 2:
            for rank, paces in self._order({rank: {"do": "pace"} for rank in ranks}).items():
                self._keep_paces(rank, paces)
        for _ in range(_TRIES):  # once more, of those that look slow: they may have had no core for a moment
            slow = judge.slow_ranks(list(self._ranks.values()))
            for rank, paces in (self._order({rank: {"do": "pace"} for rank in slow}) if slow else {}).items():
                self._keep_paces(rank, paces)

    def _keep_paces(self, rank: int, paces: dict[str, float]) -> None:
        known = self._ranks[rank]
        known.update({name: max(value, known.get(name, 0.0)) for name, value in paces.items()})

    def _collect(self) -> None:
        reason = self._why_no_collectives()
        if not reason:
            common = set.intersection(*(set(facts["transports"]) for facts in self._facts.values()))
            wanted = collectives.TRANSPORTS if self._settings.over == "auto" else (self._settings.over,)
            reason = f"no rank can use {' or '.join(wanted)}"
            for name in [name for name in wanted if name in common]:
                reason = self._open(name)
                if not reason:
                    self._time_collectives(name)
                    break
                self._document["notes"].append(f"collectives over {name}: {reason}")
        if reason and not self._hub.lost:
            self._document["notes"].append(f"collectives were not timed: {reason}")

    def _why_no_collectives(self) -> str:
        if self._settings.over == "none":
            return "--preflight-over none"
        if self._hub.world < 2:
            return "there is one rank"
        broken = self._hub.lost or any(link["cause"] for link in self._links.values())
        return "not all ranks can reach each other" if broken or len(self._ports) < self._hub.world else ""

    def _open(self, name: str) -> str:
        """Returns why the ranks do not meet over a transport, "" where they do."""
        orders = {}
        for host in self._hosts.values():
            for local, rank in enumerate(host["ranks"]):
                orders[rank] = {
                    "do": "open",
                    "transport": name,
                    "world": self._hub.world,
                    "local_rank": local,
                    "address": self._addresses[0],
                    "port": self._ports[0]["spare"],
                }
        answers = self._order(orders, max(_IMPORT_SECONDS, self._settings.seconds))
        said = [f"rank {rank}: {words}" for rank, words in sorted(answers.items()) if words]
        return said[0] if said else "ranks were lost" if self._hub.lost else ""

    def _time_collectives(self, backend: str) -> None:
        for kind in collectives.KINDS:
            before = seconds = 0.0
            for number, size in enumerate(collectives.SIZES):
                if number > 1 and seconds + (seconds - before) * _GROWTH > _LONGEST_COLLECTIVE:
                    break
                repeats = collectives.REPEATS if seconds < _LONGEST_COLLECTIVE / 10 else 3
                order = {"do": "collective", "kind": kind, "size": size, "repeats": repeats}
                answers = self._order(dict.fromkeys(self._facts, order))
                if self._hub.lost:
                    return
                before, seconds = seconds, collectives.combine(list(answers.values()))
                entry = {"kind": kind, "backend": backend, "world": self._hub.world, "bytes": size, "seconds": seconds}
                self._document["collectives"].append(entry)
                self._samples.setdefault(kind, []).append((size, seconds))
        self._order({rank: {"do": "close"} for rank in self._facts})

    def _find(self, severity: str, rank: int, words: str) -> None:
        host = self._ranks[rank]["host"] if rank in self._ranks else self._name_of(rank) if self._name_of else ""
        self._document["findings"].append(
            judge.make_finding(severity, "start", host, [rank], f"rank {rank} ({host or '?'}) {words}")
        )

    def _finish(self) -> dict[str, Any]:
        document = self._document
        if not self._hub.stopped:
            for rank, why in sorted(self._hub.lost.items()):
                self._find("unusable", rank, why)
        document |= {
            "complete": not self._hub.stopped,
            "hosts": list(self._hosts.values()),
            "ranks": list(self._ranks.values()),
            "links": [link for link in self._links.values() if link["cause"] or link["bytes_per_s"]],
            "links_tried": len(self._links),
        }
        for kind, points in self._samples.items():
            ranks = self._hub.world
            if kind.startswith("send"):  # of many links: the median, as some may be out of line
                typical = judge.typical(kind, points)
                document["collectives"] += typical
                points, ranks = [(entry["bytes"], entry["seconds"]) for entry in typical], 2
            document["fit"][kind] = asdict(fit(points, ranks))
        return judge.complete(document)

"""What the preflight's figures say of hosts, ranks and links, and how it is said. Nothing is started."""

import json
from itertools import combinations

import pytest

from launcher.preflight import judge, report


def document(*, count=3, per_host=1, **changes):
    """Returns a document of equal hosts and links, changed by {what: {number: entries}}."""
    names = [f"n{number}" for number in range(count)]
    ranks = [{"rank": r, "host": names[r // per_host], "interface_bytes_per_s": 0} for r in range(count * per_host)]
    made = {
        "version": 1,
        "ranks": ranks,
        "links": [],
        "collectives": [],
        "fit": {},
        "notes": [],
        "findings": [],
        "unusable_hosts": [],
        "hosts": [
            {
                "name": name,
                "ranks": [r["rank"] for r in ranks if r["host"] == name],
                "free_memory_bytes": 2**34,
                "disk_bytes": 2**40,
                "tmp_bytes": 2**34,
                "shm_bytes": 2**34,
                "clock_offset_s": 0.0,
                "clock_doubt_s": 1e-4,
                "gpus": [],
                "gpu_note": "no GPU",
            }
            for name in names
        ],
    }
    for rank in ranks:
        rank |= {"hash_bytes_per_s": 1e9, "copy_bytes_per_s": 1e10}
    for a, b in combinations(range(len(ranks)), 2):
        made["links"].append(
            {
                "ranks": [a, b],
                "hosts": [ranks[a]["host"], ranks[b]["host"]],
                "called": b,
                "address": f"10.0.0.{b}",
                "cause": "",
                "latency_s": 2e-5,
                "bytes_per_s": 1e9,
                "up_bytes_per_s": 1e9,
                "down_bytes_per_s": 1e9,
            }
        )
    for what, entries in changes.items():
        for number, entry in entries.items():
            made[what][number] |= entry
    return made


def findings(**changes):
    found = judge.complete(document(**changes))["findings"]
    return [(finding["severity"], finding["host"], finding["words"]) for finding in found]


BROKEN = {"cause": "refused", "latency_s": None, "bytes_per_s": None}
SLOW = {"bytes_per_s": 1e7, "up_bytes_per_s": 1e7}
LATE = {"latency_s": 0.02}


def test_nothing_is_wrong_with_equal_hosts():
    assert findings() == [] and findings(count=1, per_host=4) == [] and findings(count=1) == []
    assert report.verdict(judge.complete(document())) == "3 ranks on 3 hosts can be used"


@pytest.mark.parametrize(
    "changes, severity, host, words",
    [
        ({"hosts": {1: {"free_memory_bytes": 2**20}}}, "unusable", "n1", "n1 has 1.0 MiB of free memory, less than 64"),
        (
            {"hosts": {1: {"free_memory_bytes": 2**29}}},
            "marked",
            "n1",
            "n1 has 512.0 MiB of free memory, less than 1.0 G",
        ),
        (
            {"hosts": {2: {"disk_bytes": 0}}},
            "unusable",
            "n2",
            "n2 has 0.0 MiB of space on the disk of the run's folder",
        ),
        ({"hosts": {2: {"tmp_bytes": 4096}}}, "unusable", "n2", "of space for temporary files, less than 1.0 MiB"),
        ({"hosts": {0: {"shm_bytes": 2**26}}}, "marked", "n0", "n0 has 64.0 MiB of space in /dev/shm, less than 65"),
        ({"hosts": {0: {"clock_offset_s": -7.0}}}, "marked", "n0", "the clock of n0 is off by -7.0 s"),
        (
            {"ranks": {1: {"hash_bytes_per_s": 4e8}}},
            "marked",
            "n1",
            "processor of rank 1 (n1) is slow: 0.40 of the median",
        ),
        ({"ranks": {2: {"copy_bytes_per_s": 2e9}}}, "marked", "n2", "the memory of rank 2 (n2) is slow: 0.20 of the"),
        ({"links": {1: SLOW, 2: SLOW}}, "marked", "n2", "host n2 is slow over every link: 10.0 MB/s at best, 0.01 of"),
        ({"links": {1: LATE, 2: LATE}}, "marked", "n2", "host n2 is late over every link: 20,000 us at best"),
        (
            {"links": {2: SLOW}},
            "marked",
            "",
            "the link between rank 1 (n1) and rank 2 (n2), from the first to the second, is slow: 10.0 MB/s, 0.01",
        ),
        ({"links": {0: BROKEN}}, "unusable", "n1", "rank 0 (n0) cannot connect to rank 1 (n1) at 10.0.0.1: refused"),
    ],
)
def test_what_is_out_of_line_is_named_and_nothing_else(changes, severity, host, words):
    (found,) = findings(**changes)
    assert found[:2] == (severity, host) and words in found[2]
    assert judge.is_usable(judge.complete(document(**changes))) == (severity == "marked")


@pytest.mark.parametrize("latency", [9e-4, 5e-4])
def test_a_link_within_a_millisecond_is_not_late(latency):
    assert findings(links={1: {"latency_s": latency}, 2: {"latency_s": latency}}) == []


def test_ranks_of_a_host_are_held_against_each_other():
    slow = {number: SLOW for number in (2, 4, 5)}  # the links of rank 3: (0, 3), (1, 3), (2, 3)
    ((severity, host, words),) = findings(count=1, per_host=4, links=slow)
    assert (severity, host) == ("marked", "n0") and words.startswith("rank 3 (n0) is slow over every link")


def test_two_hosts_are_held_against_what_their_interfaces_say():
    fast = {number: {"interface_bytes_per_s": 1.25e9} for number in (0, 1)}
    assert findings(count=2, ranks=fast) == []
    found = findings(count=2, ranks=fast, links={0: SLOW})
    assert [entry[2] for entry in found] == [
        f"host n{n} reaches 10.0 MB/s at best, where its interface says 1,250 MB/s" for n in (0, 1)
    ]
    assert findings(count=2, links={0: SLOW}) == []  # an interface that says nothing


def test_a_slow_host_is_told_of_once():
    fast = {number: {"interface_bytes_per_s": 1.25e9} for number in range(3)}
    ((_, host, words),) = findings(ranks=fast, links={1: SLOW, 2: SLOW})
    assert host == "n2" and "over every link" in words


def test_clocks_are_held_against_each_other_not_against_the_launcher_s():
    assert findings(hosts={number: {"clock_offset_s": 50.0 + number / 10} for number in range(3)}) == []


def broken_links(*pairs, called=None):
    made = document(count=4)
    for link in made["links"]:
        if tuple(link["ranks"]) in pairs:
            link |= BROKEN | ({} if called is None else {"called": called})
    return judge.complete(made)


@pytest.mark.parametrize(
    "pairs, called, blamed",
    [
        ([(0, 2), (1, 2), (2, 3)], None, ["n2"]),  # the end that explains all
        ([(0, 1)], 0, ["n1"]),  # not rank 0's host, where the launcher is
        ([(2, 3)], 2, ["n2"]),  # of two alike, the one that does not answer
        ([(0, 1), (0, 2), (0, 3)], None, ["n0"]),
        ([(0, 1), (2, 3)], None, ["n1", "n3"]),
    ],
)
def test_who_is_cut_off_is_who_explains_most_links(pairs, called, blamed):
    found = broken_links(*pairs, called=called)
    assert found["unusable_hosts"] == blamed
    assert len(found["findings"]) == len(pairs)  # every link is told of once


def test_on_one_host_a_rank_is_to_blame():
    made = document(count=1, per_host=4)
    for link in made["links"]:
        if link["ranks"] in ([0, 1], [1, 3]):
            link |= BROKEN | {"called": 1, "address": "10.0.0.1"}
    words = [finding["words"] for finding in judge.complete(made)["findings"]]
    assert words == [f"rank {r} (n0) cannot connect to rank 1 (n0) at 10.0.0.1: refused" for r in (0, 3)]


def test_links_that_look_slow_are_measured_again():
    assert judge.suspects(document(count=4)["links"]) == []
    slow = document(count=4, links={3: SLOW})["links"]
    assert judge.suspects(slow) == [(1, 2)]
    end = document(count=4, links={2: SLOW, 4: SLOW, 5: SLOW})["links"]
    assert judge.suspects(end) == [(0, 3), (1, 3), (2, 3)]
    assert judge.slow_ranks(document(ranks={2: {"hash_bytes_per_s": 1e8}})["ranks"]) == [2]


def test_the_table_marks_what_the_findings_are_about():
    gpu = {"index": "1", "name": "H100", "temperature.gpu": "91"}
    made = document(hosts={1: {"shm_bytes": 2**25, "gpus": [gpu]}}, links={1: SLOW, 2: SLOW})
    made["fit"] = {"send": {"latency_s": 2e-5, "bytes_per_s": 1e9, "ranks": 2, "error": 0.123}}
    made["notes"] = ["collectives were not timed: there is no torch"]
    lines = report.lines(judge.complete(made))
    head, *rows = (line.removeprefix("preflight: ") for line in lines)
    assert head.split() == [
        "host",
        "ranks",
        "memory",
        "disk",
        "tmp",
        "shm",
        "clock",
        "cpu",
        "copy",
        "latency",
        "send",
        "gpu",
    ]
    marks = [[cell for cell in row.split("  ") if cell.endswith("!")] for row in rows[:3]]
    assert marks == [[], ["32.0 MiB!", "1 x H100!"], ["10 MB/s!"]]
    assert rows[3] == "send of 2 ranks takes 20 us + bytes / 1,000 MB/s (off by 12 %)"
    assert rows[4] == "note: collectives were not timed: there is no torch"
    assert rows[5:8] == [
        "marked: n1 has 32.0 MiB of space in /dev/shm, less than 65.0 MiB",
        "marked: n1: GPU 1 (H100): 91 degrees Celsius",
        "marked: host n2 is slow over every link: 10.0 MB/s at best, 0.01 of the median's (marked below 1/3)",
    ]
    assert rows[8:] == ["3 ranks on 3 hosts can be used; 3 things out of line"]


def test_a_slow_host_s_line_shows_its_links_to_others():
    """Between its own two ranks data are as fast as anywhere."""
    pairs = list(combinations(range(6), 2))
    slow = {number: SLOW for number, (a, b) in enumerate(pairs) if (a // 2 == 2) != (b // 2 == 2)}
    lines = report.lines(judge.complete(document(per_host=2, links=slow)))
    assert [line.split()[-4:-2] for line in lines[1:4]] == [["1,000", "MB/s"], ["1,000", "MB/s"], ["10", "MB/s!"]]


def test_of_very_many_hosts_only_those_in_findings_are_shown():
    made = document(count=100)
    made["hosts"][70]["disk_bytes"] = 0
    lines = report.lines(judge.complete(made))
    assert [line.split()[1] for line in lines[:2]] == ["host", "n70"]
    assert lines[2] == "preflight: and 99 more hosts"
    assert lines[-1] == "preflight: not all ranks can be used, of 100 ranks on 100 hosts: see n70"


def test_many_findings_are_counted():
    made = document(count=30)
    for host in made["hosts"]:
        host["disk_bytes"] = 0
    lines = report.lines(judge.complete(made))
    assert lines[-2] == "preflight: and 10 more" and sum("unusable: n" in line for line in lines) == 20


def test_the_file_is_whole_json(tmp_path):
    path = tmp_path / "new" / "preflight.json"
    report.write(judge.complete(document()), path)
    assert json.loads(path.read_text())["hosts"][0]["name"] == "n0"
    assert [entry.name for entry in path.parent.iterdir()] == ["preflight.json"]

"""Short forms of host names and counts, against what they stand for."""

import random

import pytest

from launcher.hosts.nodelist import compress, expand, expand_counts


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("n1", ["n1"]),
        ("n1,n2.site-a", ["n1", "n2.site-a"]),
        ("a,n[01-03,7]", ["a", "n01", "n02", "n03", "n7"]),
        ("n[9-11]-ib,x[1]", ["n9-ib", "n10-ib", "n11-ib", "x1"]),
        ("r[1-2]n[08-09].x", ["r1n08.x", "r1n09.x", "r2n08.x", "r2n09.x"]),
    ],
)
def test_expand(text, hosts):
    assert expand(text) == hosts


@pytest.mark.parametrize(
    "hosts, text",
    [
        ("n1", "n1"),
        ("n01 n02 n03 n7", "n[01-03],n7"),
        ("n9 n10 n11", "n[9-11]"),
        ("n09 n10 n011 n012", "n[09-10],n[011-012]"),
        ("n99 n100 n0100", "n[99-100],n0100"),
        ("n2 n1 n1 a a", "n2,n1,n1,a,a"),
        ("1 2 a1-ib a2-ib b a", "[1-2],a1-ib,a2-ib,b,a"),
        ("n x0 x1", "n,x[0-1]"),
    ],
)
def test_compress(hosts, text):
    assert compress(hosts.split()) == text and expand(text) == hosts.split()


def test_what_was_compressed_is_expanded_again():
    draw = random.Random(1)
    for _ in range(300):
        hosts = [f"{draw.choice('ab')}{draw.choice(['', '1', '02'])}{draw.randrange(12)}" for _ in range(20)]
        assert expand(compress(sorted(hosts))) == sorted(hosts) and expand(compress(hosts)) == hosts
    many = [f"node{number:05d}" for number in range(10_000)]
    assert compress(many) == "node[00000-09999]" and expand("node[00000-09999]") == many


@pytest.mark.parametrize("text", ["", "n[1-2", "n[]", "n[a-b]", "n1,,n2"])
def test_expand_refuses_what_it_cannot_read(text):
    with pytest.raises(ValueError, match="cannot read the node list"):
        expand(text)


def test_expand_counts():
    assert expand_counts("4(x2),3") == [4, 4, 3]
    with pytest.raises(ValueError, match="Slurm task counts"):
        expand_counts("4x2")

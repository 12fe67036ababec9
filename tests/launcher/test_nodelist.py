"""Short forms of host names and counts, against what they stand for."""

import pytest

from launcher.hosts.nodelist import expand, expand_counts


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


@pytest.mark.parametrize("text", ["", "n[1-2", "n[]", "n[a-b]", "n1,,n2"])
def test_expand_refuses_what_it_cannot_read(text):
    with pytest.raises(ValueError, match="cannot read the node list"):
        expand(text)


def test_expand_counts():
    assert expand_counts("4(x2),3") == [4, 4, 3]
    with pytest.raises(ValueError, match="Slurm task counts"):
        expand_counts("4x2")

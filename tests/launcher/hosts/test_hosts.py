"""Hostfiles in every dialect, against the hosts they mean and the file each MPI gets."""

import pytest

from launcher.hosts.hostfile import Host, check_names, exclude, read_hostfile


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("a\nb\n", [Host("a", None), Host("b", None)]),
        ("a:4\nb:2", [Host("a", 4), Host("b", 2)]),
        ("a slots=4\nb slots=2 max_slots=8", [Host("a", 4), Host("b", 2)]),
        ("a ppn=3", [Host("a", 3)]),
        ("# nodes\n\na:2 # the first\nb   # slots=7\n", [Host("a", 2), Host("b", None)]),
        ("a:2\r\nb slots=2\r\n", [Host("a", 2), Host("b", 2)]),
        ("a:1\nb:1\na:2\n", [Host("a", 3), Host("b", 1)]),
        ("a\na\nb\n", [Host("a", 2), Host("b", None)]),
        ("a\na slots=3\n", [Host("a", 4)]),
        ("n[08-10]:4\nx[1,3]\n", [*(Host(f"n{i}", 4) for i in ("08", "09", "10")), Host("x1", None), Host("x3", None)]),
        ("r[1-2]n[1-2] slots=2", [Host(f"r{i}n{j}", 2) for i in (1, 2) for j in (1, 2)]),
        ("n[1-2]\nn2:3\n", [Host("n1", None), Host("n2", 4)]),
        ("fe80::1 slots=2\n[fe80::2]:3\n[::1]", [Host("fe80::1", 2), Host("fe80::2", 3), Host("::1", None)]),
    ],
)
def test_dialects(text, hosts, tmp_path):
    path = tmp_path / "hosts"
    path.write_bytes(text.encode())
    assert read_hostfile(str(path)) == hosts


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "names no host"),
        ("# only a comment\n", "names no host"),
        ("a:0\n", "line 1: the ranks of 'a:0' must be a whole number from 1 on, got '0'"),
        ("a\nb slots=x\n", "line 2: 'slots=x' of 'b slots=x' is not known"),
        ("a:" + "1" * 5000, "line 1: the ranks of 'a:111"),
        ("a:two", "line 1: the ranks of 'a:two' must be a whole number"),
        ("a b c", "line 1: 'b' of 'a b c' is not known"),
        ("-n 3", "line 1: '-n 3' is no host"),
        ("n[1-", "line 1: 'n[1-' is no host; allowed: host, host:4, host slots=4, n[01-04]:4, # comment"),
        ("n[1-9999999999]", "line 1: 'n[1-9999999999]' is no host"),
        ("a,b", "line 1: 'a,b' is no host"),
    ],
)
def test_a_line_that_is_no_host_is_named(text, sentence, tmp_path):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_hostfile(str(path))
    assert sentence in str(error.value) and str(path) in str(error.value)


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder, not a file"):
        read_hostfile(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        read_hostfile(str(tmp_path / "missing"))


def test_a_host_nobody_knows_is_named():
    check_names([Host("localhost", None)])
    with pytest.raises(ValueError, match="'no-such-host.invalid', whose address cannot be found"):
        check_names([Host("localhost", 1), Host("no-such-host.invalid", 1)])


@pytest.mark.parametrize(
    "lists, left, unknown",
    [
        (["n2"], ["n1", "n3.site", "::1"], []),
        (["n[1-2],n3"], ["::1"], []),
        (["n3.site", "::1"], ["n1", "n2"], []),
        (["n4,n3.other"], ["n1", "n2", "n3.site", "::1"], ["n4", "n3.other"]),
    ],
)
def test_exclude(lists, left, unknown):
    hosts = [Host("n1", 2), Host("n2", None), Host("n3.site", 4), Host("::1", 1)]
    assert exclude(hosts, lists) == ([host for host in hosts if host.name in left], unknown)


def test_exclude_leaves_something():
    with pytest.raises(ValueError, match=r"--exclude n\[1-2\] leaves no host of n1, n2"):
        exclude([Host("n1", 2), Host("n2", None)], ["n[1-2]"])

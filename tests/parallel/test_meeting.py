"""Ranks that meet in threads of one process, and what is said of those that do not come."""

import errno
import socket
import threading

import pytest

from swin_moe.parallel.meeting import _listen, meet


@pytest.fixture
def port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_all_ranks_reach_one_store(port):
    stores = {}

    def come(rank):
        stores[rank] = meet(rank, 3, "127.0.0.1", port, patience=5, timeout=20)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (2, 1, 0)]  # rank 0, which hosts it, last
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    stores[2].set("word", "hello")
    assert stores[0].get("word") == stores[1].get("word") == b"hello"


def test_a_rank_that_does_not_come_is_named(port, capsys):
    with pytest.raises(ValueError, match=r"ranks 1, 2 of 3 did not come within 1 s"):
        meet(0, 3, "127.0.0.1", port, patience=0.3, timeout=1)
    assert "[rank 0] has waited 0 s for ranks 1, 2 of 3" in capsys.readouterr().err


def test_rank_0_that_does_not_come_is_named(port, capsys):
    with pytest.raises(ValueError, match=rf"rank 0 at 127.0.0.1:{port} did not come within 8 s"):
        meet(1, 2, "127.0.0.1", port, patience=0.5, timeout=8)
    assert f"s for rank 0 at 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_port_in_use_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen at 127.0.0.1:{port} \(MASTER_PORT\): the port is in use"):
            meet(0, 2, "127.0.0.1", port, patience=1, timeout=1)


def test_rank_0_listens_at_its_address_alone(port):
    store = meet(0, 1, "127.0.0.1", port, patience=5, timeout=20)
    for address, code in (("127.0.0.1", 0), ("127.0.0.2", errno.ECONNREFUSED)):
        with socket.socket() as probe:
            assert probe.connect_ex((address, port)) == code
    del store


@pytest.mark.parametrize("address", ["localhost", "203.0.113.9"])
def test_where_the_address_is_no_interface_of_this_host_torch_listens(address, port):
    """A name; and the address of a service that leads here, which documentation's own (RFC 5737) stands for."""
    assert _listen(address, port) is None


@pytest.mark.parametrize("address", ["no-such-host.invalid", "x" * 80, "a..b"])
def test_an_address_without_a_host_is_one_sentence(address, port, capfd):
    with pytest.raises(ValueError, match=f"MASTER_ADDR={address}: .*name its own host"):
        meet(0, 2, address, port, patience=1, timeout=2)
    with pytest.raises(ValueError, match=f"rank 0 at {address}:{port} .* did not come within 1 s"):
        meet(1, 2, address, port, patience=0.5, timeout=1)
    assert "frame #" not in capfd.readouterr().err  # torch's stack

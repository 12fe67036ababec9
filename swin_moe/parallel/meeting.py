"""Where the ranks of a world meet, and who is waited for when one of them does not come."""

import errno
import ipaddress
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist

_NAMED = 8  # missing ranks named in a sentence
_POLL_SECONDS = 0.05
_BACKLOG = 16_384  # ranks that may come at once; the kernel lowers it to net.core.somaxconn


def meet(rank: int, world_size: int, address: str, port: int, *, patience: float, timeout: float) -> dist.Store:
    """Returns the store that all ranks have reached; rank 0 hosts it.

    Args:
        patience: Seconds after which this rank says on stderr whom it waits for, and again after as many.
        timeout: Seconds after which it gives up; also the limit of the store's calls from then on.

    Raises:
        ValueError: The address has no host, the port is in use, or a rank did not come in time.
    """
    began = time.monotonic()
    store, listener = None, _listen(address, port) if rank == 0 else None
    while store is None:
        if problem := _unresolved(address):  # before torch asks, which prints its C++ stack
            if rank == 0:
                raise ValueError(f"MASTER_ADDR={address}: {problem}; rank 0 listens there, so name its own host")
            time.sleep(min(patience, timeout))  # names of a job's hosts may come later than the hosts
            _complain(f"rank 0 at {address}:{port} ({problem})", rank, time.monotonic() - began, timeout)
            continue
        try:
            store = dist.TCPStore(
                address,
                port,
                world_size,
                is_master=rank == 0,
                wait_for_workers=False,
                timeout=timedelta(seconds=min(patience, timeout)),
                master_listen_fd=listener,
            )
        except dist.DistNetworkError as error:
            if rank == 0:
                raise _cannot_listen(address, port, _reason(error)) from error
            _complain(f"rank 0 at {address}:{port}", rank, time.monotonic() - began, timeout)
    keys = [f"here/{other}" for other in range(world_size)]
    store.set(keys[rank], "1")
    said = time.monotonic()
    while not store.check(keys):
        time.sleep(_POLL_SECONDS)
        if time.monotonic() - said >= patience or time.monotonic() - began >= timeout:
            said = time.monotonic()
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            if missing:
                _complain(_names(missing, world_size), rank, said - began, timeout)
    store.set_timeout(timedelta(seconds=timeout))
    return store


def _listen(address: str, port: int) -> int | None:
    """Returns the descriptor of a listener at this very address, where torch would listen on every interface.

    None where it is a name, or an address that is not this host's own: a service's in front of it.

    Raises:
        ValueError: The port is in use.
    """
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    except ValueError:
        return None
    try:
        return socket.create_server((address, port), family=family, backlog=_BACKLOG).detach()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _cannot_listen(address, port, "the port is in use") from error
        return None


def _cannot_listen(address: str, port: int, why: str) -> ValueError:
    return ValueError(f"rank 0 cannot listen at {address}:{port} (MASTER_PORT): {why}; choose another port")


def _complain(whom: str, rank: int, waited: float, timeout: float) -> None:
    """Says whom this rank waits for. Raises ValueError when the time is over."""
    if waited >= timeout:
        raise ValueError(f"{whom} did not come within {timeout:.0f} s; is it started, and does the network let it?")
    print(f"[rank {rank}] has waited {waited:.0f} s for {whom}", file=sys.stderr, flush=True)


def _names(missing: list[int], world_size: int) -> str:
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing[:_NAMED]))}{more} of {world_size}"


def _unresolved(address: str) -> str:
    """Returns why a host's name has no address, "" if it has one."""
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:  # the latter: a name of over 63 letters
        return getattr(error, "strerror", None) or "is no name of a host"
    return ""


def _reason(error: Exception) -> str:
    return "the port is in use" if "EADDRINUSE" in str(error) or "in use" in str(error) else str(error).split("\n")[0]

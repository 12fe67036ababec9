"""A gather and a broadcast without MPI, for tasks of srun alone: rank 0 listens where the others can work out to look.

The ports that may be tried follow from the job and the step, or are those Slurm reserved (srun --resv-ports); both
sides say which step they belong to, so a port that somebody else holds is passed over and no fixed one is needed.
"""

import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from launcher.env import parse_slurm
from launcher.hosts.nodelist import expand

_CANDIDATES = 16
_FIRST_PORT, _PORTS = 20_000, 20_000  # 20000-39999: above usual services, mostly below Linux's ephemeral range
_GREETING_SECONDS = 2.0
_PAUSE_SECONDS = 0.05
_PATIENCE_SECONDS = 300.0  # as long as a slow file system may keep one task's Python from starting


def gather(
    environ: Mapping[str, str],
    facts: dict[str, Any],
    decide: Callable[[list[dict[str, Any]]], dict[str, Any]],
    *,
    seconds: float = _PATIENCE_SECONDS,
) -> dict[str, Any]:
    """Returns what rank 0's `decide` made of the facts of all tasks of the step, on every task.

    Raises:
        ValueError: The variables are no step's, or not every task came in time.
    """
    env = parse_slurm(environ)
    token = f"launcher {environ.get('SLURM_JOB_ID', 0)}.{environ.get('SLURM_STEP_ID', 0)}"
    ports = _ports(environ, env.master_port)
    deadline = time.monotonic() + seconds
    if env.rank == 0:
        return _serve(env.master_addr, ports, token, env.world_size, facts, decide, deadline)
    return _ask(env.master_addr, ports, token, env.rank, facts, deadline)


def _ports(environ: Mapping[str, str], first: int) -> list[int]:
    reserved = environ.get("SLURM_STEP_RESV_PORTS", "")
    if reserved:
        return [int(port) for port in expand(f"[{reserved}]")]
    return [_FIRST_PORT + (first - _FIRST_PORT + 997 * number) % _PORTS for number in range(_CANDIDATES)]


def _serve(
    host: str, ports: list[int], token: str, world: int, facts: dict, decide: Callable, deadline: float
) -> dict[str, Any]:
    listener = _listen(host, ports)
    known, waiting = {0: facts}, []
    with listener:
        while len(known) < world:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = [rank for rank in range(world) if rank not in known]
                raise ValueError(f"of {world} tasks of srun, {missing[:8]} did not come to rank 0") from None
            heard = _greet(connection, token)
            if heard is None or not 0 < int(heard.get("rank", 0)) < world:
                connection.close()
                continue
            known[int(heard["rank"])] = heard["facts"]
            waiting.append(connection)
    decision = decide([known[rank] for rank in range(world)])
    for connection in waiting:
        with connection:
            connection.sendall(json.dumps(decision).encode() + b"\n")
    return decision


def _greet(connection: socket.socket, token: str) -> dict[str, Any] | None:
    """Returns what a task says after both sides named their step; None for anyone else."""
    connection.settimeout(_GREETING_SECONDS)
    try:
        connection.sendall(f"{token}\n".encode())
        with connection.makefile("r") as lines:
            return json.loads(lines.readline()) if lines.readline().strip() == token else None
    except (OSError, ValueError):
        return None


def _ask(host: str, ports: list[int], token: str, rank: int, facts: dict, deadline: float) -> dict[str, Any]:
    message = f"{token}\n{json.dumps({'rank': rank, 'facts': facts})}\n".encode()
    number = 0
    while time.monotonic() < deadline:
        answer = _ask_at(host, ports[number % len(ports)], token, message, deadline)
        if answer is not None:
            return answer
        number += 1
        if number % len(ports) == 0:
            time.sleep(_PAUSE_SECONDS)
    raise ValueError(f"task {rank} of srun did not find rank 0 on {host}; is the name known here, and the way open?")


def _ask_at(host: str, port: int, token: str, message: bytes, deadline: float) -> dict[str, Any] | None:
    try:
        with socket.create_connection((host, port), timeout=_GREETING_SECONDS) as connection:
            with connection.makefile("r") as lines:
                if lines.readline().strip() != token:
                    return None
                connection.sendall(message)
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                return json.loads(lines.readline())
    except (OSError, ValueError):
        return None


def _listen(host: str, ports: list[int]) -> socket.socket:
    """Returns a listener on the addresses that the name stands for here; on all where it stands for the loopback only,
    as Debian has it, while others reach it by another."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    addresses = [address[0] for *_, address in found]
    usable = [address for address in addresses if host == "127.0.0.1" or not str(address).startswith("127.")]
    for port in ports:
        for address in usable[:1] or [""]:
            family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
            try:
                return socket.create_server((str(address), port), family=family, backlog=1024)
            except OSError:
                continue
    raise ValueError(f"rank 0 can listen at none of the ports {ports[0]}, ... of {host}")

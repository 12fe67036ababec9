"""One rank of the checks: started by the launcher as a job of its own, or taking part as a rank of a program."""

import json
import os
import sys
import threading
from typing import Any

from launcher import ending, guard, watch
from launcher.env import RankEnv, rank_of
from launcher.failure import line
from launcher.failure.kinds import CONFIGURATION, HOST
from launcher.preflight import judge, report
from launcher.preflight.conduct import Conductor, Settings
from launcher.preflight.hub import Hub, Member
from launcher.preflight.member import facts, take_part

_PATIENCE = 600.0  # seconds until rank 0 of a program gives orders; it may have something else to do before
ORDERS = "LAUNCHER_PREFLIGHT"  # JSON: where the launcher gives orders, and the folder of the run


def main() -> None:
    """Runs the checks as a rank that the launcher started; it meets the others nowhere but over the launcher."""
    if watch.WATCHED in os.environ:
        watch.start_watching(os.environ[watch.WATCHED])
    rank, given = rank_of(os.environ), json.loads(os.environ[ORDERS])
    guard.ended()
    if not rank.isdigit():
        ending.fail("launcher: whatever starts the ranks does not tell them their number", CONFIGURATION)
    try:
        places = [(address, port) for address, port in given["places"]]
        member = Member(places, os.environ.get(line.TOKEN, ""), int(rank), facts(os.environ), seconds=given["seconds"])
        last = take_part(member, given["folder"])
    except OSError as error:
        print(f"[rank {rank}] preflight: no way to the launcher: {error}", file=sys.stderr, flush=True)
        sys.exit(HOST)
    sys.exit(last["code"])


def on_ranks(env: RankEnv, settings: Settings, *, otherwise: int = 0) -> tuple[int, dict[str, Any] | None]:
    """Returns (exit code, the document on rank 0), having checked the ranks of a running program.

    Rank 0 gives the orders from a thread, at the address and port where the ranks are to meet (mpi.bootstrap).

    Args:
        otherwise: The code of all ranks where the checks find nothing; rank 0's counts.

    Raises:
        ValueError: The port is taken, as under torchrun, or rank 0 cannot be reached there.
    """
    token = os.environ.get(line.TOKEN) or f"{env.master_addr} {env.master_port}"
    places = [(env.master_addr, env.master_port)]
    found: list[dict[str, Any]] = []

    def give_orders() -> None:
        found.append(conduct(hub, Conductor(hub, settings), otherwise))

    if env.rank == 0:
        try:
            hub = Hub([env.master_addr], env.world_size, token, env.master_port)
        except OSError as error:
            where = f"{env.master_addr} port {env.master_port} (MASTER_ADDR, MASTER_PORT)"
            raise ValueError(
                f"rank 0 cannot listen at {where}: {error.strerror}; torchrun keeps that port for itself, so start the "
                "checks with mpirun, srun or python -m launcher --preflight"
            ) from error
        thread = threading.Thread(target=give_orders, name="launcher-preflight-orders", daemon=True)
        thread.start()
        places = hub.places  # of a process alone, which nobody gave a port
    try:
        last = take_part(Member(places, token, env.rank, facts(os.environ), seconds=_PATIENCE), os.getcwd())
    except OSError as error:
        raise ValueError(f"rank {env.rank} lost rank 0, which gives the orders: {error}") from error
    if env.rank:
        return last["verdict"], None
    thread.join()
    print("\n".join(report.lines(found[0])), flush=True)
    return last["verdict"], found[0]


def conduct(hub: Hub, conductor: Conductor, otherwise: int = 0) -> dict[str, Any]:
    """Returns the document of the checks, having dismissed the ranks with the verdict.

    Ranks that the launcher started leave with a code other than 0 only where some are lost.
    """
    try:
        document = conductor.run()
        verdict = otherwise if judge.is_usable(document) else HOST
        hub.dismiss({"do": "end", "verdict": verdict, "code": HOST if hub.lost else 0})
        return document
    finally:
        hub.close()


if __name__ == "__main__":
    guard.run(main)

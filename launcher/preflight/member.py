"""What a rank does for the preflight: a row of ACTIONS for each order it may get."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launcher.machine.network import address_towards, read_place
from launcher.machine.topology import read_machine
from launcher.meeting.rendezvous import INTERFACES, free_port
from launcher.preflight import collectives, gpu, pairs, resources
from launcher.preflight.collectives import Transport
from launcher.preflight.hub import Member
from launcher.preflight.pairs import Listener, Target


@dataclass
class State:
    """What a rank keeps between orders."""

    member: Member
    folder: str  # of the run
    address: str = ""
    listener: Listener | None = None
    transport: Transport | None = None


def facts(environ: Mapping[str, str]) -> dict[str, Any]:
    """Returns what a rank says of itself first."""
    machine = read_machine(environ)
    wanted = next((environ[name] for name in reversed(INTERFACES) if environ.get(name)), "")
    return {
        "pid": os.getpid(),
        "place": asdict(read_place()),
        "wanted": wanted,
        "cores": len(machine.cores),
        "gpus": len(machine.gpus),
        "transports": collectives.available(environ, bool(machine.gpus)),
    }


def take_part(member: Member, folder: str) -> dict[str, Any]:
    """Returns the last order, having carried out all before. Raises OSError where whoever gives them is gone."""
    state = State(member, folder)
    try:
        return member.serve(lambda order: ACTIONS[order["do"]](state, order))
    finally:
        if state.listener is not None:
            state.listener.close()


def _route(state: State, order: dict[str, Any]) -> str:
    """Returns the address from which packets to the first host leave that there is a way to; "" = to none."""
    return next(filter(None, map(address_towards, order["hosts"])), "")


def _read(state: State, order: dict[str, Any]) -> dict[str, Any]:
    found, note = gpu.read_gpus(len(read_machine(os.environ).gpus))
    return resources.read_checks(state.folder) | {"gpus": found, "gpu_note": note}


def _clock(state: State, order: dict[str, Any]) -> tuple[float, float]:
    return state.member.clock()


def _listen(state: State, order: dict[str, Any]) -> dict[str, Any]:
    state.address = order["address"]
    collectives.tell_interface(order["interface"])
    try:
        state.listener = Listener(state.address, state.member.token, state.member.rank)
        return {"port": state.listener.port, "spare": free_port(state.address)}
    except (OSError, ValueError) as error:
        return {"problem": f"cannot listen at {state.address}: {getattr(error, 'strerror', None) or error}"}


def _reach(state: State, order: dict[str, Any]) -> list[tuple[int, str]]:
    targets = [Target(*target) for target in order["targets"]]
    return list(pairs.reach(targets, state.member.token, state.address).items())


def _measure(state: State, order: dict[str, Any]) -> dict[str, Any]:
    return pairs.measure(Target(*order["target"]), state.member.token, state.address)


def _pace(state: State, order: dict[str, Any]) -> dict[str, float]:
    return resources.read_paces()


def _open(state: State, order: dict[str, Any]) -> str:
    """Returns why the ranks cannot meet over this transport, "" where they do."""
    transport = collectives.TRANSPORTS[order["transport"]]()
    try:
        transport.open(state.member.rank, order["world"], order["local_rank"], order["address"], order["port"])
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    state.transport = transport
    return ""


def _collective(state: State, order: dict[str, Any]) -> list[float]:
    assert state.transport is not None
    return collectives.run(state.transport, order["kind"], order["size"], order["repeats"])


def _close(state: State, order: dict[str, Any]) -> None:
    assert state.transport is not None
    state.transport.close()


ACTIONS = {
    "route": _route,
    "read": _read,
    "clock": _clock,
    "listen": _listen,
    "reach": _reach,
    "measure": _measure,
    "pace": _pace,
    "open": _open,
    "collective": _collective,
    "close": _close,
}

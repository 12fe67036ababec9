"""Runs the checks as a job of their own before a program's, and has the program start without hosts that failed."""

import argparse
import json
import os
import signal
import sys
import threading
import time
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import restart, supervise
from launcher.failure import line, orphans
from launcher.failure.kinds import HOST
from launcher.job.options import lost_seconds
from launcher.job.prepare import Prepared, arrange
from launcher.job.reachable import dead_hosts, other_hosts
from launcher.machine.network import addresses_towards
from launcher.preflight import judge, report
from launcher.preflight.conduct import LOOPBACK, Conductor, Settings
from launcher.preflight.hub import Hub
from launcher.preflight.rank import ORDERS, conduct
from launcher.supervise import Limits, Outcome, World

_RANK = "launcher.preflight.rank"  # the module that every rank runs
_LEAVING_SECONDS = 1.0
_FILE = "preflight.json"  # in --log-dir


def check(options: argparse.Namespace) -> None:
    """Raises ValueError, one sentence, where the file could not be written in the end."""
    path = _file(options)
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() or not os.access(path.parent, os.W_OK):
                raise OSError(0, "it is a folder" if path.is_dir() else "its folder may not be written to")
    except OSError as error:
        raise ValueError(f"the preflight's file {path} cannot be written: {error.strerror}") from error


def run(job: Prepared, options: argparse.Namespace) -> tuple[int, Prepared]:
    """Returns (0 where the job may start, else its exit code; the job, without hosts that failed where it may restart).

    Raises:
        ValueError: The launcher cannot be reached by its ranks, or too few hosts remain.
    """
    outcome, document = _run_checks(job, options)
    if document is None:
        _say([outcome.describe()])
        return outcome.code, job
    _say(report.lines(document))
    _write(document, options)
    if outcome.asked_to_stop or judge.is_usable(document):
        return outcome.code, job
    hosts = document["unusable_hosts"]
    if not options.restarts or not hosts or not job.plan.hosts:
        return HOST, job
    job = restart.without(job, options, hosts)
    ranks = len(job.plan.ranks)
    _say([f"launcher: starting with {ranks} rank{'s' * (ranks > 1)}, without {', '.join(hosts)}"])
    return 0, job


def _run_checks(job: Prepared, options: argparse.Namespace) -> tuple[Outcome, dict[str, Any] | None]:
    """Returns (how the job of the checks ended, the document; None where it failed for no rank's reason)."""
    token = job.job.environment[line.TOKEN]
    hosts = {rank.rank: rank.host for rank in job.plan.ranks}
    hub = _listen(job, token)
    conductor = Conductor(hub, Settings(options.preflight_over, options.preflight_limit), hosts.__getitem__)
    found: list[dict[str, Any]] = []
    # The thread must not take the signals that `supervise` waits for.
    signal.pthread_sigmask(signal.SIG_BLOCK, supervise.STOP)

    def give_orders() -> None:
        found.append(conduct(hub, conductor))
        if hub.lost:  # MPIs wait for ranks that hang before they met; the others leave by themselves
            time.sleep(_LEAVING_SECONDS)
            orphans.sweep(token)

    thread = threading.Thread(target=give_orders, name="launcher-preflight-orders", daemon=True)
    thread.start()
    checks = _job_of_checks(job, options, hub)
    try:
        checks.write_hostfile()
        outcome = supervise.supervise(
            checks.command,
            checks.environment(os.environ),
            flavor=checks.mpi.flavor,
            limits=Limits(options.grace, stall=options.stall, lost=lost_seconds(options)),
            world=World(len(hosts), other_hosts(job)),
        )
    finally:
        checks.remove_hostfile()
        hub.stop()
        thread.join()
    document = found[0]
    if document["complete"] or outcome.asked_to_stop:
        return replace(outcome, code=outcome.code if outcome.asked_to_stop else 0), document
    for name in dead_hosts(job):
        judge.blame(
            document, name, [r for r, host in hosts.items() if host == name], f"nothing can be started on {name}"
        )
    return outcome, document if not judge.is_usable(document) else None


def _listen(job: Prepared, token: str) -> Hub:
    """Returns a hub at the addresses of this host from which packets to the ranks' hosts leave."""
    names = other_hosts(job)
    addresses = list(addresses_towards(names))
    if len(names) < max(1, len(job.plan.hosts)):
        addresses.append(LOOPBACK)
    if not addresses:
        raise ValueError(f"this host has no way to {', '.join(names[:4])}; are the names known here?")
    try:
        return Hub(addresses, len(job.plan.ranks), token)
    except OSError as error:
        raise ValueError(f"the launcher cannot listen at {', '.join(addresses)}: {error.strerror}") from error


def _job_of_checks(job: Prepared, options: argparse.Namespace, hub: Hub) -> Prepared:
    quiet = copy(options)
    quiet.quiet = quiet.no_compare = True  # the program's own start says it all
    folder = str(Path(options.log_dir or ".").absolute())
    given = {"places": hub.places, "folder": folder, "seconds": options.preflight_limit}
    environment = job.job.environment | {ORDERS: json.dumps(given)}
    asked = replace(job.job, program=[], rank_module=_RANK, environment=environment)
    return arrange(asked, job.mpi, job.plan.hosts, quiet)


def _write(document: dict[str, Any], options: argparse.Namespace) -> None:
    path = _file(options)
    if path is not None:
        try:
            report.write(document, path)
        except OSError as error:  # its disk is full: no reason to keep the program from starting
            _say([f"launcher: the preflight's file {path} cannot be written: {error.strerror}"])


def _file(options: argparse.Namespace) -> Path | None:
    if options.preflight_file:
        return Path(options.preflight_file)
    return Path(options.log_dir, _FILE) if options.log_dir else None


def _say(lines: list[str]) -> None:
    print("\n".join(lines), file=sys.stderr, flush=True)

"""The document on the screen: a line for each host, what is out of line marked, and a sentence for each finding."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.job.plan import columns
from launcher.machine.topology import short_list
from launcher.preflight.judge import is_usable, mib
from launcher.preflight.resources import CHECKS, PACES

_MOST_FINDINGS = 20
_MOST_HOSTS = 64  # beyond, only those with findings


def lines(document: dict[str, Any]) -> list[str]:
    """Returns the lines: table, cost models, what was left out, findings, and the verdict."""
    hosts = document["hosts"]
    named = {finding["host"] for finding in document["findings"]}
    shown = [host for host in hosts if len(hosts) <= _MOST_HOSTS or host["name"] in named][:_MOST_HOSTS]
    said = columns([_HEAD, *(_row(host, document) for host in shown)])
    if len(shown) < len(hosts):
        said.append(f"and {len(hosts) - len(shown)} more hosts")
    said += [_model(kind, found) for kind, found in document["fit"].items()]
    said += [f"note: {words}" for words in document["notes"]]
    findings = [f"{finding['severity']}: {finding['words']}" for finding in document["findings"]]
    more = [f"and {len(findings) - _MOST_FINDINGS} more"] if len(findings) > _MOST_FINDINGS else []
    return [f"preflight: {line}" for line in [*said, *findings[:_MOST_FINDINGS], *more, verdict(document)]]


def verdict(document: dict[str, Any]) -> str:
    """Returns the last sentence."""
    ranks, hosts = len(document["ranks"]), len(document["hosts"])
    what = f"{ranks} rank{'s' * (ranks != 1)} on {hosts} host{'s' * (hosts != 1)}"
    marked = sum(finding["severity"] == "marked" for finding in document["findings"])
    if not is_usable(document):
        return f"not all ranks can be used, of {what}: see {', '.join(document['unusable_hosts']) or 'above'}"
    return f"{what} can be used" + (f"; {marked} thing{'s' * (marked != 1)} out of line" if marked else "")


def write(document: dict[str, Any], path: Path) -> None:
    """Writes the file whole, or not at all; a device or pipe is written to, not replaced. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    special = path.exists() and not path.is_file()
    draft = path if special else path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(document, indent=1) + "\n")
    if not special:
        draft.replace(path)


_FREE, _PACE = [check.title for check in CHECKS], [pace.title for pace in PACES]
_HEAD = ("host", "ranks", *_FREE, "clock", *_PACE, "latency", "send", "gpu")


def _row(host: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """Returns the cells of a host: free bytes, its slowest rank's paces, its best link; ! = see the findings.

    Of several hosts the links to others count: a slow adapter does not show between two ranks of its host.
    """
    ranks = [rank for rank in document["ranks"] if rank["host"] == host["name"]]
    links = [link for link in document["links"] if host["name"] in link["hosts"] and link["bytes_per_s"]]
    if len(document["hosts"]) > 1:
        links = [link for link in links if len({*link["hosts"]}) > 1]
    cells = {"host": host["name"], "ranks": short_list(host["ranks"]), "gpu": _gpus(host), "latency": "-", "send": "-"}
    for check in CHECKS:
        cells[check.title] = "-" if host.get(check.name) is None else mib(host[check.name])
    cells["clock"] = f"{host['clock_offset_s']:+.3f} s" if "clock_offset_s" in host else "-"
    for pace in PACES:
        values = [rank[pace.name] for rank in ranks if pace.name in rank]
        cells[pace.title] = f"{min(values) / 1e9:,.2f} GB/s" if values else "-"
    if links:
        cells["latency"] = f"{1e6 * min(link['latency_s'] for link in links):,.0f} us"
        cells["send"] = f"{max(link['bytes_per_s'] for link in links) / 1e6:,.0f} MB/s"
    marked = {finding["about"] for finding in document["findings"] if _concerns(finding, host)}
    return [f"{cells[title]}{'!' * (title in marked)}" for title in _HEAD]


def _concerns(finding: dict[str, Any], host: dict[str, Any]) -> bool:
    return finding["host"] == host["name"] if finding["host"] else bool({*finding["ranks"]} & {*host["ranks"]})


def _gpus(host: dict[str, Any]) -> str:
    gpus: Sequence[dict[str, Any]] = host.get("gpus", ())
    return f"{len(gpus)} x {gpus[0].get('name', '?')}" if gpus else host.get("gpu_note", "-")


def _model(kind: str, found: dict[str, Any]) -> str:
    model = f"{1e6 * found['latency_s']:,.0f} us + bytes / {found['bytes_per_s'] / 1e6:,.0f} MB/s"
    return f"{kind} of {found['ranks']} ranks takes {model} (off by {100 * found['error']:.0f} %)"

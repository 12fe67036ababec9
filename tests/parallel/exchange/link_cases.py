"""What every rank runs to check rows and gradients through a link: payloads, counters, errors, order."""

import copy

import torch
import torch.distributed as dist

from swin_moe.config import ParallelConfig
from swin_moe.moe.phases import PhaseClock
from swin_moe.parallel.exchange.link import EXPOSED, Link, RowExchange, receive_rows, send_and_receive, send_rows
from swin_moe.parallel.exchange.payload import PAYLOADS
from swin_moe.parallel.exchange.transport import build_transport
from swin_moe.parallel.groups import build_groups

DIM = 16
HOSTS = {1: (0,), 2: (0, 1), 4: (0, 0, 0, 1)}


def open_link(kind, payload, hosts):
    parallel = ParallelConfig(expert=len(hosts))
    groups = build_groups(parallel, len(hosts), torch.device("cpu"), two_hops=True, hosts=hosts)
    return Link(build_transport(kind, groups)[0], payload)


def counts(world, scale=1, silent=None):
    """Returns (R, R) rows from a rank to a rank, some of them none; the rank `silent` sends none."""
    return [[scale * ((3 * s + 2 * d) % 4) * (s != silent) for d in range(world)] for s in range(world)]


def make_plan(link, count_RR):
    rank, world = dist.get_rank(), len(count_RR)
    relayed = link.transport.relayed(torch.tensor(count_RR[rank])[None])
    arriving = [[count_RR[s][rank]] for s in range(world)]
    return link.transport.plan(count_RR[rank], arriving, relayed[:, 0].tolist(), torch.device("cpu"))


def rows_of(rank, count_RR):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(sum(count_RR[rank]), DIM, generator=generator, dtype=torch.float32)


def carried(payload, rows):
    codec = PAYLOADS[payload]
    return rows if codec is None else codec.decode(codec.encode(rows), rows.dtype)


def check_exchange(kind, payload, silent=None):
    """Rows arrive as the codec leaves them, gradients likewise; counters and errors say what happened."""
    rank, world = dist.get_rank(), dist.get_world_size()
    hosts, count = HOSTS[world], counts(world, silent=silent)
    link = open_link(kind, payload, hosts)
    plan = make_plan(link, count)
    link.clock = PhaseClock(torch.device("cpu"))
    rows = rows_of(rank, count).requires_grad_()
    arrived = send_and_receive(rows, link, plan)
    sent = [carried(payload, rows_of(s, count)) for s in range(world)]
    wanted = torch.cat([sent[s].split(count[s])[rank] for s in range(world)])
    assert torch.equal(arrived.detach(), wanted)
    arrived.backward(2 * arrived.detach())
    back = [carried(payload, 2 * sent[rank].split(count[rank])[d]) for d in range(world)]
    assert torch.equal(rows.grad, torch.cat(back))

    traffic, rounding = link.take()
    row_bytes = {"none": 4 * DIM, "bf16": 2 * DIM, "fp8": DIM + 4}[payload]
    to = [count[rank][d] + count[d][rank] for d in range(world)]  # rows forward, gradients back
    crossing = [0.0] * world
    crossing[rank] = float(traffic.crossing_bytes)
    crossing = torch.tensor(crossing)
    dist.all_reduce(crossing)
    total = sum(count[s][d] + count[d][s] for s in range(world) for d in range(world) if hosts[s] != hosts[d])
    assert int(crossing.sum()) == row_bytes * total
    if link.transport.name == "linear":
        assert traffic.sent_bytes == row_bytes * (sum(to) - to[rank])
        assert traffic.crossing_bytes == row_bytes * sum(n for n, h in zip(to, hosts) if h != hosts[rank])
    if payload == "none" or not len(rows):
        assert payload != "none" or rounding == {}
    else:
        expected = (carried(payload, rows.detach()) - rows.detach()).square().sum() / rows.detach().square().sum()
        torch.testing.assert_close(rounding["rows"][0] / rounding["rows"][1], expected)
        assert rounding["gradients"].shape == (2,)
    assert link.take() == (type(traffic)(), {})
    assert link.clock.seconds()[EXPOSED] > 0


def check_ids(kind, payload):
    """Ids are never rounded, whatever the payload."""
    rank, world = dist.get_rank(), dist.get_world_size()
    count = counts(world)
    link = open_link(kind, payload, HOSTS[world])
    ids = 2**40 + 1 + torch.arange(sum(count[rank])) + 1000 * rank
    found = link.exchange(ids, make_plan(link, count))
    everyone = [2**40 + 1 + torch.arange(sum(count[s])) + 1000 * s for s in range(world)]
    assert torch.equal(found, torch.cat([everyone[s].split(count[s])[rank] for s in range(world)]))


def check_several(kind, payload):
    """Several exchanges at once give what they give one by one, in both directions; a copy counts for itself."""
    rank, world = dist.get_rank(), dist.get_world_size()
    link = open_link(kind, payload, HOSTS[world])
    sizes = [counts(world, scale) for scale in (1, 0, 3)]
    plans = [make_plan(link, size) for size in sizes]
    inputs = [rows_of(rank, size) for size in sizes]

    def run(together):
        xs = [x.clone().requires_grad_() for x in inputs]
        exchanges = [RowExchange(link, plan) for plan in plans]
        if together:
            sent = [send_rows(x, exchange) for x, exchange in zip(xs, exchanges)]
            ys = [receive_rows(d, exchange) for d, exchange in zip(sent, exchanges)]
        else:
            ys = [receive_rows(send_rows(x, exchange), exchange) for x, exchange in zip(xs, exchanges)]
        sum((y.square().sum() for y in ys), torch.zeros(())).backward()
        return [*ys, *(x.grad for x in xs)]

    for together, apart in zip(run(True), run(False)):
        assert torch.equal(together, apart)
    twin = copy.deepcopy(link)
    assert twin.transport is link.transport and twin.payload == payload
    assert twin.traffic.sent_bytes == 0 and twin.traffic is not link.traffic


def run_world():
    for kind in ("linear", "hierarchical"):
        for payload in PAYLOADS:
            check_exchange(kind, payload)
            check_exchange(kind, payload, silent=0)  # it relays all the same
            check_ids(kind, payload)
            check_several(kind, payload)

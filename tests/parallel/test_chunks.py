"""The order of what happens to chunks, on one process: hops that lead nowhere. Results on ranks: tests/equivalence."""

import pytest
import torch

from swin_moe.moe.experts import GroupedExperts
from swin_moe.parallel.exchange.link import Link
from swin_moe.parallel.exchange.overlap import ChunkTravel
from swin_moe.parallel.exchange.transport import Hop, Route


class Noted(torch.autograd.Function):
    """Rows as they are; notes a chunk's turn in forward and in backward."""

    @staticmethod
    def forward(ctx, rows, notes, chunk):
        ctx.notes, ctx.chunk = notes, chunk
        notes.append(f"compute {chunk}")
        return rows.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.notes.append(f"gradient {ctx.chunk}")
        return grad.clone(), None, None


class NotedLink(Link):
    def __init__(self, notes):
        super().__init__(None, "none")
        self.notes = notes

    def launch(self, rows, route, *, gradient=False):
        self.notes.append("start")
        return super().launch(rows, route, gradient=gradient)

    def land(self, flying):
        self.notes.append("wait")
        return super().land(flying)


def nowhere(rows):
    return Route((Hop(None, [rows], [rows], (False,), 0),), (None, None))


def test_every_chunk_is_under_way_before_the_first_is_computed_in_both_directions():
    notes = []
    travel = ChunkTravel(NotedLink(notes), [nowhere(2), nowhere(0), nowhere(1)])
    tokens = torch.arange(6.0).view(3, 2).requires_grad_()
    departed = travel.start(tokens)
    assert notes == ["start"] * 3
    notes.clear()
    home = []
    for chunk, stand_in in enumerate(departed):
        home.append(travel.depart(chunk, Noted.apply(travel.arrive(chunk, stand_in), notes, chunk)))
    y = travel.finish(home)
    per_chunk = [["wait", f"compute {chunk}", "start"] for chunk in range(3)]
    assert notes == [*sum(per_chunk, []), *["wait"] * 3]
    assert torch.equal(y, tokens)
    notes.clear()
    (3 * y).sum().backward()
    per_chunk = [["wait", f"gradient {chunk}", "start"] for chunk in (2, 1, 0)]
    assert notes == [*["start"] * 3, *sum(per_chunk, []), *["wait"] * 3]
    assert torch.equal(tokens.grad, torch.full((3, 2), 3.0))


def test_experts_compute_chunks_with_one_copy_of_their_weights():
    torch.manual_seed(0)
    experts = GroupedExperts(4, 6, 2, fc2_bias=True).double()
    for p in experts.parameters():
        torch.nn.init.normal_(p)
    gathered = []
    experts.gather = lambda p, name: gathered.append(name) or p
    tokens = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    counts = [torch.tensor([1, 2]), torch.tensor([3, 1])]
    travel = ChunkTravel(NotedLink([]), [nowhere(3), nowhere(4)])
    y = travel.finish(experts(travel.start(tokens), counts, None, travel))
    assert len(gathered) == 4
    apart = torch.cat([experts(part, count) for part, count in zip(tokens.split([3, 4]), counts)])
    torch.testing.assert_close(y, apart)
    wanted = [tokens, *experts.parameters()]
    for found, expected in zip(torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(apart.sum(), wanted)):
        torch.testing.assert_close(found, expected)


def test_flights_land_in_order():
    link = NotedLink([])
    first, second = link.launch(torch.ones(1, 1), nowhere(1)), link.launch(torch.ones(1, 1), nowhere(1))
    with pytest.raises(AssertionError, match="land in the order"):
        link.land(second)
    assert torch.equal(link.land(first), torch.ones(1, 1))

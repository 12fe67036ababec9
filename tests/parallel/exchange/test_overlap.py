"""The order of what happens to slices, on one process: calls of no group. Results on ranks: tests/equivalence."""

import pytest
import torch

from swin_moe.moe.experts import GroupedExperts
from swin_moe.parallel.exchange.link import Link
from swin_moe.parallel.exchange.overlap import SlicedExchange
from swin_moe.parallel.exchange.transport import AllToAll, ExchangePlan


class Noted(torch.autograd.Function):
    """Rows as they are; notes a slice's turn in forward and in backward."""

    @staticmethod
    def forward(ctx, rows, notes, number):
        ctx.notes, ctx.number = notes, number
        notes.append(f"compute {number}")
        return rows.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.notes.append(f"gradient {ctx.number}")
        return grad.clone(), None, None


class NotedLink(Link):
    def __init__(self, notes):
        super().__init__(None, "none")
        self.notes = notes

    def send(self, rows, plan, *, gradient=False):
        self.notes.append("start")
        return super().send(rows, plan, gradient=gradient)

    def receive(self, sent):
        self.notes.append("wait")
        return super().receive(sent)


def nowhere(rows):
    return ExchangePlan((AllToAll(None, [rows], [rows], (False,), 0),), (None, None))


def test_every_slice_is_under_way_before_the_first_is_computed_in_both_directions():
    notes = []
    exchange = SlicedExchange(NotedLink(notes), [nowhere(2), nowhere(0), nowhere(1)])
    tokens = torch.arange(6.0).view(3, 2).requires_grad_()
    sent = exchange.start(tokens)
    assert notes == ["start"] * 3
    notes.clear()
    back = []
    for number, stand_in in enumerate(sent):
        back.append(exchange.send(number, Noted.apply(exchange.receive(number, stand_in), notes, number)))
    y = exchange.finish(back)
    per_slice = [["wait", f"compute {number}", "start"] for number in range(3)]
    assert notes == [*sum(per_slice, []), *["wait"] * 3]
    assert torch.equal(y, tokens)
    notes.clear()
    (3 * y).sum().backward()
    per_slice = [["wait", f"gradient {number}", "start"] for number in (2, 1, 0)]
    assert notes == [*["start"] * 3, *sum(per_slice, []), *["wait"] * 3]
    assert torch.equal(tokens.grad, torch.full((3, 2), 3.0))


def test_experts_compute_slices_with_one_copy_of_their_weights():
    torch.manual_seed(0)
    experts = GroupedExperts(4, 6, 2, fc2_bias=True).double()
    for p in experts.parameters():
        torch.nn.init.normal_(p)
    gathered = []
    experts.gather = lambda p, name: gathered.append(name) or p
    tokens = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    counts = [torch.tensor([1, 2]), torch.tensor([3, 1])]
    exchange = SlicedExchange(NotedLink([]), [nowhere(3), nowhere(4)])
    y = exchange.finish(experts(exchange.start(tokens), counts, None, exchange))
    assert len(gathered) == 4
    apart = torch.cat([experts(part, count) for part, count in zip(tokens.split([3, 4]), counts)])
    torch.testing.assert_close(y, apart)
    wanted = [tokens, *experts.parameters()]
    for found, expected in zip(torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(apart.sum(), wanted)):
        torch.testing.assert_close(found, expected)


def test_rows_are_received_in_order():
    link = NotedLink([])
    first, second = link.send(torch.ones(1, 1), nowhere(1)), link.send(torch.ones(1, 1), nowhere(1))
    with pytest.raises(AssertionError, match="received in the order"):
        link.receive(second)
    assert torch.equal(link.receive(first), torch.ones(1, 1))

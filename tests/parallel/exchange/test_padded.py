"""The padded backend without ranks; on ranks: tests/equivalence/test_backend_vs_backend.py."""

import copy

import pytest
import torch

from swin_moe.config import MoEConfig, ParallelConfig
from swin_moe.moe.dispatch import VERBS, LocalDispatcher, PaddedDispatcher, make_padded_order
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.routing import route
from swin_moe.parallel.apply import parallelize
from swin_moe.parallel.exchange.link import Link
from swin_moe.parallel.exchange.overlap import order_by_slice
from swin_moe.parallel.exchange.padded import PaddedAllToAll
from swin_moe.parallel.exchange.transport import LinearTransport
from swin_moe.parallel.groups import Degrees, Groups, single_process_groups

CPU = torch.device("cpu")


@pytest.mark.parametrize(("backend", "kind"), [("padded", PaddedDispatcher), ("native", LocalDispatcher)])
def test_one_rank_pads_before_and_after_parallelize(backend, kind):
    layer = MoELayer(4, 8, MoEConfig(num_experts=3, backend=backend), fc2_bias=True, layer=0, init_std=0.5)
    assert type(layer.dispatcher) is kind
    assert type(parallelize(layer, ParallelConfig(), single_process_groups()).dispatcher) is kind


def test_slices_of_padded_rows_by_hand():
    # Token 0 chooses expert 0, tokens 1 and 2 expert 1; three rows each:  a . . | b c .
    routing = route(torch.tensor([[5.0, 0.0], [0.0, 5.0], [0.0, 5.0]]), top_k=1, capacity=3)
    order = make_padded_order(routing, 3)
    assert order.vacant.tolist() == [False, True, True, False, False, True]
    sliced = order_by_slice(order, [3, 3], 2)  # a | b  and then  . . | c .
    assert sliced.vacant.tolist() == [False, False, True, True, False, True]
    assert sliced.position.flatten().tolist() == [0, 1, 4] and sliced.pair[[0, 1, 4]].tolist() == [0, 1, 2]


def test_plans_are_made_once_while_shapes_and_the_link_stay():
    groups = Groups(2, 0, Degrees(2, 1, 1))
    dispatcher = PaddedAllToAll(VERBS, groups, 3, Link(LinearTransport(groups), "none"))
    first = dispatcher._plans((2,), CPU)
    assert first[0].calls[0].send == [4, 2] and first[0].calls[0].receive == [4, 4]  # experts 0, 1 and 2
    assert dispatcher._plans((2,), CPU) is first
    assert [plan.calls[0].send for plan in dispatcher._plans((2, 1), CPU)] == [[4, 2], [2, 1]]
    again = dispatcher._plans((2,), CPU)
    dispatcher.link = Link(LinearTransport(groups), "none")  # as tuning does
    assert dispatcher._plans((2,), CPU) is not again
    twin = copy.deepcopy(dispatcher)
    assert twin.link is not dispatcher.link and twin._plans((2,), CPU)[0].calls == first[0].calls

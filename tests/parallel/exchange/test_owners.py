"""Who sends which expert's rows to whom, without ranks."""

import pytest

from swin_moe.parallel.exchange.owners import Owners
from swin_moe.parallel.sharding import Degrees


def test_destinations_by_hand():
    # 4 experts over 3 ranks: 2, 2, 0.
    uneven = Owners(Degrees(3, 1, 1), 4)
    assert uneven.num_local(2) == 0 and uneven.destinations(2) == [range(0, 2), range(2, 4), range(4, 4)]
    assert uneven.sources(2) == [0, 0, 0] and uneven.sources(1) == [2, 2, 2]
    # Ranks 0, 1 share experts 0, 1 and ranks 2, 3 experts 2, 3: odd ranks send to odd shards.
    shared = Owners(Degrees(2, 2, 1), 4)
    assert shared.destinations(1) == [range(0), range(0, 2), range(0), range(2, 4)]
    assert shared.sources(1) == [0, 2, 0, 2]


@pytest.mark.parametrize(("degrees", "experts"), [((4, 1, 1), 8), ((3, 1, 1), 4), ((2, 2, 1), 5), ((1, 4, 2), 3)])
def test_every_expert_has_one_destination_and_senders_agree_with_receivers(degrees, experts):
    owners = Owners(Degrees(*degrees), experts)
    assert len(owners.ranks) == degrees[0] * degrees[1]
    for sender in owners.ranks:
        assert [e for span in owners.destinations(sender) for e in span] == list(range(experts))
        for receiver, span in enumerate(owners.destinations(sender)):
            assert len(span) == owners.sources(receiver)[sender]

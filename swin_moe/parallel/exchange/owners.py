"""Which rank of an expert group gets which expert's rows from whom. Plain arithmetic, without torch."""

from dataclasses import dataclass
from functools import cached_property

from swin_moe.layout import even_split
from swin_moe.parallel.sharding import Degrees


@dataclass(frozen=True)
class Owners:
    """The experts of one layer on the ranks of an expert group, which are numbered within it.

    An expert over several ranks: its rows from rank i go to shard i % shards of the expert's owner.
    """

    degrees: Degrees
    num_experts: int

    @cached_property
    def _held(self) -> list[tuple[int, int]]:
        return even_split(self.num_experts, self.degrees.expert)

    @property
    def ranks(self) -> range:
        """The ranks of the group."""
        return range(self.degrees.expert * self.degrees.expert_shard)

    def num_local(self, rank: int) -> int:
        """Returns how many experts the rank computes; 0 is legal."""
        return self._held[rank // self.degrees.expert_shard][1]

    def destinations(self, rank: int) -> list[range]:
        """Returns for each rank the experts whose rows it gets from `rank`, possibly none; ascending over the ranks."""
        shards = self.degrees.expert_shard
        spans = ((r, *self._held[r // shards]) for r in self.ranks)
        return [range(first, first + n) if r % shards == rank % shards else range(0) for r, first, n in spans]

    def sources(self, rank: int) -> list[int]:
        """Returns for each rank of how many experts it sends rows to `rank`: all local ones or none."""
        shards = self.degrees.expert_shard
        return [self.num_local(rank) if r % shards == rank % shards else 0 for r in self.ranks]

"""Where DeepSpeed 0.19.8 keeps this rank's share of weights and gradients, for stages 1-2 and for stage 3.

Both flatten parameters into buffers, cut them over the ranks that hold copies, and keep float32 masters of their part.
The names here are private to that version, which is why requirements pin it and registry.require insists on it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swin_moe.checkpoint import Piece
from swin_moe.engine.deepspeed.flat import Fragment, flat_pieces
from swin_moe.layout import Chunk


class Shards:
    """This rank's share of a model under DeepSpeed; labels are numbers of flat buffers. See engine/common.py:Held.

    Args:
        engine: What deepspeed.initialize returned for the model.
        trainable: Names of the parameters that are updated.
        layout: Parameter -> (global shape, the box this rank would hold without ZeRO).
    """

    BUFFERS = OFFLOADS = ""  # what the stage's optimizer calls its flat float32 weights, and whether they are offloaded

    def __init__(
        self, engine: Any, model: nn.Module, trainable: list[str], layout: Mapping[str, tuple[tuple[int, ...], Chunk]]
    ):
        self.engine, self.zero, self.trainable, self.layout = engine, engine.optimizer, trainable, layout
        self.updated: list[Tensor] = list(getattr(self.zero, self.BUFFERS))
        self.buffers = list(self.updated)  # then frozen parameters
        self.fragments = {name: self._fragments(name, parameter) for name, parameter in model.named_parameters()}

    def _fragments(self, name: str, parameter: Any) -> list[Fragment]:
        """Returns where this rank's elements of a parameter, with the library's attributes, are."""
        raise NotImplementedError

    def _frozen(self, name: str, numel: int, memory: Tensor, start: int = 0) -> list[Fragment]:
        self.buffers.append(memory.detach().view(-1))
        return [Fragment(name, start, numel, len(self.buffers) - 1, 0)] if numel else []

    @property
    def weights(self) -> dict[str, Tensor]:
        """See Held."""
        return {str(i): buffer for i, buffer in enumerate(self.buffers)}

    @property
    def states(self) -> dict[str, dict]:
        """See Held."""
        return {str(i): self.zero.optimizer.state[buffer] for i, buffer in enumerate(self.updated)}

    def by_buffer(self) -> list[list[Tensor]]:
        """Returns, per updated buffer, the reduced gradients end to end; after the last backward of a step."""
        if getattr(self.zero, self.OFFLOADS):
            return [[] if buffer.grad is None else [buffer.grad] for buffer in self.updated]
        return [list(self.zero.averaged_gradients.get(i) or []) for i in range(len(self.updated))]

    def gradients(self) -> list[Tensor]:
        """See Held."""
        return [gradient for tensors in self.by_buffer() for gradient in tensors]

    def apply(self, optimizers: list[torch.optim.Optimizer]) -> bool:
        """See Held. The library skips where float32 cannot hold the square of an unclipped norm."""
        self.engine.step()
        return not self.zero.overflow

    def settle(self) -> None:
        """See Held. The library has done both."""

    def first_not_finite(self) -> str | None:
        """See Held. In the order of the buffers."""
        places = sorted((f.buffer, f.offset, f.name) for parts in self.fragments.values() for f in parts)
        for buffer, offset in self._bad_elements():
            return next((name for b, start, name in reversed(places) if b == buffer and start <= offset), None)
        return None

    def _bad_elements(self) -> Iterator[tuple[int, int]]:
        for buffer, tensors in enumerate(self.by_buffer()):
            position = 0
            for tensor in tensors:
                bad = ~torch.isfinite(tensor.reshape(-1))
                if bad.any():
                    yield buffer, position + int(bad.nonzero()[0])
                position += tensor.numel()

    def discard(self) -> None:
        """See Held."""
        raise NotImplementedError

    def reduce_accumulated(self) -> None:
        """Reduces the gradients that were left on the parameters by several backwards."""
        raise NotImplementedError

    def publish(self) -> None:
        """See Held."""
        raise NotImplementedError

    def pieces_of(self, saved: str, name: str, tensors: Mapping[str, Tensor]) -> list[Piece]:
        """See Held. Views of the flat buffers."""
        return flat_pieces(saved, name, self.fragments[name], list(tensors.values()), self.layout)


class OptimizerShards(Shards):
    """Stages 1 and 2: whole parameters on every rank, masters of the own partition."""

    BUFFERS, OFFLOADS = "single_partition_of_fp32_groups", "cpu_offload"

    def _fragments(self, name: str, parameter: Any) -> list[Fragment]:
        if not parameter.requires_grad:
            return self._frozen(name, parameter.numel(), parameter)
        mapping = parameter._hp_mapping
        if mapping is None:
            return []
        mine, place = mapping.lp_fragment_address, mapping.hp_fragment_address
        return [Fragment(name, mine.start, mine.numel, mapping.param_group_index, place.start)]

    def discard(self) -> None:
        """See Held. What the library does itself after an overflow."""
        zero = self.zero
        zero.micro_step_id = -1
        zero.zero_grad(set_to_none=True)
        if zero.cpu_offload:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
            return
        for i in range(len(self.updated)):
            zero.averaged_gradients[i] = zero.all_grad_tensors[i] = None

    def reduce_accumulated(self) -> None:
        """See Shards."""
        self.engine._flush_coalesced_reduction_zero12(self.zero)

    def publish(self) -> None:
        """See Held."""
        self.zero.update_lp_params()


class WeightShards(Shards):
    """Stage 3: every parameter cut over the ranks that hold copies, gathered while its module runs."""

    BUFFERS, OFFLOADS = "fp32_partitioned_groups_flat", "offload_optimizer"

    def _fragments(self, name: str, parameter: Any) -> list[Fragment]:
        size = parameter.ds_tensor.ds_numel
        start = size * self.zero._get_param_partition_rank(parameter)
        numel = max(0, min(size, parameter.ds_numel - start))  # the last ranks' parts are padded
        if not parameter.requires_grad:
            return self._frozen(name, numel, parameter.ds_tensor, start)
        buffer, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return [Fragment(name, start, numel, buffer, offset)] if numel else []

    def discard(self) -> None:
        """See Held. What the library does itself after an overflow."""
        self.zero._pre_step()
        self.zero._partition_all_parameters()
        self.zero._overflow_clean_up(1.0)

    def reduce_accumulated(self) -> None:
        """See Shards."""
        self.engine._flush_coalesced_reduction_zero3(self.zero)

    def publish(self) -> None:
        """See Held."""
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)

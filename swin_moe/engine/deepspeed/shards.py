"""Where DeepSpeed 0.19.8 keeps this rank's share of weights and gradients, for stages 1-2 and for stage 3.

Both flatten parameters into buffers, cut them over the ranks that hold copies, and keep float32 masters of their part.
The names here are private to that version, which is why requirements pin it and registry.require insists on it.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swin_moe.engine.deepspeed.flat import Fragment


class Shards(Protocol):
    """This rank's share of a model under a DeepSpeed optimizer."""

    buffers: list[Tensor]  # flat float32 weights that the optimizer updates, then frozen parameters
    num_updated: int  # how many of the buffers the optimizer updates
    fragments: dict[str, list[Fragment]]  # parameter name -> where this rank's elements of it are

    def gradients(self) -> list[list[Tensor]]:
        """Returns, per updated buffer, the reduced gradients end to end; after the last backward of a step."""

    def discard(self) -> None:
        """Drops the gradients of a step without an update."""

    def reduce_accumulated(self, engine: Any) -> None:
        """Reduces the gradients that were left on the parameters by several backwards."""

    def publish(self) -> None:
        """Brings changed buffers to the parameters the model computes with. Collective."""


class OptimizerShards:
    """Stages 1 and 2: whole parameters on every rank, masters of the own partition."""

    def __init__(self, optimizer: Any, model: nn.Module):
        self.optimizer = optimizer
        self.buffers = list(optimizer.single_partition_of_fp32_groups)
        self.num_updated = len(self.buffers)
        self.fragments = {}
        parameter: Any  # with the library's attributes
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                self.fragments[name] = [Fragment(name, 0, parameter.numel(), len(self.buffers), 0)]
                self.buffers.append(parameter.detach().view(-1))
                continue
            mapping = parameter._hp_mapping
            self.fragments[name] = []
            if mapping is not None:
                mine, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                fragment = Fragment(name, mine.start, mine.numel, mapping.param_group_index, place.start)
                self.fragments[name].append(fragment)

    def gradients(self) -> list[list[Tensor]]:
        """See Shards."""
        if self.optimizer.cpu_offload:
            return [[buffer.grad] for buffer in self.buffers[: self.num_updated]]
        return [list(self.optimizer.averaged_gradients.get(i) or []) for i in range(self.num_updated)]

    def discard(self) -> None:
        """See Shards. What the library does itself after an overflow."""
        zero = self.optimizer
        zero.micro_step_id = -1
        zero.zero_grad(set_to_none=True)
        if zero.cpu_offload:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
            return
        for i in range(self.num_updated):
            zero.averaged_gradients[i] = zero.all_grad_tensors[i] = None

    def reduce_accumulated(self, engine: Any) -> None:
        """See Shards."""
        engine._flush_coalesced_reduction_zero12(self.optimizer)

    def publish(self) -> None:
        """See Shards."""
        self.optimizer.update_lp_params()


class WeightShards:
    """Stage 3: every parameter cut over the ranks that hold copies, gathered while its module runs."""

    def __init__(self, optimizer: Any, model: nn.Module):
        self.optimizer = optimizer
        self.buffers = list(optimizer.fp32_partitioned_groups_flat)
        self.num_updated = len(self.buffers)
        self.fragments = {}
        parameter: Any  # with the library's attributes
        for name, parameter in model.named_parameters():
            size = parameter.ds_tensor.ds_numel
            start = size * optimizer._get_param_partition_rank(parameter)
            numel = max(0, min(size, parameter.ds_numel - start))  # the last ranks' parts are padded
            if parameter.requires_grad:
                buffer, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            else:
                buffer, offset = len(self.buffers), 0
                self.buffers.append(parameter.ds_tensor.detach().view(-1))
            self.fragments[name] = [Fragment(name, start, numel, buffer, offset)] if numel else []

    def gradients(self) -> list[list[Tensor]]:
        """See Shards."""
        if self.optimizer.offload_optimizer:
            return [[buffer.grad] for buffer in self.buffers[: self.num_updated]]
        return [list(self.optimizer.averaged_gradients.get(i) or []) for i in range(self.num_updated)]

    def discard(self) -> None:
        """See Shards. What the library does itself after an overflow."""
        zero = self.optimizer
        zero._pre_step()
        zero._partition_all_parameters()
        zero._overflow_clean_up(1.0)

    def reduce_accumulated(self, engine: Any) -> None:
        """See Shards."""
        engine._flush_coalesced_reduction_zero3(self.optimizer)

    def publish(self) -> None:
        """See Shards."""
        zero = self.optimizer
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)


def shards_of(optimizer: Any, model: nn.Module, *, stage: int) -> Shards:
    """Returns the shards of a model that deepspeed.initialize has taken over."""
    return WeightShards(optimizer, model) if stage == 3 else OptimizerShards(optimizer, model)


def first_not_finite(shards: Shards) -> str | None:
    """Returns the name of the first parameter, in buffer order, whose gradient on this rank is not finite."""
    places = sorted((f.buffer, f.offset, f.name) for parts in shards.fragments.values() for f in parts)
    for buffer, offset in _bad_elements(shards):
        return next((name for b, start, name in reversed(places) if b == buffer and start <= offset), None)
    return None


def _bad_elements(shards: Shards) -> Iterator[tuple[int, int]]:
    for buffer, tensors in enumerate(shards.gradients()):
        position = 0
        for tensor in tensors:
            bad = ~torch.isfinite(tensor.reshape(-1))
            if bad.any():
                yield buffer, position + int(bad.nonzero()[0])
            position += tensor.numel()

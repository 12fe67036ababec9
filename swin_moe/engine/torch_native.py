"""The default engine: replicated dense parameters (DDP), expert-parallel experts, one optimizer."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swin_moe.checkpoint import Piece
from swin_moe.config import Config
from swin_moe.engine.base import StepStats
from swin_moe.engine.ema import WeightAverage
from swin_moe.engine.precision import LossScale, autocast
from swin_moe.optim import Schedule, build_optimizer, parameter_groups
from swin_moe.parallel.apply import expert_parameters, parameter_layout, reduce_expert_gradients
from swin_moe.parallel.clip import clip_by_norm, global_grad_norm
from swin_moe.parallel.groups import Groups

# Adam's and SGD's tensors that are saved; "step" is the same for all parameters and saved once as a number.
STATE_TENSORS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def replicate(model: nn.Module, groups: Groups) -> nn.Module:
    """Returns the model wrapped so that dense gradients are averaged over the world; experts are left alone."""
    if groups.world_size == 1:
        return model
    ignored = [name for name, _ in expert_parameters(model)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    # find_unused_parameters: not for unused ones, but because DDP otherwise rebuilds its buckets after the first step.
    # With more than 2 ranks the order of a ring's sums depends on the bucket, so a resumed run would differ in bits.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    # init_sync off: initial weights are a function of the seed, equal on all ranks without a broadcast.
    return DistributedDataParallel(
        model,
        process_group=groups.world,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
        init_sync=False,
    )


class TorchEngine:
    """ZeRO-0: see engine/base.py for the protocol.

    Args:
        model: Already parallelized, on its device, initialized.
        schedule: Learning rate by optimizer step.
    """

    def __init__(self, model: nn.Module, *, config: Config, groups: Groups, schedule: Schedule):
        self.config, self.groups, self.schedule = config, groups, schedule
        self.local_model = model
        self.device = next(model.parameters()).device
        self.layout = parameter_layout(model, groups)
        self.model = replicate(model, groups)
        self.param_groups = parameter_groups(model, config.optim, config.model.depths)
        self.optimizer = build_optimizer(config.optim, self.param_groups)
        self.loss_scale = LossScale(config.engine.precision == "fp16")
        self.ema = WeightAverage(model, config.optim.ema) if config.optim.ema else None
        self.updates = 0
        self._allocate_state()

    @property
    def trainable(self) -> list[nn.Parameter]:
        """All parameters the optimizer updates, in its order."""
        return [p for group in self.param_groups for p in group["params"]]

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """See Engine. Backward belongs inside: DDP decides in the forward whether it will communicate."""
        synchronized = last or not isinstance(self.model, DistributedDataParallel)
        with nullcontext() if synchronized else self.model.no_sync():
            yield

    def autocast(self) -> AbstractContextManager:
        """Returns the context for the forward; the loss is computed outside it, in float32."""
        return autocast(self.config.engine.precision, self.device)

    def backward(self, loss: Tensor) -> None:
        """See Engine."""
        (loss * self.loss_scale.value).backward()

    @torch.no_grad()
    def step(self, t: int) -> StepStats:
        """See Engine."""
        reduce_expert_gradients(self.local_model, self.groups, self.groups.world_size)
        scale = self.loss_scale.value
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in self.trainable], 1.0 / scale)
        norm = float(global_grad_norm(self.local_model, self.groups))
        finite = norm == norm and norm != float("inf")
        limit = self.config.optim.clip_norm
        factor = min(1.0, limit / (norm + 1e-6)) if limit and finite else 1.0
        if finite:
            if factor < 1.0:
                clip_by_norm(self.trainable, norm, limit)
            self._update(t)
        self.loss_scale.update(finite=finite)
        stats = StepStats(norm, factor, self.schedule(t), not finite, scale)
        if finite:
            self.optimizer.zero_grad(set_to_none=True)
        return stats

    def _update(self, t: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(t, group["lr_scale"])
        self.optimizer.step()
        self.updates += 1
        if self.ema:
            self.ema.update()

    def discard_gradients(self) -> str | None:
        """Clears the gradients of a skipped step; returns the first parameter of this rank that is not finite."""
        name = None
        for group in self.param_groups:
            for candidate, p in zip(group["names"], group["params"]):
                if name is None and p.grad is not None and not torch.isfinite(p.grad).all():
                    name = candidate
        self.optimizer.zero_grad(set_to_none=True)
        return name

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """See Engine."""
        self.local_model.eval()
        try:
            with self.ema.swapped() if self.ema else nullcontext():
                yield
        finally:
            self.local_model.train()

    def _allocate_state(self) -> None:
        """Creates the optimizer state now, as zeros, so that a checkpoint of any step holds the same tensors."""
        for p in self.trainable:
            state = self.optimizer.state[p]
            if self.config.optim.name == "adamw":
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for key in STATE_TENSORS[self.config.optim.name]:
                state[key] = torch.zeros_like(p)

    def _named_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yields (saved name, parameter name, local tensor)."""
        for name, p in self.local_model.named_parameters():
            yield name, name, p.detach()
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"]):
                for key in STATE_TENSORS[self.config.optim.name]:
                    yield f"optim.{key}/{name}", name, self.optimizer.state[p][key]
        if self.ema:
            for name, average in self.ema.average.items():
                yield f"ema/{name}", name, average

    def pieces(self) -> Iterable[Piece]:
        """See Engine. The tensors are views: filling them loads the engine."""
        pieces = []
        for saved, name, tensor in self._named_tensors():
            shape, chunk = self.layout[name]
            pieces.append(Piece(saved, shape, tensor.dtype, chunk, tensor))
        return pieces

    def state(self) -> dict:
        """See Engine."""
        return {"updates": self.updates, "loss_scale": self.loss_scale.state(), "optimizer": self.config.optim.name}

    def load_state(self, state: dict) -> None:
        """See Engine."""
        self.updates = state["updates"]
        self.loss_scale.load_state(state["loss_scale"])
        for p in self.trainable:
            if "step" in self.optimizer.state[p]:
                self.optimizer.state[p]["step"].fill_(self.updates)

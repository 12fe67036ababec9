"""DeepSpeed 0.19.8 as this package starts it: quiet, under our launcher, with experts that are not its own.

It knows experts by tags on parameters and, below stage 3, by a module of its MoE class in the tree. Both are made here,
from the sharding table; nothing else in this package reads them.
"""

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from swin_moe.config import Config
from swin_moe.parallel.apply import expert_parameters
from swin_moe.parallel.groups import Groups
from swin_moe.parallel.sharding import placement

MARKER = "deepspeed_marker"
# Elements of gradients reduced together: 64 MiB in float32. DeepSpeed's own default of 5e8 allocates 2 GB a rank.
BUCKET = 2**24


def import_deepspeed(device: torch.device) -> Any:
    """Returns the package, set to compute on `device` and to keep its log to itself."""
    os.environ["DS_ACCELERATOR"] = device.type  # read once, when the package is imported first
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("LOCAL_RANK", "0")  # which the library insists on; one process without a launcher has none
    # Names of collectives that torch 2.13 changed; the library says so at every call.
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # A CPU collective for inference that every start would compile (g++ and 20 s).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch.distributed is up already; nothing is to be discovered.
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, dist_init_required=False
    )
    return deepspeed


def mark_experts(model: nn.Module, groups: Groups, *, stage: int) -> str | None:
    """Returns the name of DeepSpeed's expert groups, after tagging experts; None where every rank holds all experts.

    Experts that all ranks hold are averaged over the world like dense parameters, which is what they need.
    DeepSpeed divides expert gradients by the world size whatever its group of replicas, as parallel/apply.py wants.
    """
    experts = dict(expert_parameters(model))
    if groups.expert_size == 1 or not experts:
        return None
    from deepspeed.utils import groups as expert_groups

    name = f"ep_size_{groups.expert_size}"
    expert_groups._create_expert_and_data_parallel(groups.expert_size)
    replicas = dist.get_process_group_ranks(expert_groups._get_expert_data_parallel_group(name))
    ours = list(range(groups.expert_rank, groups.world_size, groups.expert_size))
    assert replicas == ours, f"DeepSpeed replicates experts over ranks {replicas}, we over {ours}"
    parameter: Any  # takes the library's attributes
    for parameter in experts.values():
        parameter.allreduce, parameter.group_name = False, name
        if stage == 3:  # private attributes of this version, by which its AutoEP says what to partition over what
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = name
            parameter.ds_zero_partition_process_group = expert_groups._get_expert_data_parallel_group(name)
    if stage < 3 and any(p.requires_grad for p in experts.values()):
        model.add_module(MARKER, _marker(name, groups.expert_size))
    return name


def _marker(group_name: str, expert_size: int) -> nn.Module:
    """Returns a module without parameters that DeepSpeed takes for a MoE layer of its own; it is never called."""
    from deepspeed.moe.layer import MoE

    class ExpertMarker(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts, self.ep_size, self.num_local_experts = expert_size, expert_size, 1
            self.expert_group_name = group_name

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups are there already."""

    return ExpertMarker()


def split_groups(param_groups: list[dict], expert_group: str | None) -> list[dict]:
    """Returns optimizer groups with dense and expert parameters apart, named as DeepSpeed wants them."""
    result = []
    for number, group in enumerate(param_groups):
        for is_expert in (False, True):
            chosen = [
                (n, p)
                for n, p in zip(group["names"], group["params"])
                if (expert_group is not None and placement(n).is_expert) == is_expert
            ]
            if chosen:
                names, params = map(list, zip(*chosen))
                tags = {"name": expert_group, "moe": True} if is_expert else {"name": f"dense_{number}"}
                result.append({**group, **tags, "names": names, "params": params})
    return result


def configuration(config: Config, micro_batch: int) -> dict[str, Any]:
    """Returns DeepSpeed's config: it reduces, partitions and gathers; loss scale, norm, clip and skip are ours."""
    stage, offload = config.parallel.zero, config.engine.offload
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
    }
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.engine.device != "cpu"}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": config.engine.device != "cpu"}
    if stage == 3:
        # Parameters are gathered module by module. No prefetching: it gathers over several groups at once, in the
        # order of a set, which may differ between ranks.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    elif offload == "none":
        zero["compute_grad_norm"] = False
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,  # the loss is scaled already; boundaries are set by hand
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own Adam is compiled at the first start
        "zero_optimization": zero,
        "steps_per_print": 2**62,
    }

"""Moving a batch to a device."""

import torch


def to_device(batch: dict, device: torch.device, precision: str) -> dict:
    """Returns the batch with its tensors on `device`, floating-point ones in float64 for precision fp64."""
    moved = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            dtype = torch.float64 if precision == "fp64" and value.is_floating_point() else None
            value = value.to(device, dtype, non_blocking=True)
        moved[key] = value
    return moved

"""What the adapter uses of Tutel, the slow, obvious way, for machines without it; with the defects it has there.

Whatever else the adapter would touch (Tutel's all-to-all, routing, layer, loader, system module) does not exist here.
"""

import sys
from types import ModuleType

import torch


def _kernel_rows(data):
    """Returns the rows in the type of Tutel's buffers: everything but float16 is rounded to float32."""
    assert data.is_contiguous(), "Input tensor for encode/decode should be in contiguous memory format."
    if data.dtype == torch.float16:
        assert data.shape[-1] % 2 == 0, "float16 kernels work on pairs of channels"
        return data
    return data.float()


def fast_encode(data, critial_data, is_postscore=True):
    """Returns (E, C, D): token t stands at row location of its expert, for every choice; zeros elsewhere."""
    assert is_postscore
    num_experts, indices, locations, _, capacity, _ = critial_data
    assert len(data) and capacity, "Tutel divides by the tokens and cannot reshape empty rows"
    tokens = _kernel_rows(data)
    rows = [tokens[0] * 0] * (num_experts * capacity)  # zeros that have a gradient
    for expert, location in zip(indices, locations):
        for t in range(len(tokens)):
            if location[t] < capacity:
                rows[int(expert[t]) * capacity + int(location[t])] = tokens[t]
    return torch.stack(rows).view(num_experts, capacity, -1).to(data.dtype)


def fast_decode(data, critial_data, is_postscore=True):
    """Returns (T, D): for every token the sum over choices of gate times row."""
    assert is_postscore
    _, indices, locations, gates, capacity, _ = critial_data
    assert len(gates[0]) and capacity, "Tutel divides by the tokens and cannot reshape empty rows"
    rows = _kernel_rows(data)
    tokens = []
    for t in range(len(gates[0])):
        token = rows[0, 0] * 0 * gates[0][t].to(rows.dtype)
        for expert, location, gate in zip(indices, locations, gates):
            assert expert.dtype == location.dtype == torch.int32
            if location[t] < capacity:
                token = token + gate[t].to(rows.dtype) * rows[int(expert[t]), int(location[t])]
        tokens.append(token)
    return torch.stack(tokens).to(data.dtype)


def modules() -> dict[str, ModuleType]:
    """Returns the modules that stand for Tutel, by name."""
    moe = ModuleType("tutel.moe")
    vars(moe).update(fast_encode=fast_encode, fast_decode=fast_decode)
    package = ModuleType("tutel")
    vars(package).update(__path__=[], moe=moe)
    return {"tutel": package, "tutel.moe": moe}


def is_importable() -> bool:
    """Returns whether the real Tutel is, with its compiled part."""
    try:
        import tutel.moe
    except ImportError:
        return False
    return hasattr(tutel.moe, "moe_layer")


def install_if_missing() -> None:
    """Lets `import tutel.moe` succeed in this process."""
    if not is_importable():
        sys.modules.update(modules())

"""Parameter names of the official Swin repository and of Tutel as ours. Plain data, shared by models and tools.

Facts: microsoft/Swin-Transformer, models/*.py; microsoft/Tutel, tutel/impls/moe_layer.py.
"""

from collections.abc import Iterable

# Official -> ours, (pattern, replacement); every rule is applied, in this order.
RENAMED = (
    (r"rpe_mlp", "cpb_mlp"),
    (r"mlp\._moe_layer\.experts\.batched_fc(\d)_w$", r"mlp.experts.fc\1_weight"),
    (r"mlp\._moe_layer\.experts\.batched_fc(\d)_bias$", r"mlp.experts.fc\1_bias"),
    (r"mlp\._moe_layer\.gates\.0\.wg\.weight$", "mlp.router.weight"),
    (r"mlp\._moe_layer\.gates\.0\.cosine_projector\.", "mlp.router.projector."),
    (r"mlp\._moe_layer\.gates\.0\.(temperature|sim_matrix)$", r"mlp.router.\1"),
)
# Names (after renaming) without a place in a model, and why; (pattern, reason).
DROPPED = (
    (r"\b(relative_position_index|relative_coords_table|attn_mask)$", "computed by the model"),
    (r"\b_num_global_experts$", "checked against the model"),
    (r"\.bn\.num_batches_tracked$", "nothing reads it"),
    (r"\.mask_head\.head\.sizes_of_interest$", "follows from the strides"),
)
# Of a backbone whose outputs others normalize: of maps (`norm0`, ...), or of the last tokens (`norm`).
OTHER_MAPS = ((r"^norm\d*\.(weight|bias)$", "a norm of outputs that the network does not give"),)
SIMMIM_DROPPED = ((r"^mask_token$|^decoder\.", "only for SimMIM pre-training"),)  # of the official files of SimMIM
# Before the backbone's names in a network that has more than a backbone, of pre-training and of dense tasks; all other
# names there are a task's.
ENCODER, DENSE = BACKBONE = "encoder.", "backbone."
# What stands beside the backbone in the official networks of dense tasks (mmdetection 2.11, mmsegmentation 0.11).
DENSE_PARTS = ("decode_head.", "auxiliary_head.", "neck.", "rpn_head.", "roi_head.", "bbox_head.", "global_block.")
# Soft Teacher holds two detectors (microsoft/SoftTeacher); here the student is the network itself.
STUDENT, TEACHER = "student.", "teacher."
OUTSIDE = "/"  # before the key of what stands beside the backbone there, whose names may be the backbone's own


def inner_name(name: str) -> str:
    """Returns the name that a parameter of a backbone has in the network that is one; other names as they are."""
    return next((name.removeprefix(prefix) for prefix in BACKBONE if name.startswith(prefix)), name)


def is_wrapped(names: Iterable[str]) -> bool:
    """Returns whether parameters of these names are of a network that has its backbone in a child (BACKBONE)."""
    return any(name.startswith(BACKBONE) for name in names)


def is_dense_task(names: Iterable[str]) -> bool:
    """Returns whether parameters of these names are of a detector or segmentor, or of Soft Teacher's two."""
    return any(name.startswith(DENSE) or f".{DENSE}" in name for name in names)


def file_key(name: str, *, wrapped: bool) -> str:
    """Returns a name in the backbone, or OUTSIDE and the name for what stands beside one and is a task's.

    Args:
        wrapped: is_wrapped of the network, or file, that the name is from.
    """
    if not wrapped:
        return name
    return next((name.removeprefix(p) for p in BACKBONE if name.startswith(p)), OUTSIDE + name)

"""Parameter names of the official Swin repository and of Tutel as ours. Plain data, shared by models and tools.

Facts: microsoft/Swin-Transformer, models/*.py; microsoft/Tutel, tutel/impls/moe_layer.py.
"""

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
)
SIMMIM_DROPPED = ((r"^mask_token$|^decoder\.", "only for SimMIM pre-training"),)
# What belongs to a task and not to the backbone: another task starts its own.
TASK_PARTS = r"^(mask_token$|decoder\.|head\.|projector\.|predictor\.|queue[12]$)"
PRETRAINING_DROPPED = (*SIMMIM_DROPPED, (r"^(projector|predictor)\.|^queue[12]$|^momentum_", "only for pre-training"))

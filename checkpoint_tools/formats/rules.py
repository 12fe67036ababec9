"""Names of other formats as ours and back: rules are the only way a tensor is renamed, dropped, joined or split.

A rule is a regular expression and what its match becomes. A tensor that is only a part of one of ours (HuggingFace's
query, key and value) says which by its group `part`; the way back has `{part}` in the replacement.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from checkpoint_tools.sources.assembled import Place
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.names.official import DENSE_PARTS, DROPPED, RENAMED, SIMMIM_DROPPED, STUDENT, TEACHER


class Rule(NamedTuple):
    """What becomes of names that hold a match of `pattern`.

    replacement: As of re.sub, text or function; None drops the tensor.
    parts: The names of the parts, in the order of their rows, where several tensors are one of ours.
    """

    pattern: str
    replacement: str | Callable[[re.Match], str] | None
    parts: tuple[str, ...] = ()


def to_ours(name: str, rules: Iterable[Rule]) -> Place | None:
    """Returns where a foreign tensor belongs, after every rule that matches; None = dropped."""
    place = Place(name)
    for rule in rules:
        match = re.search(rule.pattern, place.name)
        if match is None:
            continue
        if rule.replacement is None:
            return None
        renamed = re.sub(rule.pattern, rule.replacement, place.name)
        part = (rule.parts.index(match["part"]), len(rule.parts)) if rule.parts else (place.part, place.parts)
        place = Place(renamed, *part)
    return place


def from_ours(name: str, rules: Iterable[Rule]) -> list[str]:
    """Returns the foreign names that a tensor of ours becomes, in the order of their rows; [] = dropped."""
    names = [name]
    for rule in rules:
        if re.search(rule.pattern, names[0]) is None:
            continue
        if rule.replacement is None:
            return []
        renamed = [re.sub(rule.pattern, rule.replacement, name) for name in names]
        names = [name.replace("{part}", part) for name in renamed for part in rule.parts or ("",)]
    return names


# What a parameter of one of our networks is called; a name that no rule brings here belongs to another network.
_OURS = re.compile(
    rf"({re.escape(TEACHER)})?("
    r"(encoder\.|backbone\.)?(absolute_pos_embed|mask_token|patch_embed\.(proj|norm)\.\w+|norm\d*\.\w+|head\.\w+"
    r"|layers\.\d{1,2}\.downsample\.(reduction|norm)\.\w+"
    r"|layers\.\d{1,2}\.blocks\.\d{1,4}\.(norm1|norm2|enorm|spatial_mlp|mlp\.fc1|mlp\.fc2|mlp\.experts|mlp\.router"
    r"|mlp\.shared)\.[\w.]+"
    r"|layers\.\d{1,2}\.blocks\.\d{1,4}\.attn\.(qkv|proj|cpb_mlp|q_bias|v_bias|logit_scale|relative_position_bias_table)"
    r"[\w.]*)|decoder\.0\.\w+|" + "|".join(re.escape(part) + r"[\w.]+" for part in DENSE_PARTS) + ")"
)


def check_ours(name: str, foreign: str, path: Path) -> str:
    """Returns a name of ours that rules made from a foreign one.

    Raises:
        CheckpointError: No network of ours has such a parameter; names the foreign one.
    """
    if not _OURS.fullmatch(name):
        raise CheckpointError(f"{path}: tensor {foreign[:100]!r} has no place in a Swin network, and no rule drops it")
    return name


OFFICIAL_BUFFERS = tuple(Rule(pattern, None) for pattern, _ in DROPPED)
FROM_OFFICIAL = (*(Rule(*rule) for rule in RENAMED), *OFFICIAL_BUFFERS)
FROM_DENSE = (Rule(f"^{re.escape(STUDENT)}", ""), *FROM_OFFICIAL)
FROM_SIMMIM = (
    Rule(r"^encoder\.", ""),
    *(Rule(pattern, None) for pattern, _ in SIMMIM_DROPPED),
    *FROM_OFFICIAL,
)
# MoBY's files hold the momentum network, both heads and the queue beside the encoder (SwinTransformer/Transformer-SSL,
# models/moby.py); its utils.py:load_pretrained takes the encoder alone.
MOBY_PARTS = r"^(encoder_k|projector|projector_k|predictor)\.|^queue(1|2|_ptr)$"
FROM_MOBY = (Rule(MOBY_PARTS, None), *FROM_SIMMIM)
TO_OFFICIAL = (
    Rule(r"mlp\.experts\.fc(\d)_weight$", r"mlp._moe_layer.experts.batched_fc\1_w"),
    Rule(r"mlp\.experts\.fc(\d)_bias$", r"mlp._moe_layer.experts.batched_fc\1_bias"),
    Rule(r"mlp\.router\.weight$", "mlp._moe_layer.gates.0.wg.weight"),
    Rule(r"mlp\.router\.projector\.", "mlp._moe_layer.gates.0.cosine_projector."),
    Rule(r"mlp\.router\.(temperature|sim_matrix)$", r"mlp._moe_layer.gates.0.\1"),
)
TO_SOFT_TEACHER = (*TO_OFFICIAL, Rule(f"^(?!{re.escape(TEACHER)})", STUDENT))
TO_SIMMIM = (*TO_OFFICIAL, Rule(r"^(?!encoder\.|decoder\.)", "encoder."))


def _stage(step: int, form: str) -> Callable[[re.Match], str]:
    """Returns a replacement that counts the stage in group 1 up or down."""
    return lambda match: form.format(int(match[1]) + step)


# timm's Swin: patch merging opens the next stage instead of closing its own; the class head is head.fc.
FROM_TIMM = (
    Rule(r"^layers\.(\d+)\.downsample\.", _stage(-1, "layers.{}.downsample.")),
    Rule(r"^head\.fc\.", "head."),
    *OFFICIAL_BUFFERS,
)
TO_TIMM = (
    Rule(r"^layers\.(\d+)\.downsample\.", _stage(1, "layers.{}.downsample.")),
    Rule(r"^head\.", "head.fc."),
)

_QKV = ("query", "key", "value")
# transformers' SwinForImageClassification and Swinv2ForImageClassification (models/swin*/modeling_swin*.py).
FROM_HF = (
    Rule(r"^swin(v2)?\.", ""),
    Rule(r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    Rule(r"^embeddings\.norm\.", "patch_embed.norm."),
    Rule(r"^embeddings\.mask_token$", None),
    Rule(r"^decoder\.", None),
    Rule(r"^encoder\.layers\.", "layers."),
    # transformers 5 renames Swin's modules in memory; from_pretrained and save_pretrained map to the names below.
    Rule(r"\.attention\.q_proj\.", ".attention.self.query."),
    Rule(r"\.attention\.k_proj\.", ".attention.self.key."),
    Rule(r"\.attention\.v_proj\.", ".attention.self.value."),
    Rule(r"\.attention\.o_proj\.", ".attention.output.dense."),
    Rule(r"\.attention\.relative_position_bias\.", ".attention.self."),
    Rule(r"\.layernorm_before\.", ".norm1."),
    Rule(r"\.layernorm_after\.", ".norm2."),
    Rule(r"\.attention\.self\.(?P<part>query|key|value)\.weight$", ".attn.qkv.weight", _QKV),
    Rule(r"(layers\.\d+\.blocks\.\d+)\.attention\.self\.(?P<part>query|key|value)\.bias$", r"\1.attn.qkv.bias", _QKV),
    Rule(r"\.attention\.self\.continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
    Rule(r"\.attention\.self\.", ".attn."),
    Rule(r"\.attention\.output\.dense\.", ".attn.proj."),
    Rule(r"\.intermediate\.dense\.", ".mlp.fc1."),
    Rule(r"\.output\.dense\.", ".mlp.fc2."),
    Rule(r"^layernorm\.", "norm."),
    Rule(r"^classifier\.", "head."),
    *OFFICIAL_BUFFERS,
)
# SwinV2 has no key bias: its query and value biases are tensors of their own. They come before the joining rules.
FROM_HF_V2 = (
    Rule(r"\.attention\.self\.query\.bias$", ".attn.q_bias"),
    Rule(r"\.attention\.self\.value\.bias$", ".attn.v_bias"),
    *FROM_HF,
)

# transformers' UPerNet with a Swin backbone; its backbone's last norm is not of the maps, and unused.
FROM_HF_UPERNET = (
    Rule(r"^backbone\.(swin\.)?layernorm\.", None),
    Rule(r"^backbone\.(swin\.)?", ""),
    *FROM_HF,
    Rule(r"^hidden_states_norms\.stage(\d)\.", _stage(-1, "norm{}.")),
    Rule(r"^(?!(decode|auxiliary)_head\.)", "backbone."),
    Rule(r"^((?:decode|auxiliary)_head)\.classifier\.", r"\1.conv_seg."),
    Rule(r"\.batch_norm\.", ".bn."),
    *OFFICIAL_BUFFERS,
)
# mmdetection's and mmsegmentation's own Swin, later than the authors' repositories; the heads' names are the same.
FROM_OPEN_MMLAB = (
    Rule(r"^backbone\.patch_embed\.projection\.", "backbone.patch_embed.proj."),
    Rule(r"^backbone\.stages\.", "backbone.layers."),
    Rule(r"\.attn\.w_msa\.", ".attn."),
    Rule(r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    Rule(r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    *OFFICIAL_BUFFERS,
)


def to_hf(family: str) -> tuple[Rule, ...]:
    """Returns the rules from ours to transformers' names for model.name `family`, swin or swinv2."""
    return (
        Rule(r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        Rule(r"^patch_embed\.norm\.", "embeddings.norm."),
        Rule(r"^norm\.", "layernorm."),
        Rule(r"^layers\.", "encoder.layers."),
        Rule(r"\.norm1\.", ".layernorm_before."),
        Rule(r"\.norm2\.", ".layernorm_after."),
        Rule(r"\.attn\.qkv\.(weight|bias)$", r".attention.self.{part}.\1", _QKV),
        Rule(r"\.attn\.q_bias$", ".attention.self.query.bias"),
        Rule(r"\.attn\.v_bias$", ".attention.self.value.bias"),
        Rule(r"\.attn\.proj\.", ".attention.output.dense."),
        Rule(r"\.attn\.cpb_mlp\.", ".attention.self.continuous_position_bias_mlp."),
        Rule(r"\.attn\.", ".attention.self."),
        Rule(r"\.mlp\.fc1\.", ".intermediate.dense."),
        Rule(r"\.mlp\.fc2\.", ".output.dense."),
        Rule(r"^head\.", "classifier."),
        Rule(r"^(?!classifier\.)", f"{family}."),
    )

"""Networks with shrunk windows and padded maps for other programs: the same logits, or one sentence and no file."""

import dataclasses
import itertools

import pytest
import torch

from checkpoint_tools.formats import plain_write
from checkpoint_tools.formats.geometry import check_geometry
from swin_moe import create_model
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.manager import save
from swin_moe.checkpoint.pieces import Piece
from tests.checkpoint_tools.formats.official_files import convert

SIZES = [(24, 24), (32, 32), (40, 40), (48, 48), (64, 64), (32, 64), (128, 64)]
WINDOWS = (4, 5, 7, 16)
SMALL = {"num_classes": 3, "embed_dim": 8, "depths": (2, 1, 2), "num_heads": (1, 2, 4)}


def written(root, family, size, window, *, state=None, **options):
    """Returns (a checkpoint of a random network, the network)."""
    torch.manual_seed(0)
    options = {**SMALL, "img_size": size, "window_size": window, **options}
    model = create_model(family, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    config = {"model": dataclasses.asdict(model.config)}
    pieces = [Piece.of(name, p.detach()) for name, p in model.named_parameters()]
    return save(root, 1, pieces, state=state or {}, config=config), model


def timm_logits(path, family, size, window, image):
    from swin_moe.data.torchvision_compat import import_torchvision

    import_torchvision()
    models = pytest.importorskip(f"timm.models.swin_transformer{'_v2' if family == 'swinv2' else ''}")
    kind = models.SwinTransformerV2 if family == "swinv2" else models.SwinTransformer
    model = kind(img_size=size, window_size=window, **SMALL).eval()
    missing, unexpected = model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert not unexpected and all("index" in name or "mask" in name or "table" in name for name in missing)
    with torch.no_grad():
        return model(image)


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_timm_computes_the_same_or_is_refused(family, tmp_path, monkeypatch):
    refused = equal = 0
    for number, (size, window) in enumerate(itertools.product(SIZES, WINDOWS)):
        path, model = written(tmp_path / str(number), family, size, window)
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(image)
        target = tmp_path / f"{number}.pth"
        try:
            convert(path, target, "timm")
        except CheckpointError as error:
            assert str(error).count(str(path)) == 1 and "stage" in str(error) and not target.exists()
            refused += 1
            with monkeypatch.context() as patch:  # what is refused is not the same, or has no place there
                patch.setattr(plain_write, "check_geometry", lambda *_: None)
                convert(path, target, "timm")
            try:
                found = timm_logits(target, family, size, window, image)
            except RuntimeError:
                continue
            assert (found - expected).abs().max() > 1e-3 * expected.abs().max(), (size, window)
            continue
        found = timm_logits(target, family, size, window, image)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        equal += 1
    assert refused >= 8 and equal >= 5


@pytest.mark.parametrize(
    ("size", "window", "family", "program", "reason"),
    [
        (64, 7, "swin", "official", "stage 0 has a map of 16 x 16 and windows of 7 tokens, but the official code does"),
        (224, 7, "swin", "official", ""),
        (64, 4, "swin", "official", ""),  # windows of 4, 4, 4 and 2
        (36, 9, "swin", "official", "stage 0 has a map of 9 x 9 and windows of 9 tokens, but the official code merges"),
        (64, 7, "swin_mlp", "official", "does not pad"),
        (64, 7, "swin", "transformers", "bias tables of the whole window of 7"),
        (224, 7, "swin", "transformers", ""),
        (64, 7, "swinv2", "transformers", ""),
        (64, 7, "swin", "timm", "stage 0 has a map of 16 x 16 and windows of 7 tokens, but timm pads maps after"),
        (64, 4, "swin", "timm", ""),
        (40, 5, "swin", "timm", "stage 1 has a map of 5 x 5 and windows of 5 tokens, but timm rounds"),
        (12, 7, "swin", "timm", "its 4 stages leave no tokens of an image of 12x12 pixels"),
    ],
)
def test_each_program_has_its_own_limits(size, window, family, program, reason):
    depths = [2, 2, 2, 2]
    network = {"name": family, "img_size": [size] * 2, "patch_size": [4, 4], "window_size": window, "depths": depths}
    if not reason:
        check_geometry("x", network, program)
        return
    with pytest.raises(CheckpointError, match=reason):
        check_geometry("x", network, program)


@pytest.mark.parametrize("to", ["official", "hf", "timm", "official-moe"])
def test_a_padded_network_is_refused_with_one_sentence(to, tmp_path):
    """64 pixels and windows of 7: numpy's "cannot reshape array" before."""
    path, _ = written(tmp_path, "swin", (64, 64), 7)
    with pytest.raises(CheckpointError, match="stage . has a map of .* tokens, but"):
        convert(path, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


PARTS = {
    "ape": ({"ape": True}, "has model.ape=true, which timm has no option for"),
    "patch_norm": ({"patch_norm": False}, "has model.patch_norm=false"),
    "qk_scale": ({"qk_scale": 0.5}, "has model.qk_scale=0.5"),
    "mlp_fc2_bias": ({"mlp_fc2_bias": False}, "has model.mlp_fc2_bias=false"),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_that_other_programs_lack_are_named(part, tmp_path):
    options, reason = PARTS[part]
    path, _ = written(tmp_path, "swin", (32, 32), 4, **options)
    with pytest.raises(CheckpointError, match=reason):
        convert(path, tmp_path / "x.pth", "timm")


def test_the_official_file_of_shrunk_windows_is_right(tmp_path):
    """Windows of 8, 4 and 2 tokens where 16 is asked for: buffers as the official code's, and our way back."""
    path, model = written(tmp_path, "swin", (32, 32), 16)
    found = torch.load(convert(path, tmp_path / "x.pth", "official"), weights_only=True)["model"]
    for stage, window in enumerate((8, 4, 2)):
        block = f"layers.{stage}.blocks.0.attn"
        assert found[f"{block}.relative_position_index"].shape == (window**2, window**2)
        assert found[f"{block}.relative_position_bias_table"].shape[0] == (2 * window - 1) ** 2
    assert not any(name.endswith("attn_mask") for name in found)
    (tmp_path / "b").mkdir()
    again = convert(tmp_path / "x.pth", tmp_path / "back", extra={"img_size": "32"})
    assert convert(again, tmp_path / "b" / "x.pth", "official").read_bytes() == (tmp_path / "x.pth").read_bytes()

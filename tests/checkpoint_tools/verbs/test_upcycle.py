"""Dense networks with experts, and other numbers of experts: what is promised about the function, and the numbers."""

import json
import re
from pathlib import Path

import pytest
import torch

from checkpoint_tools.__main__ import main
from checkpoint_tools.verbs.experts import merge_weights, share_copies
from swin_moe import create_model
from swin_moe.checkpoint import Piece, load, save
from swin_moe.checkpoint.index import Index
from swin_moe.config.io import config_from_tree
from swin_moe.models import build_model
from tests.checkpoint_tools.formats.official_files import FILES, FORMS, convert, tensors_of

SIZES = {"img_size": 32, "patch_size": 2, "num_classes": 5, "embed_dim": 8, "depths": (1, 2, 2), "num_heads": (1, 2, 4)}
IMAGE = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
BLOCKS = "[[-1],[1],[0,1]]"


def network_of(path: Path) -> torch.nn.Module:
    """Returns the network that a checkpoint says it is, with its weights, evaluating without dropping tokens."""
    tree = json.loads(json.dumps(Index.read(path).config["model"]))
    if tree.get("moe", {}).get("blocks"):
        tree["moe"]["eval_capacity_factor"] = 0.0
    model = build_model(config_from_tree({"model": tree}, source=str(path)).model).eval()
    load(path, [Piece.of(name, p.detach()) for name, p in model.named_parameters()])
    return model


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        result = network_of(path)(IMAGE)
    return result[0] if isinstance(result, tuple) else result


@pytest.fixture(scope="module", params=["swin", "swinv2", "swin_moe"])
def dense(request, tmp_path_factory):
    """Returns a dense checkpoint with moments, biases and norms away from their initial values."""
    torch.manual_seed(0)
    bias = request.param != "swin_moe"
    model = create_model(request.param, **SIZES, window_size=4, **({} if bias else {"mlp_fc2_bias": False}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pieces = [Piece.of(name, p.detach()) for name, p in model.named_parameters()]
    for kind in ("exp_avg", "exp_avg_sq"):
        pieces += [Piece.of(f"optim.{kind}/{name}", torch.rand_like(p)) for name, p in model.named_parameters()]
    sizes = {"name": request.param, **SIZES, "img_size": [32, 32], "patch_size": [2, 2], "window_size": 4}
    tree = {"model": {**sizes, "mlp_fc2_bias": bias}, "data": {"global_batch": 16}}
    state = {"engine": {"updates": 5}, "progress": {"step": 5}}
    root = tmp_path_factory.mktemp(request.param)
    return save(root, 5, pieces, state=state, config=json.loads(json.dumps(tree)))


EXACT = {
    "top1": ["--experts", "4"],
    "top1 of six": ["--experts", "6"],
    "top2": ["--experts", "6", "--top-k", "2"],
    "normalized": ["--experts", "6", "--top-k", "2", "--normalize-gate", "--router-std", "1"],
    "all": ["--experts", "3", "--top-k", "3", "--router-std", "1"],
}


@pytest.mark.parametrize("case", EXACT)
def test_the_upcycled_network_is_the_dense_one(tmp_path, dense, case, capsys):
    target = tmp_path / "moe"
    assert main(["upcycle", str(dense), str(target), "--blocks", BLOCKS, *EXACT[case]]) == 0
    assert "the same function: logits differ by" in capsys.readouterr().out
    torch.testing.assert_close(logits(target), logits(dense), rtol=1e-5, atol=1e-5)
    moe = Index.read(target).config["model"]["moe"]
    assert moe["blocks"] == [[-1], [1], [0, 1]] and moe["num_experts"] == int(EXACT[case][1])


@pytest.mark.parametrize("change", [["--router-std", "0.5"], ["--reinit", "0.5"]], ids=["router", "reinit"])
def test_what_changes_the_function_is_told(tmp_path, dense, change, capsys):
    target = tmp_path / "moe"
    assert main(["upcycle", str(dense), str(target), "--experts", "4", "--blocks", BLOCKS, *change]) == 0
    assert "another function: logits differ by" in capsys.readouterr().out
    # A norm behind the branch undoes any scale of the gates; the promise is made for none but the exact cases.
    scale_alone = change[0] == "--router-std" and Index.read(dense).config["model"]["name"] == "swinv2"
    assert torch.allclose(logits(target), logits(dense), rtol=1e-4, atol=1e-4) == scale_alone


def test_reinitialized_units_and_moments(tmp_path, dense):
    mixed, plain = tmp_path / "mixed", tmp_path / "plain"
    options = ["--experts", "4", "--blocks", BLOCKS, "--optimizer", "copy", "--no-check"]
    assert main(["upcycle", str(dense), str(mixed), *options, "--reinit", "0.25", "--seed", "3"]) == 0
    assert main(["upcycle", str(dense), str(plain), *options]) == 0
    old, new, whole = tensors_of(dense), tensors_of(mixed), tensors_of(plain)
    name = "layers.2.blocks.1.mlp"
    fc1, fc2 = old[f"{name}.fc1.weight"], old[f"{name}.fc2.weight"].t()
    changed = []
    for expert in range(4):
        assert torch.equal(whole[f"{name}.experts.fc1_weight"][expert], fc1)
        assert torch.equal(whole[f"{name}.experts.fc2_weight"][expert], 4 * fc2)
        rows = (new[f"{name}.experts.fc1_weight"][expert] != fc1).all(1)
        assert torch.equal(rows, (new[f"{name}.experts.fc2_weight"][expert] != 4 * fc2).all(1))
        assert rows.sum() == 32 and not new[f"{name}.experts.fc1_bias"][expert][rows].any()  # a quarter of 128
        assert not new[f"optim.exp_avg/{name}.experts.fc1_weight"][expert][rows].any()
        kept = new[f"optim.exp_avg_sq/{name}.experts.fc2_weight"][expert][~rows]
        torch.testing.assert_close(kept, old[f"optim.exp_avg_sq/{name}.fc2.weight"].t()[~rows] / 16)
        changed.append(tuple(rows.nonzero().flatten().tolist()))
    assert len(set(changed)) == 4
    moment = old[f"optim.exp_avg/{name}.fc2.weight"].t() / 4
    assert torch.equal(whole[f"optim.exp_avg/{name}.experts.fc2_weight"][2], moment)
    assert not whole[f"optim.exp_avg/{name}.router.weight"].any() and Index.read(plain).step == 5


@pytest.mark.parametrize("policy", ["zero", "none"])
def test_optimizer_policies(tmp_path, dense, policy):
    target = tmp_path / "moe"
    options = ["--experts", "4", "--blocks", BLOCKS, "--no-check", "--optimizer", policy]
    assert main(["upcycle", str(dense), str(target), *options]) == 0
    found, index = tensors_of(target), Index.read(target)
    moments = {name: tensor for name, tensor in found.items() if "/" in name}
    assert index.step == 0 and not any(tensor.any() for tensor in moments.values())
    trained = {n for n, p in network_of(target).named_parameters() if p.requires_grad}
    kinds = ("exp_avg", "exp_avg_sq") if policy == "zero" else ()
    assert moments.keys() == {f"optim.{kind}/{name}" for name in trained for kind in kinds}
    assert (index.state.get("progress") or {}).get("global_batch") == (16 if policy == "zero" else None)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return convert(FILES / FORMS["epoch"], tmp_path_factory.mktemp("moe") / "native")


@pytest.mark.parametrize("operation", ["duplicate", "split"])
@pytest.mark.parametrize("count", [16, 32])
def test_more_experts_compute_the_same(tmp_path, moe, operation, count, capsys):
    target, again = tmp_path / "a", tmp_path / "b"
    assert main(["experts", str(moe), str(target), f"--{operation}", str(count)]) == 0
    assert "the same function" in capsys.readouterr().out
    torch.testing.assert_close(logits(target), logits(moe), rtol=1e-5, atol=1e-6)
    copies = count // 8
    config = Index.read(target).config["model"]["moe"]
    assert (config["num_experts"], config["top_k"]) == (count, copies if operation == "split" else 1)
    other = "split" if operation == "duplicate" else "duplicate"  # on top of each other, k > 1
    assert main(["experts", str(target), str(again), f"--{other}", str(2 * count)]) == 0
    torch.testing.assert_close(logits(again), logits(moe), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operation", ["duplicate", "split"])
@pytest.mark.parametrize("gates", [[], ["--top-k", "2"], ["--top-k", "2", "--normalize-gate"]], ids=str)
def test_more_experts_with_second_biases_and_a_router_that_chooses(tmp_path, dense, operation, gates):
    source, target = tmp_path / "a", tmp_path / "b"
    options = ["--experts", "4", "--blocks", BLOCKS, "--router-std", "1", "--reinit", "0.5", "--no-check", *gates]
    assert main(["upcycle", str(dense), str(source), *options]) == 0
    assert main(["experts", str(source), str(target), f"--{operation}", "8", "--no-check"]) == 0
    torch.testing.assert_close(logits(target), logits(source), rtol=1e-5, atol=1e-5)


def test_experts_routers_and_moments_follow(tmp_path, moe):
    old, name = tensors_of(moe), "layers.2.blocks.1.mlp"
    loads = {"layers.1.blocks.1": [1] * 8, "layers.2.blocks.1": [5, 0, 9, 1, 2, 8, 3, 7]}
    file = tmp_path / "metrics.jsonl"
    half = {f"moe/{layer}/load": [value / 2 for value in values] for layer, values in loads.items()}
    file.write_text("".join(json.dumps({"step": step, "train/loss": 1.0, **half}) + "\n" for step in (1, 2)))

    def made(*options: str) -> dict[str, torch.Tensor]:
        target = tmp_path / "".join(options[:2])
        assert main(["experts", str(moe), str(target), *options, "--no-check"]) == 0
        return tensors_of(target)

    found = made("--prune", "3", "--load", str(file))
    for key in (f"{name}.experts.fc1_weight", f"{name}.router.weight", f"optim.exp_avg/{name}.experts.fc2_weight"):
        assert torch.equal(found[key], old[key][[2, 5, 7]])
    found = made("--merge", "4", "--load", str(file))
    key = f"{name}.experts.fc2_weight"
    torch.testing.assert_close(found[key][1], 0.9 * old[key][2] + 0.1 * old[key][3])
    torch.testing.assert_close(found[f"{name}.router.weight"][0], old[f"{name}.router.weight"][0])  # 5 : 0
    found = made("--merge", "2")
    torch.testing.assert_close(found[key][1], old[key][4:].mean(0))
    found = made("--duplicate", "12", "--load", str(file))
    source = [0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 7]
    assert torch.equal(found[key], old[key][source])
    found = made("--duplicate", "16")
    assert torch.equal(found[key], 2 * old[key].repeat_interleave(2, 0))
    moment = f"optim.exp_avg_sq/{key}"
    assert torch.equal(found[moment], old[moment].repeat_interleave(2, 0) / 4)
    found = made("--split", "16")
    assert torch.equal(found[key][4, :64], 2 * old[key][2, :64]) and not found[key][4, 64:].any()
    assert torch.equal(found[key][5, 64:], 2 * old[key][2, 64:]) and not found[key][5, :64].any()
    assert torch.equal(found[f"{name}.experts.fc1_weight"][5], old[f"{name}.experts.fc1_weight"][2])


def test_shares_and_weights():
    assert share_copies([5, 0, 9, 1, 2, 8, 3, 7], 8) == [1] * 8
    assert share_copies([1, 0, 3], 7) == [2, 1, 4]
    assert share_copies([0, 0], 3) == [2, 1]
    assert sum(share_copies([3, 1, 4, 1, 5], 17)) == 17
    assert merge_weights((0, 1), [3, 1]) == (0.75, 0.25) and merge_weights((0, 1), [0, 0]) == (0.5, 0.5)


def test_what_other_routers_have_is_told(tmp_path, moe, capsys):
    pieces = [Piece.of(name, tensor) for name, tensor in tensors_of(moe).items() if "/" not in name]
    pieces.append(Piece.of("layers.1.blocks.1.mlp.router.balance.bias", torch.zeros(8)))
    config = Index.read(moe).config
    config["model"]["moe"]["scores"] = "sigmoid"
    path = save(tmp_path / "run", 1, pieces, state={}, config=config)
    assert main(["experts", str(path), str(tmp_path / "x"), "--duplicate", "16"]) == 2
    assert "model.moe.scores=sigmoid: experts are changed only where it is softmax" in capsys.readouterr().err
    assert main(["convert", str(path), str(tmp_path / "x.pth"), "--to", "official"]) == 2
    assert "router.balance.bias: the official network has no such thing" in capsys.readouterr().err
    assert main(["convert", str(path), str(tmp_path / "dcp"), "--to", "dcp"]) == 0
    assert main(["convert", str(tmp_path / "dcp"), str(tmp_path / "back"), "--to", "native"]) == 0
    assert tensors_of(tmp_path / "back").keys() == {piece.name for piece in pieces}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--duplicate", "12"], "--duplicate must be a multiple of the 8 experts, got 12"),
        (["--split", "4"], "--split must be a multiple of the 8 experts, got 4"),
        (["--split", "48"], "64 hidden channels are no multiple of 6"),
        (["--merge", "3"], "--merge must divide the 8 experts, got 3"),
        (["--prune", "4"], "--prune needs --load"),
        (["--prune", "9", "--load", "LOAD"], r"--prune must be in \[1, 8\], got 9"),
    ],
)
def test_impossible_numbers_are_one_sentence(tmp_path, moe, options, reason, capsys):
    file = tmp_path / "load.json"
    file.write_text(json.dumps({"layers.1.blocks.1": [1] * 8, "layers.2.blocks.1": [1] * 8}))
    options = [str(file) if option == "LOAD" else option for option in options]
    assert main(["experts", str(moe), str(tmp_path / "x"), *options]) == 2
    assert re.search(reason, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()

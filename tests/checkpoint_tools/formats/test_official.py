"""Rank files as the official loop wrote them (tests/golden/official_moe): into our format, into runs, and back."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoint_tools.formats import open_source
from checkpoint_tools.sources.base import Options
from swin_moe import create_model
from swin_moe.checkpoint import CheckpointError, CorruptionError, Piece, load
from swin_moe.checkpoint.index import Index
from swin_moe.config import ParallelConfig
from swin_moe.layout import Chunk
from swin_moe.parallel.apply import parallelize, parameter_layout
from swin_moe.parallel.groups import build_groups
from tests.checkpoint_tools.formats.official_files import FILES, FORMS, QUIET, convert, identity, tensors_of, torch_load
from tests.models.reference import normal, relative_error
from tests.ranks import TWO_AND_FOUR, run_ranks

pytestmark = pytest.mark.usefixtures("yacs")
EXPERTS = 8
BUFFERS = ("attn_mask", "_index", "_coords_table", "_global_experts")


def build():
    cfg = torch.load(FILES / "expected.pt", weights_only=True)["cfg"]
    options = {"eval_capacity_factor": 0.0, "batch_prioritized": False}
    return create_model("swin_moe", num_experts=EXPERTS, **cfg, **options).eval()


def run_checkpoints(paths: list[Path]) -> list[torch.Tensor]:
    """Returns this rank's logits of each checkpoint, loaded in the layout of this world."""
    results = []
    for path in paths:
        groups = build_groups(ParallelConfig(), EXPERTS, torch.device("cpu"))
        model = parallelize(build(), ParallelConfig(), groups)
        layout = parameter_layout(model, groups)
        load(path, [Piece(n, layout[n][0], p.dtype, layout[n][1], p.detach()) for n, p in model.named_parameters()])
        with torch.no_grad():
            images = normal("eval", (4, 3, 32, 32)).float().chunk(dist.get_world_size())
            results.append(model(images[dist.get_rank()])[0])
    return results


@pytest.mark.mpi
@pytest.mark.parametrize("world", [1, *TWO_AND_FOUR])
def test_both_forms_run_on_any_ranks_and_give_the_official_logits(tmp_path, world):
    paths = [convert(FILES / name, tmp_path / form) for form, name in FORMS.items()]
    expected = torch.load(FILES / "expected.pt", weights_only=True)["logits"]
    ranks = run_ranks(run_checkpoints, world, tmp_path, paths)
    for parts in zip(*ranks):
        assert relative_error(torch.cat(parts), expected) < 1e-5


def official_parameters(rank_file: dict) -> list[str]:
    """Returns the official name of each optimizer number, by set_weight_decay's rule, spelled out anew."""
    left = (*BUFFERS, "batched_fc2_bias")  # the latter is frozen
    names = [name for name in rank_file["model"] if not name.endswith(left)]
    plain = ("cpb_mlp", "fc1_bias")
    none = [n for n in names if rank_file["model"][n].ndim == 1 or n.endswith(".bias") or any(w in n for w in plain)]
    return [n for n in names if n not in none] + none


def test_tensors_and_moments_land_on_the_right_global_experts(tmp_path):
    native = convert(FILES / FORMS["epoch"], tmp_path / "native")
    found = tensors_of(native)
    names = {
        "_moe_layer.experts.batched_fc1_w": "experts.fc1_weight",
        "_moe_layer.experts.batched_fc2_w": "experts.fc2_weight",
        "_moe_layer.experts.batched_fc1_bias": "experts.fc1_bias",
        "_moe_layer.experts.batched_fc2_bias": "experts.fc2_bias",
        "_moe_layer.gates.0.wg.weight": "router.weight",
    }
    checked = 0
    for rank in range(4):
        file = torch_load(FILES / f"{FORMS['epoch']}.rank{rank}")
        states = file["optimizer"]["state"]
        values = {"": file["model"]}
        for kind in ("exp_avg", "exp_avg_sq"):
            values[f"optim.{kind}/"] = {n: states[i][kind] for i, n in enumerate(official_parameters(file))}
        for prefix, tensors in values.items():
            for official, tensor in tensors.items():
                ending = next((e for e in names if official.endswith(e)), "")
                ours = prefix + (official.removesuffix(ending) + names[ending] if ending else official)
                if ours not in found:
                    assert official.endswith(BUFFERS)
                    continue
                held = found[ours][2 * rank : 2 * rank + 2] if ".experts." in ours else found[ours]
                assert torch.equal(held, tensor), ours
                checked += 1
    assert checked == 4 * (102 + 2 * 100) and len(found) == 302
    state = Index.read(native).state
    assert Index.read(native).step == state["progress"]["step"] == state["engine"]["updates"] == 3
    assert state["engine"]["loss_scale"] == {"value": 65536.0, "good_steps": 0}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_round_trips_over_any_number_of_rank_files(tmp_path, form, world):
    native = convert(FILES / FORMS[form], tmp_path / "native")
    written = convert(native, tmp_path / "written.pth", "official-moe", world=world)
    assert len(list(tmp_path.glob("written.pth.rank*"))) == world
    assert identity(convert(written, tmp_path / "back")) == identity(native)
    shapes = torch.load(tmp_path / "written.pth.rank0", weights_only=True)["model"]
    held = shapes["layers.2.blocks.1.mlp._moe_layer.experts.batched_fc1_w"].shape
    assert held == ((EXPERTS // world, 128, 32) if world <= EXPERTS else (1, 64, 32))


@pytest.mark.parametrize("form", FORMS)
def test_four_rank_files_are_written_as_the_official_loop_wrote_them(tmp_path, form):
    native = convert(FILES / FORMS[form], tmp_path / "native")
    convert(native, tmp_path / FORMS[form], "official-moe", world=4)
    names = sorted(path.name for path in FILES.glob(f"{FORMS[form]}.*"))
    assert names == sorted(path.name for path in tmp_path.glob(f"{FORMS[form]}.*"))
    for name in names:
        compare(torch_load(FILES / name), torch.load(tmp_path / name, weights_only=True))


def compare(old, new, where: str = "") -> None:
    if isinstance(old, torch.Tensor):
        assert old.dtype == new.dtype and old.shape == new.shape and torch.equal(old, new), where
    elif isinstance(old, dict):
        if where == "config":  # what depends on the number of ranks is stated
            assert new["MODEL"]["SWIN_MOE"]["NUM_LOCAL_EXPERTS"] == 2 and new["DATA"].pop("BATCH_SIZE") == 128
            new.pop("DATA")
        assert list(old) == list(new) if where in ("", "model") else set(old) == set(new), where
        for key in old:
            compare(old[key], new[key], f"{where}.{key}".strip("."))
    elif isinstance(old, list | tuple):
        assert len(old) == len(new), where
        for index, (a, b) in enumerate(zip(old, new)):
            compare(a, b, f"{where}[{index}]")
    else:
        assert old == new and type(old) is type(new), where


def test_three_ranks_need_the_native_format(tmp_path):
    native = convert(FILES / FORMS["epoch"], tmp_path / "native")
    with pytest.raises(CheckpointError, match=r"8 experts over 3 rank files: .* \(1, 2, 4, 8\)"):
        convert(native, tmp_path / "no.pth", "official-moe", world=3)
    assert not list(tmp_path.glob("*no.pth*"))
    ranks = run_ranks(check_layout, 3, tmp_path, native)
    assert sum(ranks) == EXPERTS


def check_layout(path: Path) -> int:
    """Loads this rank's part in a world of three; returns its experts after comparing them with the whole."""
    parallel = ParallelConfig(expert=3)
    groups = build_groups(parallel, EXPERTS, torch.device("cpu"))
    model = parallelize(build(), parallel, groups)
    layout, whole = parameter_layout(model, groups), tensors_of(path)
    load(path, [Piece(n, layout[n][0], p.dtype, layout[n][1], p.detach()) for n, p in model.named_parameters()])
    for name, parameter in model.named_parameters():
        box = layout[name][1]
        assert torch.equal(parameter.detach(), whole[name][box.within(type(box).whole(layout[name][0]))])
    return layout["layers.2.blocks.1.mlp.experts.fc1_weight"][1].size[0]


def copy_files(tmp_path: Path, form: str = "epoch") -> Path:
    for path in FILES.glob(f"{FORMS[form]}.*"):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / FORMS[form]


def change(path: Path, edit) -> None:
    content = torch_load(path)
    content.pop("config", None)
    edit(content)
    torch.save(content, path)


def drift(content: dict) -> None:
    content["model"]["layers.0.blocks.1.norm1.bias"][3] += 0.25


@pytest.mark.parametrize("policy", ["error", "first", "mean"])
def test_dense_weights_that_drifted_apart_are_told(tmp_path, policy):
    path, told = copy_files(tmp_path), []
    name = "layers.0.blocks.1.norm1.bias"
    change(tmp_path / f"{path.name}.rank2", drift)
    if policy == "error":
        with pytest.raises(CheckpointError, match=rf"tensor {name}: the copies differ by up to 0\.25 .*rank2"):
            convert(path, tmp_path / "native", on_drift=policy, report=told.append)
        assert not (tmp_path / "native").exists()
        return
    convert(path, tmp_path / "native", on_drift=policy, report=told.append)
    (sentence,) = [text for text in told if "differ" in text]
    assert f"tensor {name}" in sentence and "0.25" in sentence and f"kept: {policy}" in sentence
    values = [torch_load(tmp_path / f"{path.name}.rank{r}")["model"][name].double() for r in range(4)]
    wanted = values[0] if policy == "first" else sum(values) / 4
    assert torch.equal(tensors_of(tmp_path / "native", name)[name], wanted.float())


def test_copies_of_other_shapes_and_names_that_stand_twice(tmp_path):
    path, name = copy_files(tmp_path), "layers.0.blocks.1.norm1.bias"
    change(tmp_path / f"{path.name}.rank2", lambda content: content["model"].update({name: torch.zeros(7)}))
    with pytest.raises(CheckpointError, match=rf"rank2: tensor {name} has shape \(7,\), \(8,\) in .*rank0"):
        convert(path, tmp_path / "never", start="tutel")
    path, name = copy_files(tmp_path), "layers.0.blocks.1.attn.cpb_mlp.0.bias"
    for rank in range(4):
        old = {name.replace("cpb", "rpe"): torch.zeros(512)}
        change(tmp_path / f"{path.name}.rank{rank}", lambda content, old=old: content["model"].update(old))
    with pytest.raises(CheckpointError, match=rf"rank0: two tensors stand for {name}"):
        convert(path, tmp_path / "never", start="tutel")
    path = copy_files(tmp_path, "final")
    change(tmp_path / f"{path.name}.rank1", lambda content: content["model"].update({"norm.bias": torch.zeros(32)}))
    with pytest.raises(CheckpointError, match=r"master: tensor norm\.bias is in .*rank1 too"):
        convert(path, tmp_path / "never")


def test_early_biases_and_files_without_the_number_of_experts(tmp_path):
    path = copy_files(tmp_path)
    for rank in range(4):

        def age(content: dict) -> None:
            model = content["model"]
            for name in [n for n in model if n.endswith("_num_global_experts")]:
                del model[name]
            for name in [n for n in model if ".experts." in n and n.endswith("_bias")]:
                model[name] = model[name].unsqueeze(1)
            content.pop("optimizer")

        change(tmp_path / f"{path.name}.rank{rank}", age)
    old = tensors_of(convert(path, tmp_path / "old"))
    new = tensors_of(convert(FILES / FORMS["epoch"], tmp_path / "new"))
    assert all(torch.equal(value, new[name]) for name, value in old.items()) and len(old) == 102


def misshape(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a shard of an expert in the shape that Tutel's scatter saves where ranks share experts."""
    _, rows, *columns = tensor.shape
    return tensor.reshape(2 * rows, columns[0] // 2) if columns else tensor.reshape(rows)


def misshape_all(content: dict) -> None:
    content["model"] = {name: misshape(tensor) for name, tensor in content["model"].items()}


def test_shards_in_the_shapes_of_tutel(tmp_path):
    native = convert(FILES / FORMS["final"], tmp_path / "native")
    path = convert(native, tmp_path / "shards.pth", "official-moe", world=16)
    for rank in range(16):
        change(tmp_path / f"shards.pth.rank{rank}", misshape_all)
    assert identity(convert(path, tmp_path / "back", start="tutel")) == identity(native)
    for rank in range(8, 16):  # half of the ranks would look like experts of half the size
        (tmp_path / f"shards.pth.rank{rank}").unlink()
    with pytest.raises(CheckpointError, match="is a rank file missing"):
        convert(path, tmp_path / "never", start="tutel")


def test_one_gathered_file(tmp_path):
    native = convert(FILES / FORMS["final"], tmp_path / "native")
    gathered = convert(native, tmp_path / "all.pth", "tutel")
    assert identity(convert(gathered, tmp_path / "back")) == identity(native)
    assert torch.load(gathered, weights_only=True)["model"].keys() > {"norm.weight"}
    back = convert(gathered, tmp_path / "w2.pth", "tutel", world=2)
    assert identity(convert(back, tmp_path / "back2")) == identity(native)


@pytest.mark.parametrize("form", FORMS)
def test_missing_swapped_and_damaged_files_are_named(tmp_path, form):
    path = copy_files(tmp_path, form)
    third, second = tmp_path / f"{path.name}.rank3", tmp_path / f"{path.name}.rank2"
    whole = third.read_bytes()
    third.unlink()
    with pytest.raises(CheckpointError, match="is a rank file missing|the number of ranks must divide"):
        convert(path, tmp_path / "never")
    third.write_bytes(whole)
    saved = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match=r"rank2: is missing"):
        convert(path, tmp_path / "never")
    other = FILES / f"{FORMS['final' if form == 'epoch' else 'epoch']}.rank2"
    second.write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match=r"rank[023]: holds no tensor|is in .*rank2 too"):
        convert(path, tmp_path / "never")
    damaged, name = bytearray(saved), "layers.2.blocks.1.mlp.experts.fc1_weight"
    with open_source(FILES / FORMS[form], Options(**QUIET)) as source:
        file, begin = source.locate(name, Chunk((4, 0, 0), (1, 1, 1)))
    assert file.endswith(".rank2")
    damaged[begin + 5] ^= 4
    second.write_bytes(damaged)
    with pytest.raises(CorruptionError, match=rf"rank2: tensor {name}, expert 4: .*CRC-32"):
        convert(path, tmp_path / "never")


def test_moments_that_do_not_fit_their_parameters_are_refused(tmp_path):
    path = copy_files(tmp_path)

    def swap(content: dict) -> None:
        state = content["optimizer"]["state"]
        state[3], state[4] = state[4], state[3]

    change(tmp_path / f"{path.name}.rank1", swap)
    with pytest.raises(CheckpointError, match=r"rank1: optimizer .* has shape .*mlp.fc1.weight"):
        convert(path, tmp_path / "never")

    def shorten(content: dict) -> None:
        content["optimizer"]["param_groups"][0]["params"].pop()

    shutil.copy(FILES / f"{path.name}.rank1", tmp_path / f"{path.name}.rank1")
    change(tmp_path / f"{path.name}.rank1", shorten)
    with pytest.raises(CheckpointError, match="cannot be told apart"):
        convert(path, tmp_path / "never")

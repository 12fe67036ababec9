"""DeepSpeed's own directories of our network, experts included, against what our engine saved at the same step."""

import shutil
from pathlib import Path

import pytest
import torch

from checkpoint_tools.formats import find_format
from swin_moe.checkpoint import CheckpointError
from swin_moe.checkpoint.index import Index
from tests.checkpoint_tools.formats.deepspeed_cases import save_both
from tests.checkpoint_tools.formats.official_files import convert, tensors_of
from tests.equivalence.engine_cases import Case
from tests.ranks import run_ranks

pytestmark = pytest.mark.mpi


def cases(world: int) -> dict[str, Case]:
    """Returns every stage with experts replicated, spread, or both."""
    frozen = Case("deepspeed", 1, world, expert=2, precision="fp32", options=("model.mlp_fc2_bias=false",))
    return {
        "frozen": frozen,
    } | {
        f"zero{stage}_ep{expert}": Case("deepspeed", stage, world, expert=expert, precision="fp32")
        for stage in (1, 2, 3)
        for expert in (2, 0)
        if not (world == 2 and expert == 0)
    }


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.full)])
def saved(request, tmp_path_factory):
    pytest.importorskip("deepspeed")
    root = tmp_path_factory.mktemp(f"world{request.param}")
    return root, run_ranks(save_both, request.param, root, cases(request.param), str(root), timeout=300)[0]


def test_every_stage_is_read_exactly(saved, tmp_path):
    root, ours = saved
    for name, path in ours.items():
        directory = root / name / "deepspeed"
        if name == "frozen":  # DeepSpeed keeps rank 0's experts only of what it does not train
            with pytest.raises(CheckpointError, match=r"experts.fc2_bias is frozen, .* the rest is lost"):
                convert(directory, tmp_path / name)
            continue
        assert find_format(directory) == "deepspeed"
        found = tensors_of(convert(directory, tmp_path / name))
        wanted = {n: t for n, t in tensors_of(Path(path)).items() if not n.startswith("ema/")}
        assert found.keys() == wanted.keys(), name
        for tensor, value in wanted.items():
            assert torch.equal(found[tensor], value), (name, tensor)
        assert Index.read(tmp_path / name).step == 2
        by_tag = tensors_of(convert(directory / "global_step2", tmp_path / f"{name}-tag"))
        assert all(torch.equal(by_tag[tensor], value) for tensor, value in wanted.items())


def test_lost_and_foreign_files_are_told(saved, tmp_path):
    root, _ = saved
    for stage in (1, 3):
        copy = tmp_path / f"zero{stage}"
        shutil.copytree(root / f"zero{stage}_ep2" / "deepspeed", copy)
        tag = copy / "global_step2"
        last = max(tag.glob("*_optim_states.pt"))
        last.rename(copy / "aside")
        with pytest.raises(CheckpointError, match=r"optimizer states of rank \d are missing"):
            convert(copy, tmp_path / "never")
        (tag / "layer_0_expert_1_mp_rank_00_model_states.pt").touch()
        with pytest.raises(CheckpointError, match=r"experts of deepspeed\.moe"):
            convert(copy, tmp_path / "never")
        (tag / "layer_0_expert_1_mp_rank_00_model_states.pt").unlink()
        for path in tag.glob("*_optim_states.pt"):
            path.unlink()
        with pytest.raises(CheckpointError, match="no ZeRO optimizer states"):
            convert(copy, tmp_path / "never")
        (copy / "latest").write_text("../../elsewhere")
        with pytest.raises(CheckpointError, match="neither `latest` nor"):
            convert(copy, tmp_path / "never", start="deepspeed")

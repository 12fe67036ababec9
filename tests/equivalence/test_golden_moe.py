"""The whole Swin-MoE spread over real ranks against the official code's recorded run on as many ranks."""

import pytest
import torch
import torch.distributed as dist

from swin_moe import create_model
from swin_moe.config import ParallelConfig
from swin_moe.parallel.apply import parallelize
from swin_moe.parallel.groups import build_groups
from tests.models.reference import GOLDEN, fill_by_name, gradient_norms, normal, official_name, relative_error
from tests.ranks import TWO_AND_FOUR, run_ranks

pytestmark = pytest.mark.mpi
TOLERANCE = 1e-5
ROUTINGS = ("nodrop", "top1")


def run_rank() -> list[dict]:
    """Returns, per routing, this rank's logits, auxiliary loss and gradient norms before any reduction or division."""
    rank, world = dist.get_rank(), dist.get_world_size()
    results = []
    for routing in ROUTINGS:
        case = f"moe_linear_8e_{routing}"
        golden = torch.load(GOLDEN / "moe" / f"{case}_w{world}.pt", weights_only=True)
        model = create_model("swin_moe", num_experts=golden["experts"], **golden["cfg"]).eval()
        fill_by_name(model)
        groups = build_groups(ParallelConfig(), golden["experts"], torch.device("cpu"))
        model = parallelize(model, ParallelConfig(), groups)
        logits, aux = model(normal(case, (8, 3, 64, 64)).float().chunk(world)[rank])
        (logits.square().mean() + aux).backward()
        norms = {official_name(n): v for n, v in gradient_norms(model).items()}
        results.append({"logits": logits.detach(), "aux": aux.item(), "norms": norms})
    return results


@pytest.mark.parametrize("world", TWO_AND_FOUR)
def test_logits_auxiliary_losses_and_gradients(world, tmp_path):
    ranks = run_ranks(run_rank, world, tmp_path)
    for index, routing in enumerate(ROUTINGS):
        golden = torch.load(GOLDEN / "moe" / f"moe_linear_8e_{routing}_w{world}.pt", weights_only=True)
        logits = torch.cat([rank[index]["logits"] for rank in ranks])
        assert relative_error(logits, golden["logits"]) < TOLERANCE
        assert [rank[index]["aux"] for rank in ranks] == pytest.approx(golden["aux"], rel=TOLERANCE)
        for rank in range(world):
            assert ranks[rank][index]["norms"] == pytest.approx(golden["grad_norms"][rank], rel=TOLERANCE)

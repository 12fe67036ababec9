"""Nothing quadratic: four times the experts, or ranks, take about four times the steps of the interpreter.

Steps are counted, not seconds: calls of functions and the builtins they call, the same on any machine. Of the parts
that were quadratic each made its verb's ratio 6 to 16.
"""

import sys

import numpy as np
import pytest

from checkpoint_tools.__main__ import main
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.load import read_arrays
from swin_moe.checkpoint.pieces import Piece
from swin_moe.checkpoint.save import write_checkpoint
from swin_moe.layout import Chunk

FEW, MANY = 12, 48
KINDS = ("", "optim.exp_avg/", "optim.exp_avg_sq/")
LIMIT = 1.12 * MANY / FEW


def state_of(experts: int) -> dict[str, np.ndarray]:
    """Returns the parameters and moments of a network of one MoE block, without a network."""
    block, channels, hidden = "layers.0.blocks.1.mlp", 4, 8
    shapes = {
        "patch_embed.proj.weight": (channels, 3, 2, 2),
        "layers.0.blocks.0.mlp.fc1.weight": (hidden, channels),
        "layers.0.blocks.0.attn.cpb_mlp.0.weight": (512, 2),
        "layers.0.blocks.0.attn.cpb_mlp.2.weight": (1, 512),
        "layers.0.blocks.1.attn.cpb_mlp.2.weight": (1, 512),
        f"{block}.router.sim_matrix": (4, experts),
        f"{block}.router.projector.weight": (4, channels),
        f"{block}.router.projector.bias": (4,),
        f"{block}.router.temperature": (1,),
        f"{block}.experts.fc1_weight": (experts, hidden, channels),
        f"{block}.experts.fc1_bias": (experts, hidden),
        f"{block}.experts.fc2_weight": (experts, hidden, channels),
        f"{block}.experts.fc2_bias": (experts, channels),
    }
    random = np.random.default_rng(0)
    return {kind + name: random.standard_normal(shape).astype("f4") for name, shape in shapes.items() for kind in KINDS}


def config_of(experts: int) -> dict:
    moe = {"num_experts": experts, "top_k": 1, "router": "cosine"}
    return {"model": {"name": "swin_moe", "img_size": [8, 8], "window_size": 2, "moe": moe}}


def count_steps(work) -> int:
    """Returns the calls of functions and of builtins in a piece of work that must succeed."""
    steps = 0

    def tick(frame, event, argument) -> None:
        nonlocal steps
        steps += event in ("call", "c_call")

    sys.setprofile(tick)
    try:
        result = work()
    finally:
        sys.setprofile(None)
    assert not result
    return steps


def save(root, experts, step=1, keep=0):
    pieces = [Piece.of(name, array) for name, array in state_of(experts).items()]
    write_checkpoint(root, step, pieces, state={}, config=config_of(experts), keep=keep)


def load(path, experts):
    """Fills a piece for each expert, as a run of one expert per rank does on all its ranks together."""
    single = [
        Piece.of(
            name, array[e : e + 1], shape=array.shape, chunk=Chunk((e, *(0,) * (array.ndim - 1)), (1, *array.shape[1:]))
        )
        for name, array in state_of(experts).items()
        if ".experts." in name
        for e in range(experts)
    ]
    read_arrays(Index.read(path), single)


VERBS = {
    "inspect": "inspect {source}",
    "verify": "verify {source}",
    "plan": "plan {source} {out}",
    "reshard": "reshard {source} {out} --world {experts}",
    "diff": "diff {source} {source}",
    "average": "average {source} {source} {out}",
    "duplicate": "experts {source} {out} --duplicate {twice} --no-check",
    "merge": "experts {source} {out} --merge {half} --no-check",
    "export": "export {source} {out}.safetensors --to safetensors",
    "to-dcp": "convert {source} {out} --to dcp",
    "from-dcp": "convert {dcp} {out} --to native",
    "to-one-file": "convert {source} {out} --to official",
    "to-rank-files": "convert {source} {out} --to official-moe --world {experts}",
    "from-rank-files": "convert {ranks} {out} --to native",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Returns experts -> the paths of one network in three formats."""
    found = {}
    for experts in (FEW, MANY):
        root = tmp_path_factory.mktemp(f"experts{experts}")
        save(root, experts)
        source, dcp, ranks = root / "0000000001", root / "dcp", root / "ranks"
        assert main(["convert", str(source), str(dcp), "--to", "dcp"]) == 0
        assert main(["convert", str(source), str(ranks), "--to", "official-moe"]) == 0
        found[experts] = {
            "source": source,
            "dcp": dcp,
            "ranks": ranks,
            "experts": experts,
            "twice": 2 * experts,
            "half": experts // 2,
        }
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_are_linear(verb, checkpoints, tmp_path, capsys):
    steps = {}
    for experts, paths in checkpoints.items():
        if experts == FEW:  # imports what the verb needs
            main(VERBS[verb].format(**paths, out=tmp_path / "first").split())
        command = VERBS[verb].format(**paths, out=tmp_path / str(experts)).split()
        steps[experts] = count_steps(lambda command=command: main(command))
    assert steps[MANY] <= LIMIT * steps[FEW], steps


@pytest.mark.parametrize("work", ["save", "save-beside-others", "load"])
def test_training_is_linear(work, checkpoints, tmp_path):
    steps = {}
    for experts, paths in checkpoints.items():
        root = tmp_path / str(experts)
        for step in (1, 2) if work == "save-beside-others" else ():
            save(root, experts, step)
        act, *arguments = {
            "save": (save, root, experts),
            "save-beside-others": (save, root, experts, 3, 2),
            "load": (load, paths["source"], experts),
        }[work]
        steps[experts] = count_steps(lambda act=act, arguments=arguments: act(*arguments))
    assert steps[MANY] <= LIMIT * steps[FEW], steps


def test_the_count_tells_a_square_from_a_line():
    def square(n):
        for _ in range(n * n):
            len(())

    assert count_steps(lambda: square(64)) > LIMIT * count_steps(lambda: square(16))

"""Torch tensors through the format: dtypes, strides, conversion, and the manager of a run."""

from dataclasses import dataclass, field

import pytest
import torch

from swin_moe.checkpoint import CheckpointError, CheckpointManager, CorruptionError, Index, Piece, load, save
from swin_moe.checkpoint.manager import canonical_config
from swin_moe.layout import Chunk
from tests.checkpoint.samples import directory_bytes

_DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool"
)
DTYPES = [getattr(torch, name) for name in _DTYPES.split()]


def tensors():
    random = torch.Generator().manual_seed(0)
    return {str(d): torch.randint(0, 2, (3, 5), generator=random).to(d) for d in DTYPES} | {
        "parameter": torch.nn.Parameter(torch.randn(4, 6, generator=random)),
        "transposed": torch.randn(6, 4, generator=random).t(),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }


def save_all(root, held, step=1, **options):
    options = {"state": {"seed": 0}, "config": {}} | options
    return save(root, step, [Piece.of(name, tensor) for name, tensor in held.items()], **options)


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def test_all_dtypes_and_strides_are_bit_exact(tmp_path):
    held = tensors()
    path = save_all(tmp_path, held)
    filled = {name: torch.zeros_like(tensor) for name, tensor in held.items()}
    filled["transposed"] = torch.zeros(6, 4).t()
    index = load(path, [Piece.of(name, tensor) for name, tensor in filled.items()])
    assert index.state == {"seed": 0}
    for name, tensor in held.items():
        assert torch.equal(raw(tensor), raw(filled[name])), name


def test_a_part_lands_in_a_view_of_a_leaf_parameter(tmp_path):
    path = save_all(tmp_path, {"w": torch.arange(24.0).reshape(4, 6)})
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    load(path, [Piece.of("w", parameter, shape=(4, 6), chunk=Chunk((1, 2), (2, 3)))])
    assert parameter.tolist() == [[8, 9, 10], [14, 15, 16]] and parameter.requires_grad


def test_floats_are_converted_only_if_asked(tmp_path):
    weight = torch.randn(8)
    path = save_all(tmp_path, {"w": weight, "n": torch.arange(3)})
    half = torch.zeros(8, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="tensor w: has dtype F32, BF16 is wanted"):
        load(path, [Piece.of("w", half)])
    load(path, [Piece.of("w", half)], convert=True)
    assert torch.equal(half, weight.bfloat16())
    with pytest.raises(CheckpointError, match="tensor n: has dtype I64, F32 is wanted"):
        load(path, [Piece.of("n", torch.zeros(3))], convert=True)


def test_nothing_stored_is_dropped_silently(tmp_path):
    path = save_all(tmp_path, {"w": torch.ones(2), "optim.exp_avg/w": torch.ones(2)})
    wanted = [Piece.of("w", torch.zeros(2))]
    load(path, wanted)
    with pytest.raises(CheckpointError, match="no place for: optim.exp_avg/w"):
        load(path, wanted, exact=True)


def test_dtype_of_the_tensor_is_checked(tmp_path):
    piece = Piece("w", (2,), "BF16", Chunk((0,), (2,)), torch.zeros(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="tensor w: an array of torch.float16 was given for BF16"):
        save(tmp_path, 1, [piece], state={}, config={})
    with pytest.raises(ValueError, match="checkpoints hold no dtype complex64"):
        Piece.of("w", torch.zeros(2, dtype=torch.complex64))


@dataclass(frozen=True)
class Parallel:
    expert: int = 1


@dataclass(frozen=True)
class Options:
    parallel: Parallel = field(default_factory=Parallel)
    model: dict = field(default_factory=lambda: {"depths": (2, 2)})


def test_layout_and_host_are_no_part_of_the_identity(tmp_path):
    config = {"model": {"a": 1}, "parallel": {"expert": 4}, "run": {"seed": 1, "output": "/x"}, "data": {"workers": 3}}
    assert canonical_config(config) == {"model": {"a": 1}, "run": {"seed": 1}, "data": {}}
    held = {"w": torch.ones(3)}
    paths = [
        CheckpointManager(tmp_path / str(n)).save(1, [Piece.of("w", held["w"])], state={}, config=Options(Parallel(n)))
        for n in (1, 2)
    ]
    assert directory_bytes(paths[0]) == directory_bytes(paths[1])
    assert b'"parallel":{"expert":2}' in (paths[1] / "provenance.json").read_bytes()


def filled_by(manager, **options):
    wanted = {"w": torch.zeros(3)}
    state = manager.resume([Piece.of(name, tensor) for name, tensor in wanted.items()], **options)
    return state, wanted["w"].tolist()


def test_a_run_resumes_from_its_newest_valid_checkpoint(tmp_path, caplog):
    manager = CheckpointManager(tmp_path / "run" / "checkpoints", keep=3)
    assert manager.latest() is None and filled_by(manager) == (None, [0, 0, 0])
    for step in (1, 2, 3):
        manager.save(step, [Piece.of("w", torch.full((3,), float(step)))], state={"step": step}, config={})
    assert filled_by(manager) == ({"step": 3}, [3, 3, 3])
    newest = manager.latest()
    stored = Index.read(newest).tensors["w"].chunks[0]
    data = bytearray((newest / stored.file).read_bytes())
    data[stored.begin] ^= 1
    (newest / stored.file).write_bytes(data)
    assert filled_by(manager) == ({"step": 2}, [2, 2, 2])
    assert str(newest) in caplog.text and "tensor w" in caplog.text
    other = CheckpointManager(tmp_path / "other")
    assert filled_by(other, source=str(tmp_path / "run")) == ({"step": 2}, [2, 2, 2])
    assert filled_by(other, source=str(newest.parent / "0000000001")) == ({"step": 1}, [1, 1, 1])
    with pytest.raises(CorruptionError, match="tensor w"):  # asked for by name: no substitute
        filled_by(other, source=str(newest))
    with pytest.raises(CheckpointError, match=r"checkpoint.load=.*nowhere: is neither a checkpoint"):
        filled_by(other, source=str(tmp_path / "nowhere"))


def test_parameters_come_from_the_average_where_there_is_one(tmp_path):
    manager = CheckpointManager(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        manager.load_parameters([Piece.of("w", torch.zeros(3))])
    held = {
        "w": torch.ones(3),
        "ema/w": torch.full((3,), 2.0),
        "b": torch.full((1,), 3.0),
        "optim.exp_avg/w": torch.zeros(3),
    }
    manager.save(5, [Piece.of(name, tensor) for name, tensor in held.items()], state={}, config={})
    w, b = torch.zeros(3, dtype=torch.float64), torch.zeros(1)
    text = manager.load_parameters([Piece.of("w", w), Piece.of("b", b)])
    assert (w.tolist(), b.tolist()) == ([2, 2, 2], [3]) and "step 5, 1 of 2 parameters averaged" in text


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_saved_and_filled(tmp_path):
    held = {"w": torch.randn(300, 200), "h": torch.randn(7).bfloat16(), "s": torch.tensor(3)}
    path = save_all(tmp_path / "gpu", {name: tensor.cuda() for name, tensor in held.items()})
    assert directory_bytes(path) == directory_bytes(save_all(tmp_path / "cpu", held))
    filled = {name: torch.zeros_like(tensor, device="cuda") for name, tensor in held.items()}
    load(path, [Piece.of(name, tensor) for name, tensor in filled.items()])
    assert all(torch.equal(filled[name].cpu(), tensor) for name, tensor in held.items())

"""What the verbs print and write, by hand-checked numbers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from checkpoint_tools.__main__ import VERBS, main
from checkpoint_tools.verbs import text
from launcher.failure.kinds import MEMORY
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.load import read_arrays, verify
from swin_moe.checkpoint.pieces import Piece
from swin_moe.checkpoint.save import write_checkpoint
from swin_moe.layout import Chunk
from tests.checkpoint.samples import CONFIG, STATE, directory_bytes, read_state, same, sample_state
from tests.checkpoint_tools.samples import save
from tests.ranks import ROOT


@pytest.fixture
def run(capsys):
    """Runs a verb; returns (exit code, output, errors)."""

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_inspect_lists_parameters_with_what_is_stored_for_them(tmp_path, run):
    path = save(tmp_path)
    code, out, _ = run("inspect", path)
    lines = out.splitlines()
    assert code == 0 and lines[0] == f"{path}: native, step 1"
    assert lines[1] == "13 tensors in 25 chunks, 13.2 KiB; 1,210 parameters, 544 of them in 4 experts"
    row = next(line.split() for line in lines if "experts.fc1_weight" in line)
    assert row == ["layers.0.mlp.experts.fc1_weight", "4x8x16", "F32", "4", "4", "6", "KiB", "weight", "ema", "exp_avg"]
    assert any(
        line.split()[:2] == ["index.json", text.format_bytes((path / "index.json").stat().st_size).split()[0]]
        for line in lines
        if line
    )
    assert 'provenance: {"time": "then"}' in lines


def test_inspect_as_json_holds_everything(tmp_path, run):
    path = save(tmp_path)
    content = json.loads(run("inspect", path, "--json")[1])
    assert (content["step"], content["state"], content["config"]) == (1, STATE, CONFIG)
    assert content["tensors"]["layers.0.mlp.experts.fc1_bias"] == {
        "shape": [4, 8],
        "dtype": "F16",
        "bytes": 64,
        "chunks": 4,
        "experts": 4,
    }
    assert content["totals"]["bytes"] == sum(array.nbytes for array in sample_state().values())
    assert content["files"][str(path / "index.json")] == (path / "index.json").stat().st_size


def test_a_run_stands_for_its_newest_complete_checkpoint(tmp_path, run):
    for step in (1, 2, 3):
        save(tmp_path / "checkpoints", step, step=step)
    (tmp_path / "checkpoints" / "0000000003" / "shard-00000.safetensors").unlink()
    code, out, _ = run("inspect", tmp_path, "--json")
    assert code == 0 and "0000000003 is not usable" in out.partition("{")[0]
    assert json.loads(out[out.index("{") :])["step"] == 2


def test_verify_says_what_it_checked(tmp_path, run):
    path = save(tmp_path)
    expected = f"{path}: 13 tensors, 13.2 KiB: all match their digests, no element is missing or stored twice\n"
    assert run("verify", path) == (0, expected, "")


def changed(seed=0):
    """Returns a state that differs from the sample by known numbers, and what it lacks and has."""
    state = sample_state(seed)
    state["head.bias"] = state["head.bias"] + np.array([0, 0.5, 0, 0, -0.25, 0, 0])
    state["counts"] = state["counts"] + 3
    state["step"] = np.array(int(state["step"]), "i8")
    state["flag"] = np.array([[True, False, True]])
    state["new"] = np.zeros(1)
    state["layers.0.mlp.router.weight"] = -state["layers.0.mlp.router.weight"] * 0.0
    del state["empty"]
    return state


def test_diff_names_what_differs_and_by_how_much(tmp_path, run):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", state=changed(), step=2, config={"model": {"name": "swinv2"}})
    code, out, _ = run("diff", a, b, "--json")
    found = json.loads(out)
    largest = float(np.abs(sample_state()["layers.0.mlp.router.weight"]).max())
    assert code == 1
    assert (found["missing"], found["added"]) == (["empty"], ["new"])
    assert found["reshaped"] == {"flag": [[3], [1, 3]]} and found["retyped"] == {"step": ["I32", "I64"]}
    assert found["changed"] == {
        "head.bias": {"elements": 2, "max": "0.5"},
        "counts": {"elements": 15, "max": "3.0"},
        "layers.0.mlp.router.weight": {"elements": 64, "max": str(largest)},
    }
    assert found["entries"] == {
        "step": [1, 2],
        "config.model.depths": [[2, 2], None],
        "config.model.name": ["swin_moe", "swinv2"],
    }
    text = run("diff", a, b)[1]
    assert f"only in {a}:\n  empty\n" in text and "head.bias" in text and "0.5" in text


def test_diff_of_the_same_is_silent_about_numbers(tmp_path, run):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", file_size=1 << 20)
    assert run("diff", a, b) == (0, f"{a} and {b} hold the same\n", "")


def test_diff_sees_nans_and_signs_of_zero(tmp_path, run):
    values = np.array([0.0, np.nan, np.nan, 1.0]), np.array([-0.0, np.nan, 2.0, 1.0])
    a, b = (save(tmp_path / str(i), state={"w": v, "s": np.zeros(1)}) for i, v in enumerate(values))
    found = json.loads(run("diff", a, b, "--json")[1])
    assert found["changed"] == {"w": {"elements": 2, "max": "nan"}}


def test_plan_tells_what_a_conversion_then_does(tmp_path, run):
    path = save(tmp_path)
    code, out, _ = run("plan", path, tmp_path / "out", "--file-size", "2K")
    assert code == 0 and not (tmp_path / "out").exists()
    assert run("convert", path, tmp_path / "out", "--to", "native", "--file-size", "2K", "--dry-run")[1] == out
    assert run("convert", path, tmp_path / "out", "--to", "native", "--file-size", "2K")[0] == 0
    written = {f"out/{p.name}": text.format_bytes(p.stat().st_size) for p in (tmp_path / "out").glob("*.safetensors")}
    rows = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("out/")]
    assert {name: size.strip() for name, size in rows} == written and len(written) > 3
    assert f"reads    {text.format_bytes(sum(a.nbytes for a in sample_state().values()))} from 6 files" in out


def test_reshard_shows_the_ranks_and_writes_the_canonical_bytes(tmp_path, run):
    path = save(tmp_path)
    code, out, _ = run("reshard", path, tmp_path / "out", "--world", 3, "--expert", 3, "--file-size", "4K")
    assert code == 0 and directory_bytes(tmp_path / "out") == directory_bytes(path)
    assert out.startswith("3 ranks = expert 3 x expert_shard 1 x expert_data 1")
    assert [line.split()[:4] for line in out.splitlines()[2:5]] == [
        ["0", "0", "to", "1"],
        ["1", "2", "to", "3"],
        ["2", "7.18", "KiB", "7.18"],
    ]
    code, _, error = run("reshard", path, tmp_path / "other", "--world", 6, "--expert", 4)
    assert code == 2 and "parallel.expert=4 x parallel.expert_shard=1 = 4 does not divide the world of 6" in error


def means(a, b, weight):
    """Returns the float64 mean of two states' parameters, rounded to their dtypes."""
    return {
        n: (weight * a[n].astype("f8") + (1 - weight) * b[n].astype("f8")).astype(a[n].dtype)
        for n in a
        if "/" not in n and a[n].dtype.kind == "f"
    }


@pytest.mark.parametrize("weight", [0.5, 0.25, 1.5])
def test_average_is_the_weighted_mean_of_the_parameters(tmp_path, run, weight):
    states = [{k: v for k, v in sample_state(seed).items() if v.dtype.kind == "f"} for seed in (0, 1)]
    a, b = (save(tmp_path / str(i), state=state, step=i + 4) for i, state in enumerate(states))
    code, _, error = run("average", a, b, tmp_path / "out", "--weights", f"{weight},{1 - weight}")
    assert code == 0, error
    assert same(read_state(tmp_path / "out"), means(*states, weight))
    assert Index.read(tmp_path / "out").step == 5
    verify(tmp_path / "out")


def test_average_takes_running_averages_where_asked(tmp_path, run):
    path = save(tmp_path / "a")
    assert run("average", path, path, tmp_path / "out", "--ema")[0] == 0
    state = read_state(tmp_path / "out")
    assert set(state) == {"layers.0.mlp.experts.fc1_weight", "patch_embed.weight"}
    assert np.array_equal(state["patch_embed.weight"], sample_state()["ema/patch_embed.weight"])


@pytest.mark.parametrize(
    ("other", "options", "reason"),
    [
        (dict(state={"x": np.zeros(2)}), (), "holds no tensor"),
        (
            dict(state=sample_state() | {"head.bias": np.zeros(3)}),
            (),
            r"tensor head.bias: is F64 (3,), but F64 (7,) in",
        ),
        (dict(state=sample_state() | {"counts": np.zeros((3, 5), "i8")}), (), "tensor counts: I64 has no mean"),
        ({}, ("--weights", "1,1"), "--weights must be 2 numbers that sum to 1"),
        ({}, ("--weights", "nan,1"), "--weights must be 2 numbers that sum to 1"),
    ],
)
def test_what_has_no_mean_is_refused(tmp_path, run, other, options, reason):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", **other)
    code, _, error = run("average", a, b, tmp_path / "out", *options)
    assert code == 2 and reason in error and not (tmp_path / "out").exists()


def test_bfloat16_is_averaged_by_value(tmp_path, run):
    """1 and 1 + 2**-7 are neighbours: their mean is a tie, which goes to the even 1."""
    paths = []
    for number, bits in enumerate((0x3F80, 0x3F81)):
        piece = Piece("w", (2,), "BF16", Chunk((0,), (2,)), np.array([bits, 0x4000], "<i2"))
        paths.append(write_checkpoint(tmp_path / str(number), 1, [piece], state={}, config={}))
    assert run("average", *paths, tmp_path / "out")[0] == 0
    mean = Piece("w", (2,), "BF16", Chunk((0,), (2,)), np.empty(2, "<i2"))
    read_arrays(Index.read(tmp_path / "out"), [mean])
    assert mean.tensor.tolist() == [0x3F80, 0x4000]


@pytest.mark.parametrize("last", [False, True])
def test_safetensors_hold_whole_parameters_averaged_where_there_are_averages(tmp_path, run, last):
    path, state = save(tmp_path / "a"), sample_state()
    assert run("export", path, tmp_path / "x.safetensors", "--to", "safetensors", *["--last"] * last)[0] == 0
    expected = {n: state[n] if last else state.get(f"ema/{n}", state[n]) for n in state if "/" not in n}
    assert same(safetensors.numpy.load_file(tmp_path / "x.safetensors"), expected)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a", "x.safetensors"]
    code, _, error = run("export", path, tmp_path / "x.safetensors", "--to", "safetensors")
    assert code == 2 and "exists already" in error


WRONG = {
    "verb": (("reshrad",), "unknown verb 'reshrad'"),
    "nothing there": (("verify", "{tmp}/none"), "none: does not exist"),
    "no checkpoint": (("verify", "{tmp}"), "is no checkpoint of a known format"),
    "memory": (("verify", "{tmp}", "--max-memory", "3M"), "--max-memory must be at least 64 MiB"),
    "size": (("verify", "{tmp}", "--max-memory", "much"), "a size is a number with K, M, G or T"),
    "world": (("reshard", "{path}", "{tmp}/out", "--world", "0"), "--world must be >= 1"),
    "batch": (("export", "{path}", "{tmp}/out", "--to", "onnx", "--batch", "0"), "--batch must be >= 1"),
    "no config": (("export", "{path}", "{tmp}/out", "--to", "torch-export"), "has no entry model.depth"),
    "target": (("convert", "{path}", "{path}", "--to", "native"), "exists already"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_sentence(tmp_path, run, case):
    arguments, reason = WRONG[case]
    path = save(tmp_path / "run", config={"model": {"depth": 3}})
    code, _, error = run(*(a.format(tmp=tmp_path, path=path) for a in arguments))
    assert code == 2 and (reason in error or case == "no config" and "depth" in error), error
    assert case == "size" or error.count("\n") == 1


def test_every_verb_has_help_and_none_needs_torch():
    code = (
        "import sys; from checkpoint_tools.__main__ import VERBS, main\n"
        "for verb in VERBS:\n"
        "    try: main([verb, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(VERBS)


def test_sizes_are_read_and_written():
    assert [text.parse_bytes(t) for t in ("7", "2K", "1.5MiB", "3g", "1TB")] == [7, 2048, 3 << 19, 3 << 30, 1 << 40]
    assert [text.format_bytes(n) for n in (7, 999, 1000, 1 << 20)] == ["7 B", "999 B", "0.977 KiB", "1 MiB"]
    assert text.format_bytes(2000 << 40) == "2000 TiB"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 7 KiB"), "(7 KiB more were needed)"),
        (RuntimeError("can't allocate memory"), ":"),
    ],
)
def test_a_verb_without_memory_says_so_and_ends_as_a_run_does(run, monkeypatch, tmp_path, error, said):
    def short(*_arguments):
        raise error

    monkeypatch.setattr("checkpoint_tools.verbs.inspect.run", short)
    code, _, errors = run("inspect", tmp_path)
    assert code == MEMORY and errors.startswith(f"error: out of memory {said}".replace(" :", ":")), errors
    assert errors.count("\n") == 1


def test_a_misspelt_verb_is_answered_with_the_right_one(run):
    code, _, errors = run("inspcet", "x")
    assert code == 2 and "unknown verb 'inspcet'; did you mean inspect? allowed: inspect, verify" in errors


@pytest.mark.parametrize("rank", ["1", "x", ""])
def test_a_rank_in_the_environment_alone_silences_nothing(run, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    assert run("inspect", "nowhere")[2] == "error: nowhere: does not exist\n"

"""--set and --world: what nobody would heed is refused in one sentence; the table says what the formats really ask."""

from collections.abc import Mapping

import pytest
import torch

from checkpoint_tools.__main__ import main
from checkpoint_tools.formats import FORMATS, open_source, write_checkpoint
from checkpoint_tools.formats.settings import SETTINGS
from checkpoint_tools.sources.base import Options
from swin_moe import create_model
from swin_moe.checkpoint.errors import CheckpointError
from tests.checkpoint_tools.formats.official_files import QUIET, convert

SMALL = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 3}
SIZES = ["--set", "img_size=32", "--set", "window_size=4"]


class Asked(Mapping):
    """A mapping that knows which of its keys somebody asked for by name; copying it asks for none."""

    def __init__(self, given):
        self.given, self.asked = given, set()

    def get(self, key, default=None):
        self.asked.add(key)
        return self.given.get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return key in self.given

    def __getitem__(self, key):
        return self.given[key]

    def __iter__(self):
        return iter(self.given)

    def __len__(self):
        return len(self.given)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns a folder with the same experts in every format that is written and read, by the format's name."""
    root = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    experts = create_model("swin_moe", **SMALL, num_experts=2, moe_blocks=((-1,), (1,)))
    dense = create_model("swin", **SMALL)
    for name, model in (("experts", experts), ("network", dense)):
        torch.save({"model": model.state_dict()}, root / f"{name}.pth")
    sizes = {"img_size": "32", "window_size": "4"}
    for to in ("native", "dcp", "fairscale", "official-moe", "tutel"):
        convert(root / "experts.pth", root / to, to, extra=sizes)
    for to in ("official", "timm", "hf"):
        convert(root / "network.pth", root / to, to, extra=sizes)
    pretraining = {f"encoder.{name}": tensor for name, tensor in dense.state_dict().items()}
    torch.save({"model": pretraining}, root / "simmim")
    return root


REFUSED = {
    "a typo": ("official native --set img_sise=32", "--set img_sise is unknown; did you mean img_size? allowed: "),
    "no key": ("official native --set =3", "--set takes KEY=VALUE; keys: counts, encoder"),
    "form of one file": ("official native --set form=epoch", "--set form=epoch has no effect on what is read as"),
    "counts for timm": ("official timm --set counts=no", "it is for --to official, --to official-moe"),
    "counts that are none": ("official-moe official --set counts=maybe", "--set counts must be yes or no, got 'maybe'"),
    "network of a classifier": ("official hf --set network=teacher", "it is for --to dense"),
    "prefix of none": ("timm native --set encoder=keep", "it is for --from simmim"),
    "step of none": ("hf native --set step=5", "has no effect on what is read as hf and written as native; it is for"),
    "step that is told": ("native dcp --set step=5", "--set step=5 is for files that do not tell it; this one is of 0"),
    "ranks of one file": ("official timm --world 4", "--world 4 has no effect on --to timm; it is for"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("how", [["convert"], ["convert", "--dry-run"], ["plan"]], ids=" ".join)
def test_what_nobody_heeds_is_refused(case, how, files, tmp_path, capsys):
    words, sentence = REFUSED[case]
    source, to, *rest = words.split()
    sizes = SIZES if source in ("official", "timm", "hf") else []
    arguments = [how[0], str(files / source), str(tmp_path / "out"), "--to", to, *rest, *how[1:], *sizes]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_upcycling_refuses_it_too(files, tmp_path, capsys):
    source, target = str(files / "official"), str(tmp_path / "out")
    assert main(["upcycle", source, target, "--experts", "2", "--set", "form=epoch", *SIZES]) == 2
    assert "--set form=epoch has no effect" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_batch_of_weights_is_refused(files, tmp_path, capsys):
    assert main(["export", str(files / "native"), str(tmp_path / "x"), "--to", "safetensors", "--batch", "2"]) == 2
    assert "--batch 2 has no effect on --to safetensors" in capsys.readouterr().err


READ = ("native", "official-moe", "dcp", "fairscale", "tutel", "official", "timm", "simmim")
VALUES = {"counts": "no", "encoder": "keep", "form": "epoch", "network": "teacher", "step": "0"}


@pytest.mark.parametrize("source", READ)
@pytest.mark.parametrize("key", VALUES)
def test_the_table_of_readers_is_what_they_ask(key, source, files):
    asked = Asked({key: VALUES[key]})
    with open_source(files / source, Options(extra=asked, **QUIET), source):
        readers, _ = SETTINGS[key]
        assert (key in asked.asked) == (source in readers)


@pytest.mark.parametrize("to", [name for name, row in FORMATS.items() if row.write and name not in ("dense", "simmim")])
@pytest.mark.parametrize("key", VALUES)
def test_the_table_of_writers_is_what_they_ask(key, to, files, tmp_path):
    """Each key reaches the writer beyond the check, by a format's name that the table does not know."""
    dense = to in ("timm", "hf")
    with open_source(files / ("official" if dense else "native"), Options(**QUIET)) as source:
        if dense:
            source.config = {"model": {**source.config["model"], "img_size": [32, 32], "window_size": 4}}
        source.format = "elsewhere"
        asked = Asked({key: VALUES[key]})
        world = 2 if to == "tutel" else 0
        options = Options(extra=asked, world=world, **QUIET)
        write_checkpoint(source, tmp_path / "out", options, to)
    assert (key in asked.asked) == (to in SETTINGS[key][1])


def test_steps_that_contradict_the_file_are_refused(tmp_path):
    from tests.checkpoint_tools.formats.test_steps import official_file

    path = official_file(tmp_path / "x.pth", name="adamw")  # Adam counted two
    sizes = {"img_size": "32", "window_size": "4"}
    with pytest.raises(CheckpointError, match=r"--set step=7 is for files that do not tell it; this one is of 2"):
        convert(path, tmp_path / "out", extra=sizes | {"step": "7"})
    convert(path, tmp_path / "out", extra=sizes | {"step": "2"})

"""A path that is not there is answered with what lies beside it under nearly the same name; a file of another kind with
the place it belongs to."""

from pathlib import Path

import pytest

from checkpoint_tools.formats import find_format
from swin_moe.checkpoint.manager import find_checkpoint
from swin_moe.config.arguments import near_path
from swin_moe.config.io import load_config
from swin_moe.curate.find import find
from swin_moe.report.records import read_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "weights.pth").write_bytes(b"PK\x80\x81")
    return tmp_path


def test_the_nearest_name_beside_it(folder):
    assert near_path(folder / "mien") == f"; did you mean {folder / 'mine'}?"
    assert near_path(folder / "weights.pt") == f"; did you mean {folder / 'weights.pth'}?"
    assert near_path(folder / "w.pth") == ""  # an ending that all may have is no likeness
    assert near_path(folder / "elsewhere") == near_path(folder / "gone" / "mine") == near_path("a\0b") == ""


ASKED = {
    "a run for its report": (read_run, "mien", "mine"),
    "a run for its weights": (lambda path: find_checkpoint(path, key="checkpoint.load"), "mien", "mine"),
    "a config": (lambda path: load_config(str(path)), "mien", "mine"),
    "images": (find, "mien", "mine"),
    "a file of weights": (find_format, "wieghts.pth", "weights.pth"),
}


@pytest.mark.parametrize("case", ASKED)
def test_who_is_asked_for_a_path_that_is_not_there_names_the_near_one(case, folder):
    ask, typed, meant = ASKED[case]
    with pytest.raises(ValueError, match=f"did you mean {folder / meant}"):
        ask(folder / typed)


def test_weights_in_the_place_of_a_config_are_sent_to_their_own(folder):
    path = folder / "weights.pth"
    with pytest.raises(ValueError, match=f"is not a YAML file but a binary one; .* weights as checkpoint.load={path}"):
        load_config(str(path))

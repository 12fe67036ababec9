"""Class names and preprocessing beside a network: what other programs read them from."""

import json

import numpy as np
import pytest
from PIL import Image

from checkpoint_tools.formats.images import MEAN, STD, class_names, preprocessing, preprocessor
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.index import Index
from swin_moe.config import DataConfig
from swin_moe.data.transforms import IMAGENET_MEAN, IMAGENET_STD, EvalTransform
from tests.checkpoint_tools.formats.official_files import convert
from tests.checkpoint_tools.formats.test_geometry import written


class Named:
    path = "x"

    def __init__(self, names):
        self.state = {} if names is None else {"classes": names}


def test_names_are_those_of_the_checkpoint():
    assert class_names(Named(None), 3) is None
    assert class_names(Named(["cat", "dog"]), 3) == ["cat", "dog", "LABEL_2"]
    for wrong in (["a", "b", "c", "d"], "abc", [1, 2, 3], {"0": "a"}):
        with pytest.raises(CheckpointError, match="x: its state names other classes than the 3"):
            class_names(Named(wrong), 3)


def apply(content, image):
    """Returns what a processor of transformers makes of an image, by the fields of its file."""
    if "height" in content["size"]:
        image = image.resize((content["size"]["width"], content["size"]["height"]), content["resample"])
    else:
        short = content["size"]["shortest_edge"]
        width, height = (max(short, int(short * n / min(image.size))) for n in image.size)
        image = image.resize((width, height), content["resample"])
    if content.get("do_center_crop"):
        size = content["crop_size"]
        left, top = round((image.width - size["width"]) / 2), round((image.height - size["height"]) / 2)
        image = image.crop((left, top, left + size["width"], top + size["height"]))
    pixels = np.asarray(image, np.float64) * content["rescale_factor"]
    return (pixels - content["image_mean"]) / content["image_std"]


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
def test_the_preprocessor_makes_our_input(crop, interpolation, shape):
    assert (MEAN, STD) == (IMAGENET_MEAN, IMAGENET_STD)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    data = {"eval_crop": crop, "interpolation": interpolation}
    ours = EvalTransform(DataConfig(**data, name="synthetic"), (32, 32))(image).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(apply(preprocessor({"data": data}, (32, 32)), image), ours, rtol=1e-4, atol=1e-5)
    assert preprocessing({"data": data}, (32, 32))["resize"] == ([36, 36] if crop else [32, 32])


def test_transformers_files_say_the_names_and_they_come_back(tmp_path):
    path, _ = written(tmp_path, "swinv2", (32, 32), 4, state={"classes": ["cat", "dog"]})
    directory = convert(path, tmp_path / "hf", "hf")
    config = json.loads((directory / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "LABEL_2"}
    assert config["label2id"] == {"cat": 0, "dog": 1, "LABEL_2": 2}
    file = json.loads((directory / "preprocessor_config.json").read_text())
    assert file["crop_size"] == {"height": 32, "width": 32} and file["size"] == {"shortest_edge": 36}
    back = convert(directory, tmp_path / "back")
    assert Index.read(back).state == {"classes": ["cat", "dog", "LABEL_2"]}
    plain, _ = written(tmp_path / "plain", "swinv2", (32, 32), 4)
    directory = convert(plain, tmp_path / "hf2", "hf")
    assert json.loads((directory / "config.json").read_text())["id2label"]["1"] == "LABEL_1"
    assert Index.read(convert(directory, tmp_path / "back2")).state == {}


def test_sizes_that_a_file_does_not_tell_are_asked_for(tmp_path):
    import torch

    path, model = written(tmp_path, "swin", (32, 32), 4)
    torch.save({k: v for k, v in model.state_dict().items()}, tmp_path / "bare.pth")
    reason = "does not tell img_size, which config.json states; give --set img_size=N$"
    with pytest.raises(CheckpointError, match=reason):
        convert(tmp_path / "bare.pth", tmp_path / "out", "hf")

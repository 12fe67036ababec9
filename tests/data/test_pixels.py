"""Images of more than 8 bits keep their grey levels, and what has no known range is refused; no class for __MACOSX."""

import io
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from swin_moe.config import DataConfig
from swin_moe.data.datasets import build_dataset
from swin_moe.data.pixels import BrokenImage, decode


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled(kind):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    image = decode(encoded(levels, kind), "x")
    assert image.mode == "RGB"
    assert (np.asarray(image) == np.arange(256).reshape(16, 16, 1)).all()


@pytest.mark.parametrize("value, expected", [(128, 0), (129, 1), (385, 1), (386, 2), (65_535, 255), (65_406, 254)])
def test_values_between_are_rounded(value, expected):
    image = decode(encoded(np.full((4, 4), value, dtype=np.uint16), "PNG"), "x")
    assert image.getpixel((0, 0)) == (expected,) * 3


@pytest.mark.parametrize(
    "pixels, reason",
    [
        (np.full((4, 4), 0.5, dtype=np.float32), "floating-point"),
        (np.full((4, 4), 70_000, dtype=np.int32), "beyond 16 bits"),
        (np.full((4, 4), -1, dtype=np.int32), "beyond 16 bits"),
    ],
)
def test_an_unknown_range_is_refused(pixels, reason):
    with pytest.raises(BrokenImage, match=f"broken image x.tif: .*{reason}"):
        decode(encoded(pixels, "TIFF"), "x.tif")


def test_8_bits_stay():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (np.asarray(decode(encoded(pixels, "PNG"), "x")) == pixels).all()


def test_a_palette_with_transparent_colours_keeps_its_colours_without_a_warning():
    image = Image.frombytes("P", (16, 16), bytes(range(256)))
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    file = io.BytesIO()
    image.save(file, "png", transparency=bytes(range(255, -1, -1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.asarray(decode(file.getvalue(), "palette.png"))
    palette = np.frombuffer(bytes(image.getpalette() or ()), np.uint8).reshape(256, 3)
    assert (found.reshape(-1, 3) == palette).all()


def test_what_macos_adds_to_a_zip_is_no_class(tmp_path):
    picture = encoded(np.zeros((4, 4, 3), np.uint8), "PNG")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for name in ("cat/1.png", "dog/1.png", "__MACOSX/cat/._1.png", "__MACOSX/._x.png"):
            archive.writestr(name, picture if "MACOSX" not in name else b"fork")
    dataset = build_dataset(DataConfig(name="zip", path=str(tmp_path)), "train", img_size=(4, 4))
    assert dataset.classes == ("cat", "dog") and len(dataset) == 2


def oriented(path, orientation: int) -> np.ndarray:
    """Writes a picture with an EXIF orientation; returns its pixels as they are stored."""
    pixels = np.zeros((6, 10, 3), dtype=np.uint8)
    pixels[:3, :5], pixels[3:, 5:] = (255, 0, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels


# EXIF 2.3, tag 0x0112: which side of the stored picture is the top of the scene.
UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p.swapaxes(0, 1), 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_turned_as_their_exif_says_where_it_is_asked_for(orientation, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        stored = oriented(tmp_path / split / "a" / "x.png", orientation)
    for exif, expected in ((False, stored), (True, UPRIGHT[orientation](stored))):
        config = DataConfig(name="folder", path=str(tmp_path), exif=exif)
        for split in ("train", "val"):
            image, _ = build_dataset(config, split, img_size=(8, 8)).sample(0)
            assert (np.asarray(image) == expected).all()
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        archive.write(tmp_path / "val" / "a" / "x.png", "val/a/x.png")
    config = DataConfig(name="zip", path=str(tmp_path), exif=True)
    image, _ = build_dataset(config, "val", img_size=(8, 8)).sample(0)
    assert (np.asarray(image) == UPRIGHT[orientation](stored)).all()

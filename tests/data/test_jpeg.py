"""What is decoded of a file in part has the bits of the whole, and files that are broken for one are for the other."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from swin_moe.data import jpeg
from swin_moe.data.pixels import BrokenImage, Encoded, decode

BICUBIC = Image.Resampling.BICUBIC


def photograph(width: int, height: int, *, mode: str = "RGB", seed: int = 0, cell: int = 8) -> Image.Image:
    rows, columns = height // cell + 1, width // cell + 1
    small = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), BICUBIC).convert(mode)


def saved(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"optimize": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 3}], ids=str
)
@pytest.mark.parametrize("size", [(100, 80), (67, 133), (40, 20)])
def test_rows_decoded_alone_are_those_of_the_whole(size, options, subsampling):
    data = saved(photograph(*size), quality=90, subsampling=subsampling, **options)
    header = jpeg.read_header(data)
    assert header is not None and header[:2] == size and header.row_block == (16 if subsampling == 2 else 8)
    for scale in (1, 2, 4, 8):
        whole = Image.open(io.BytesIO(data))
        if scale > 1:
            whole.draft(None, (size[0] // scale, size[1] // scale))
        expected = np.asarray(whole)
        assert expected.shape[:2] == (-(-size[1] // scale), -(-size[0] // scale))
        for rows in {1, 7, 8, 9, 13, 14, 15, 16, 17, *range(20, size[1], 11), size[1]}:
            kept = -(-rows // scale)
            made = np.asarray(jpeg.decode_top(data, header, rows, scale))
            np.testing.assert_array_equal(made[:kept], expected[:kept])


def test_what_lies_below_is_not_decoded():
    data = saved(photograph(64, 640))
    header = jpeg.read_header(data)
    assert header is not None
    assert jpeg.decode_top(data, header, 100).size == (64, 112) and jpeg.decode_top(data, header, 630).size == (64, 640)


FILES = {
    "sequential": (saved(photograph(90, 70)), True),
    "grey": (saved(photograph(90, 70, mode="L")), True),
    "cmyk": (saved(photograph(90, 70, mode="CMYK")), True),
    "bytes_behind_the_end": (saved(photograph(90, 70)) + bytes(100), True),
    "several_frames": (
        saved(photograph(90, 70), "MPO", save_all=True, append_images=[photograph(90, 70, seed=1)]),
        True,
    ),
    "progressive": (saved(photograph(90, 70), progressive=True), False),
    "png": (saved(photograph(90, 70), "PNG"), False),
}


@pytest.mark.parametrize("name", FILES)
def test_cut_is_that_of_the_whole(name):
    data, in_part = FILES[name]
    assert (jpeg.read_header(data) is not None) == in_part
    whole = decode(data, "x")
    for box in ((0, 0, 90, 70), (3, 5, 50, 21), (89, 0, 90, 1), (10, 60, 80, 70)):
        image = Encoded(data, "x")
        assert image.size == (90, 70)
        made = image.cut_resized(box, (24, 20), BICUBIC)
        assert made.mode == "RGB" and made.tobytes() == whole.crop(box).resize((24, 20), BICUBIC).tobytes()
    assert Encoded(data, "x").whole().tobytes() == whole.tobytes()


def test_turned_images_are_decoded_whole():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = saved(photograph(90, 70), exif=exif)
    assert Encoded(data, "x").size == (90, 70) and Encoded(data, "x", exif=True).size == (70, 90)
    made = Encoded(data, "x", exif=True).cut_resized((5, 6, 60, 30), (10, 10), BICUBIC)
    assert made.tobytes() == decode(data, "x", exif=True).crop((5, 6, 60, 30)).resize((10, 10), BICUBIC).tobytes()


def outcome(data: bytes, make) -> bytes | str:
    try:
        return make(data).tobytes()
    except BrokenImage as error:
        return error.reason


def damaged() -> list[bytes]:
    """Returns files cut short, and with a byte or two changed: markers, where those are 255 and something."""
    data = saved(photograph(90, 70), quality=95)
    rng = np.random.default_rng(0)
    files = [data[:-2], *(data[:size] for size in (*range(0, 30), *rng.integers(30, len(data), 60).tolist()))]
    for at, first, second in itertools.product(rng.integers(2, len(data) - 2, 12), (255, 7), (0xC0, 0xD0, 0xD9, 0xDA)):
        files.append(data[:at] + bytes((first, second)) + data[at + 2 :])
    return files


def test_a_broken_file_is_broken_whatever_is_cut_out_of_it():
    box = (10, 4, 70, 30)
    seen = set()
    for data in damaged():
        whole = outcome(data, lambda d: decode(d, "x").crop(box).resize((16, 16), BICUBIC))
        part = outcome(data, lambda d: Encoded(d, "x").cut_resized(box, (16, 16), BICUBIC))
        assert part == whole
        seen.add(type(whole))
    assert seen == {bytes, str}


@pytest.mark.parametrize(
    "crop, least, expected",
    [
        ((447, 500), (224, 224), 1),
        ((448, 448), (224, 224), 2),
        ((448, 900), (224, 224), 2),
        ((1792, 1792), (224, 224), 8),
    ],
)
def test_scale(crop, least, expected):
    assert jpeg.largest_scale(crop, least) == expected


def test_draft_is_near_the_whole_and_decoded_at_a_part_of_its_size(monkeypatch):
    data = saved(photograph(803, 605, cell=32), quality=95)
    scales = []
    decode_top = jpeg.decode_top
    monkeypatch.setattr(jpeg, "decode_top", lambda *a: scales.append(a[3]) or decode_top(*a))

    def made(size: tuple[int, int], *, moved: int = 0, draft: bool = False) -> np.ndarray:
        box = (31 + moved, 17 + moved, 701 + moved, 561 + moved)
        return np.asarray(Encoded(data, "x").cut_resized(box, size, BICUBIC, draft=draft)).astype(int)

    for size, scale in (((300, 250), 2), ((160, 130), 4), ((60, 60), 8)):
        exact, draft, moved = made(size), made(size, draft=True), made(size, moved=1)
        assert scales[-3:] == [1, scale, 1]
        assert abs(exact - draft).mean() < min(1.0, abs(exact - moved).mean())  # of 255 levels
    np.testing.assert_array_equal(made((600, 500)), made((600, 500), draft=True))  # the crop at a half has less

"""Sealed JSON: one encoding, and any change of a byte is found."""

import pytest
import xxhash

from swin_moe.checkpoint.errors import CorruptionError
from swin_moe.checkpoint.sealed_json import check_json, read_sealed, seal, unseal, write_durably


def test_encoding_is_canonical_and_hand_checkable():
    data = seal({"b": [1, 2.5, None], "a": {"z": True, "y": "\u00e9"}})
    body = b'{"a":{"y":"\\u00e9","z":true},"b":[1,2.5,null]'
    assert data == body + b',"xxh3_128":"' + xxhash.xxh3_128_hexdigest(body).encode() + b'"}\n'


def test_every_single_bit_flip_is_found(tmp_path):
    data = seal({"step": 3, "state": {"seed": 1}})
    assert unseal(data, tmp_path) == {"step": 3, "state": {"seed": 1}}
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError, match="digest does not match"):
            unseal(bytes(flipped), tmp_path)


@pytest.mark.parametrize("length", [0, 1, 47, 48, 60])
def test_cut_off_files_are_found(tmp_path, length):
    with pytest.raises(CorruptionError):
        unseal(seal({"step": 3, "state": {"seed": 1}})[:length], tmp_path)


@pytest.mark.parametrize(
    "body", [b'{"a":1,"a":2', b'{"a":NaN', b'{"a":' + b"[" * 100_000, b'{"a":1}{"b":2', b'["a"', b'{"a":' + b"9" * 5000]
)
def test_hostile_json_with_a_right_seal_is_refused(tmp_path, body):
    data = body + f',"xxh3_128":"{xxhash.xxh3_128_hexdigest(body)}"}}\n'.encode()
    with pytest.raises(CorruptionError, match=str(tmp_path)):
        unseal(data, tmp_path)


@pytest.mark.parametrize(
    ("value", "place"),
    [({"a": {"b": float("nan")}}, r"state\.a\.b"), ({1: 2}, "state"), ({"a": [1, {2}]}, r"state\.a\[1\]")],
)
def test_values_that_json_cannot_hold_are_named(value, place):
    with pytest.raises(ValueError, match=place):
        check_json(value, "state")


def test_durable_write_replaces_and_reads_back(tmp_path):
    path = tmp_path / "best.json"
    for step in (1, 2):
        write_durably(path, seal({"step": step}))
        assert read_sealed(path) == {"step": step}
    assert [p.name for p in tmp_path.iterdir()] == ["best.json"]
    with pytest.raises(CorruptionError, match="is missing"):
        read_sealed(tmp_path / "none.json")

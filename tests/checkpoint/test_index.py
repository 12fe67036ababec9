"""The index: round trip, and a table of hostile or damaged ones, each refused with file and tensor named."""

import copy
import json

import pytest

from swin_moe.checkpoint import index
from swin_moe.checkpoint.errors import CorruptionError
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.save import write_checkpoint
from swin_moe.checkpoint.sealed_json import seal
from tests.checkpoint.samples import CONFIG, FILE_SIZE, STATE, sample_state, whole_pieces

EXPERT = "layers.0.mlp.experts.fc1_weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("index")
    pieces = whole_pieces(sample_state())
    return write_checkpoint(root, 3, pieces, state=STATE, config=CONFIG, file_size=FILE_SIZE)


def content_of(path):
    content = json.loads((path / "index.json").read_bytes())
    del content["xxh3_128"]
    return content


def test_reading_and_encoding_give_the_same_bytes(saved):
    index = Index.read(saved)
    assert index.encode() == (saved / "index.json").read_bytes()
    assert (index.step, index.state, index.config) == (3, STATE, CONFIG)
    assert len(index.tensors[EXPERT].chunks) == 4
    assert len(index.tensors["head.bias"].chunks) == 1


def test_unknown_fields_are_ignored(saved, tmp_path):
    content = content_of(saved)
    content["hint"] = 1
    content["tensors"][EXPERT]["hint"] = 2
    (tmp_path / "index.json").write_bytes(seal(content))
    assert Index.read(tmp_path) == Index.read(saved)


def test_the_quick_way_to_read_a_chunk_gives_what_the_slow_one_does(saved):
    """Every value of a chunk is replaced by others: where the quick way answers, the slow one says the same."""
    content = content_of(saved)
    files = {name: index._parse_file(name, file, "xxh3-128") for name, file in content["files"].items()}
    odd = [None, -1, 0, 1, 2, 2**62, 1.0, True, "x", [], [0], [0, 0], [1, 0, 0], [0, 0, 0], [True, 0, 0], {}]
    odd.append(["a" * 32])
    quick = answered = 0
    for name, tensor in content["tensors"].items():
        shape, dtype = tuple(tensor["shape"]), tensor["dtype"]
        for chunk in tensor["chunks"]:
            variants = [chunk] + [{**chunk, key: value} for key in chunk for value in odd]
            variants += [{k: v for k, v in chunk.items() if k != key} for key in chunk] + odd
            for variant in variants:
                found = index._usual_chunk(variant, shape, dtype, files, "xxh3-128")
                try:
                    slow = index._parse_chunk(name, variant, shape, dtype, files, "xxh3-128")
                except index._Invalid:
                    slow = None
                assert found is None or found == slow
                quick += found is not None
                answered += slow is not None
    assert quick >= 24 and answered >= quick


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(content):
        for key in path:
            content = content[key]
        content[last] = value

    return change


def drop(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


FIRST = ("tensors", EXPERT, "chunks", 0)
SHARD = "shard-00000.safetensors"
HOSTILE = {
    "no version": (drop("version"), "version"),
    "a later version": (put("version", 2), "format version 2 is not supported"),
    "a version that is true": (put("version", True), "version must be int"),
    "negative step": (put("step", -1), "step"),
    "unknown digest": (put("digest", "crc32"), "crc32"),
    "file outside": (put("files", "../evil", {"bytes": 8, "header": {"bytes": 8, "digest": "0" * 32}}), "plain name"),
    "absolute file": (
        put("files", "/etc/passwd", {"bytes": 8, "header": {"bytes": 8, "digest": "0" * 32}}),
        "plain name",
    ),
    "hidden file": (put("files", "..", {"bytes": 8, "header": {"bytes": 8, "digest": "0" * 32}}), "plain name"),
    "the index as file": (
        put("files", "index.json", {"bytes": 8, "header": {"bytes": 8, "digest": "0" * 32}}),
        "itself",
    ),
    "header over file": (put("files", SHARD, "header", "bytes", 10**9), "impossible"),
    "huge file": (put("files", SHARD, "bytes", 10**40), "impossible"),
    "bytes of nobody": (put("files", SHARD, "bytes", 10**6), "belong to no chunk"),
    "unlisted file": (put(*FIRST, "file", "other.safetensors"), f"tensor {EXPERT}.*does not list"),
    "outside the shape": (put(*FIRST, "offset", [4, 0, 0]), f"tensor {EXPERT}.*outside the shape"),
    "overlap": (put("tensors", EXPERT, "chunks", 1, "offset", [0, 0, 0]), f"tensor {EXPERT}.*overlap"),
    "gap": (drop("tensors", EXPERT, "chunks", 1), f"tensor {EXPERT}.*no chunk holds"),
    "no chunks": (put("tensors", EXPERT, "chunks", []), f"tensor {EXPERT}.*no chunk holds"),
    "negative offset": (put(*FIRST, "offset", [-1, 0, 0]), f"tensor {EXPERT}.*whole numbers"),
    "float offset": (put(*FIRST, "offset", [0.0, 0, 0]), f"tensor {EXPERT}.*whole numbers"),
    "too few dims": (put(*FIRST, "offset", [0, 0]), f"tensor {EXPERT}.*3 numbers"),
    "shape overflow": (put("tensors", EXPERT, "shape", [2**40, 2**40, 2**40]), f"tensor {EXPERT}.*absurd"),
    "zero and overflow": (put("tensors", EXPERT, "shape", [0, 2**40, 2**40]), f"tensor {EXPERT}.*absurd"),
    "shape too large to store": (put("tensors", EXPERT, "shape", [2**30, 8, 16]), f"tensor {EXPERT}.*no chunk holds"),
    "many dims": (put("tensors", "empty", "shape", [0] * 99), "99 dims"),
    "unknown dtype": (put("tensors", EXPERT, "dtype", "object"), f"tensor {EXPERT}.*dtype"),
    "wider dtype": (put("tensors", EXPERT, "dtype", "F64"), f"tensor {EXPERT}.*bytes"),
    "reversed bytes": (put(*FIRST, "bytes", [900, 100]), f"tensor {EXPERT}.*bytes"),
    "bytes in the header": (put(*FIRST, "bytes", [0, 512]), f"tensor {EXPERT}.*bytes"),
    "missing digest": (put(*FIRST, "digest", []), f"tensor {EXPERT}.*0 digests, needs 1"),
    "digest no hex": (put(*FIRST, "digest", ["x" * 32]), f"tensor {EXPERT}.*hex digits"),
    "chunk no object": (put("tensors", EXPERT, "chunks", 0, 7), f"tensor {EXPERT}.*object"),
    "tensors no object": (put("tensors", []), "tensors must be dict"),
    "control in name": (put("tensors", "a\nb", {"shape": [0], "dtype": "F32", "chunks": []}), "printable"),
    "no state": (drop("state"), "state"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_index_is_refused_in_one_sentence(saved, tmp_path, case):
    change, message = HOSTILE[case]
    content = copy.deepcopy(content_of(saved))
    change(content)
    (tmp_path / "index.json").write_bytes(seal(content))
    with pytest.raises(CorruptionError, match=message) as caught:
        Index.read(tmp_path)
    assert str(tmp_path / "index.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shared_bytes_are_refused(saved, tmp_path):
    content = content_of(saved)
    chunks = content["tensors"][EXPERT]["chunks"]
    chunks[1].update({key: chunks[0][key] for key in ("file", "bytes")})
    (tmp_path / "index.json").write_bytes(seal(content))
    with pytest.raises(CorruptionError, match=f"tensor {EXPERT}, expert [01]: shares bytes|leaves a gap"):
        Index.read(tmp_path)

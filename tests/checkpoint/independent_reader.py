"""Reads a checkpoint with numpy, json and xxhash alone, as docs/checkpoint_format.md tells a stranger to."""

import json
import os
import sys

import numpy as np
import xxhash

BLOCK = 4 << 20
FLOATS = dict(F64="<f8", F32="<f4", F16="<f2", BF16="<u2", F8_E4M3="u1", F8_E5M2="u1")
WHOLE = dict(I64="<i8", I32="<i4", I16="<i2", I8="i1", U64="<u8", U32="<u4", U16="<u2", U8="u1", BOOL="?")
DTYPES = FLOATS | WHOLE


def read_index(directory):
    with open(os.path.join(directory, "index.json"), "rb") as file:
        data = file.read()
    body = data[:-48]
    if data[-48:] != b',"xxh3_128":"' + xxhash.xxh3_128_hexdigest(body).encode() + b'"}\n':
        raise ValueError("index.json is damaged")
    index = json.loads(data)
    if index["version"] != 1 or index["digest"] != "xxh3-128":
        raise ValueError("written by another version")
    return index


def read_chunk(directory, chunk, dtype):
    begin, end = chunk["bytes"]
    with open(os.path.join(directory, chunk["file"]), "rb") as file:
        file.seek(begin)
        data = file.read(end - begin)
    blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
    if len(data) != end - begin or [xxhash.xxh3_128_hexdigest(b) for b in blocks] != chunk["digest"]:
        raise ValueError(f"{chunk['file']}: chunk at {chunk['offset']} is damaged")
    return np.frombuffer(data, DTYPES[dtype]).reshape(chunk["size"])


def read_tensor(directory, tensor):
    result = np.empty(tensor["shape"], DTYPES[tensor["dtype"]])
    for chunk in tensor["chunks"]:
        box = tuple(slice(o, o + n) for o, n in zip(chunk["offset"], chunk["size"]))
        result[box] = read_chunk(directory, chunk, tensor["dtype"])
    return result


def read_checkpoint(directory):
    """Returns ({name: array}, state, config); bf16 and fp8 come as raw integers, as numpy has no such types."""
    index = read_index(directory)
    tensors = {name: read_tensor(directory, tensor) for name, tensor in index["tensors"].items()}
    return tensors, index["state"], index["config"]


if __name__ == "__main__":
    for name, array in read_checkpoint(sys.argv[1])[0].items():
        print(name, array.shape, array.dtype)

"""torch.distributed.checkpoint: a directory with `.metadata`, a pickle, and files of chunks that are torch.save zips.

Names: `model.<name>` and `optim.state.<name>.<kind>`, as torch's get_state_dict and dcp.save flatten them; a bare name
is a parameter. Parameter names may be ours or official. Values that are no tensors (options of parameter groups,
numbers) are passed over and told (pytorch, torch/distributed/checkpoint/{metadata,filesystem}.py).
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoint_tools.files.pickle_reader import BUILDERS, MAX_PICKLE_BYTES, Instance, read_pickle
from checkpoint_tools.files.publish import publish_files
from checkpoint_tools.files.record_file import OpenFiles
from checkpoint_tools.files.torch_file import TorchFile, Window
from checkpoint_tools.files.torch_tensors import DTYPES
from checkpoint_tools.files.torch_writer import NewGlobal, NewObject, NewTensor, pickled, write_torch_stream
from checkpoint_tools.formats.infer import given_sizes, infer_model, known_step
from checkpoint_tools.formats.plain_read import sizes_of
from checkpoint_tools.formats.rules import FROM_OFFICIAL, check_ours, to_ours
from checkpoint_tools.sources.assembled import AssembledSource, Leaf, Part
from checkpoint_tools.sources.base import Options, Source, split_kind
from swin_moe.checkpoint.errors import CheckpointError, CorruptionError
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW
from swin_moe.checkpoint.plan import canonical_chunks
from swin_moe.layout import Chunk

METADATA = ".metadata"
_MODULE, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_CLASSES = (
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_INERT = {f"{_MODULE}.{name}" for name in _CLASSES} | {
    f"{_FILES}._StorageInfo",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib.PurePosixPath",
    "torch.serialization._get_layout",
}
_TORCH_NAMES = {short: name for name, short in reversed(DTYPES.items())}


class Chunks(NamedTuple):
    """A tensor of the checkpoint: its shape, and the place of each chunk."""

    shape: tuple[int, ...]
    dtype: str
    places: dict[tuple[int, ...], tuple[str, int, int]]  # offset -> file, first byte, bytes
    sizes: dict[tuple[int, ...], tuple[int, ...]]


def detect(path: Path) -> bool:
    """See formats/__init__.py."""
    return (path / METADATA).is_file()


def open_dcp(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the directory `path`; see formats/__init__.py."""
    tensors, others = read_metadata(path)
    files, parts, steps = OpenFiles(), {}, []
    for foreign, tensor in tensors.items():
        name = _our_name(foreign, path)
        if foreign.endswith(".step") and name is None:
            steps.append(_read_number(path, foreign, tensor, files))
        if name is None:
            continue
        if name in parts:
            raise CheckpointError(f"{path}: two tensors stand for {name}")
        parts[name] = [_part(path, foreign, tensor, offset, files) for offset in tensor.places]
        if sizes_of({name: parts[name]})[name] != tensor.shape:
            raise CorruptionError(f"{path}: tensor {foreign}: its chunks do not make its shape {tensor.shape}")
    if others:
        options.report(f"{path}: {len(others)} values are no tensors and are left out: {', '.join(others[:3])}, ...")
    shapes = sizes_of(parts)
    inferred = infer_model(path, shapes)
    config = {"model": inferred | given_sizes(options.extra)} if inferred else {}
    moments = any(name.startswith("optim.") for name in parts)
    step, unknown = known_step(path, max(steps) if steps else None if moments else 0, options)
    source = AssembledSource(
        "dcp", path, parts, options, step=step, config=config, provenance={"source": {"format": "dcp"}}
    )
    source.step_unknown = unknown
    return source


def read_metadata(path: Path) -> tuple[dict[str, Chunks], list[str]]:
    """Returns (the tensors by name, the names of other values).

    Raises:
        CheckpointError: The pickle asks for what is not torch's metadata, or a path leaves the directory.
        CorruptionError: It contradicts itself; names the tensor.
    """
    where = path / METADATA
    if where.stat().st_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{where}: is larger than the {MAX_PICKLE_BYTES} bytes allowed")
    builders = {
        **BUILDERS,
        "torch.Size": lambda sizes=(): tuple(sizes),
        **{f"torch.{name}": _named for name in DTYPES},
    }
    content = read_pickle(where.read_bytes(), where, builders=builders, inert=_INERT)
    try:
        return _tensors(path, content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CorruptionError(f"{where}: is no metadata of torch.distributed.checkpoint") from None


def _named(*_: Any) -> Any:
    raise ValueError("a call of a dtype")


def _tensors(path: Path, content: Instance) -> tuple[dict[str, Chunks], list[str]]:
    stored: dict[str, dict[Any, tuple[str, int, int]]] = {}
    for index, info in content.state["storage_data"].items():
        if info.state.get("transform_descriptors"):
            raise CheckpointError(f"{path}: its chunks are compressed or transformed, which is not supported")
        file, begin, length = (info.state[key] for key in ("relative_path", "offset", "length"))
        if not isinstance(file, str) or Path(file).name != file or type(begin) is not int or type(length) is not int:
            raise CheckpointError(f"{path}: a chunk lies in {str(file)[:100]!r}, outside the directory; it is refused")
        if not 0 <= begin <= begin + length <= 1 << 62:
            raise CorruptionError(f"{path}: a chunk of {file} has an impossible place")
        offset = index.state.get("offset")  # a value that is no tensor has none
        key = None if offset is None else tuple(offset)
        stored.setdefault(index.state["fqn"], {})[key] = (file, begin, length)
    tensors, others = {}, []
    for name, kind in content.state["state_dict_metadata"].items():
        if kind.kind != f"{_MODULE}.TensorStorageMetadata":
            others.append(name)
            continue
        dtype = DTYPES[kind.state["properties"].state[0].name]
        sizes = {tuple(c.state["offsets"]): tuple(c.state["sizes"]) for c in kind.state["chunks"]}
        size = tuple(kind.state["size"])
        numbers = [size, *sizes, *sizes.values()]
        if any(len(n) != len(size) or not all(type(v) is int and 0 <= v <= 1 << 62 for v in n) for n in numbers):
            raise CorruptionError(f"{path}: tensor {name}: a chunk has an impossible shape or offset")
        if stored.get(name, {}).keys() != sizes.keys():
            raise CorruptionError(f"{path}: tensor {name}: a chunk has no place, or is listed twice")
        tensors[name] = Chunks(size, dtype, stored[name], sizes)
    return tensors, others


def _our_name(foreign: str, path: Path) -> str | None:
    """Returns our name of a flattened one; None for steps and for buffers."""
    moment = re.fullmatch(r"(?:optim|optimizer)\.(?:state\.)?(.+)\.(\w+)", foreign)
    if moment and moment[2] == "step":
        return None
    inner = moment[1] if moment else re.sub(r"^(model|module|state_dict)\.", "", foreign)
    place = to_ours(inner, FROM_OFFICIAL)
    if place is None:
        return None
    name = check_ours(place.name, foreign, path)
    return f"optim.{moment[2]}/{name}" if moment else name


def _part(path: Path, name: str, tensor: Chunks, offset: tuple[int, ...], files: OpenFiles) -> Part:
    file, begin, length = tensor.places[offset]
    if not (path / file).is_file():
        raise CorruptionError(f"{path / file}: is missing; it holds tensor {name}")
    opened = TorchFile(path / file, files, window=(begin, length))
    record, size = opened.content, tensor.sizes[offset]
    if getattr(record, "shape", None) != size or record.dtype != tensor.dtype:
        raise CorruptionError(f"{path / file}: tensor {name}: the chunk at {list(offset)} is not what .metadata says")
    return Part(Chunk(offset, size), (Leaf(opened, record),))


def _read_number(path: Path, name: str, tensor: Chunks, files: OpenFiles) -> int:
    if tensor.shape not in ((), (1,)) or tensor.dtype not in ("F32", "I64"):
        raise CheckpointError(f"{path}: tensor {name} is no number of steps")
    (leaf,) = _part(path, name, tensor, next(iter(tensor.places)), files).copies
    data = np.empty(tensor.shape, RAW[DTYPE_BYTES[tensor.dtype]])
    leaf.file.read(leaf.record, Chunk.whole(tensor.shape), data)
    return int(data.view({"F32": "<f4", "I64": "<i8"}[tensor.dtype]).reshape(-1)[0])


def write_dcp(source: Source, path: Path, options: Options) -> None:
    """Writes a directory that dcp.load reads in any layout; rank 0 writes. See formats/__init__.py.

    One chunk per expert, as in the native format; state, config and averages other than parameters and optimizer state
    are not part of it.
    """
    named = {}
    for name, tensor in source.tensors.items():
        kind, parameter = split_kind(name)
        if kind == "weight":
            named[f"model.{name}"] = (name, tensor)
        elif name.startswith("optim."):
            named[f"optim.state.{parameter}.{kind}"] = (name, tensor)
    left = sorted({split_kind(n)[0] for n in source.tensors} - {split_kind(n)[0] for n, _ in named.values()})
    if left:
        options.report(f"{source.path}: dcp files are written without {', '.join(left)}")
    total = sum(tensor.num_bytes + 8192 for _, tensor in named.values())

    def write(staging: Path) -> None:
        if options.comm.rank == 0:
            directory = staging / path.name
            directory.mkdir()
            _write_directory(source, named, directory, options)

    publish_files(path, total, write, comm=options.comm)


def _write_directory(source: Source, named: dict[str, Any], directory: Path, options: Options) -> None:
    """Writes the chunks, a new file where one would exceed Options.file_size, and the metadata last."""
    entries, places = {}, {}
    number, stream, begin = 0, open(directory / "__0_0.distcp", "wb"), 0
    steps = (
        {}
        if source.step_unknown
        else {
            f"optim.state.{n.removeprefix('model.')}.step": n
            for n in named
            if any(f"optim.state.{n.removeprefix('model.')}.{kind}" in named for kind in ("exp_avg", "momentum_buffer"))
        }
    )
    try:
        for foreign, (name, tensor) in sorted([*named.items(), *((s, (None, None)) for s in steps)]):
            shape, dtype = tensor or ((), "F32")
            chunks = canonical_chunks(name or foreign, shape)
            entries[foreign] = (shape, dtype, chunks)
            for chunk in chunks:
                if begin and begin + chunk.numel * DTYPE_BYTES[dtype] > options.file_size:
                    stream.close()
                    number, begin = number + 1, 0
                    stream = open(directory / f"__0_{number}.distcp", "wb")
                window = Window(stream, begin)
                content = _chunk(source, name, chunk, dtype)
                write_torch_stream(window, "archive", content, box_bytes=options.box_bytes, progress=options.progress)
                length = window.seek(0, 2)
                places[foreign, chunk.offset] = (f"__0_{number}.distcp", begin, length)
                begin += length
    finally:
        stream.close()
    (directory / METADATA).write_bytes(pickled(_metadata(entries, places)))


def _chunk(source: Source, name: str | None, chunk: Chunk, dtype: str) -> NewTensor:
    def fill(box: Chunk, destination: np.ndarray) -> None:
        if name is None:
            destination[...] = np.float32(source.step).view(np.int32)
            return
        offset = tuple(a + b for a, b in zip(box.offset, chunk.offset))
        source.read(name, Chunk(offset, box.size), destination)

    return NewTensor(chunk.size, dtype, fill)


def _metadata(entries: dict[str, Any], places: dict[tuple, tuple[str, int, int]]) -> NewObject:
    def made(name: str, state: Any, module: str = _MODULE) -> NewObject:
        return NewObject(NewGlobal(module, name), (), state)

    def size(values: tuple[int, ...]) -> NewObject:
        return NewObject(NewGlobal("torch", "Size"), (values,), call=True)

    layout = NewObject(NewGlobal("torch.serialization", "_get_layout"), ("torch.strided",), call=True)
    encoding = NewObject(NewGlobal(_MODULE, "_MEM_FORMAT_ENCODING"), (0,), call=True)
    tensors, stored = {}, {}
    for name, (shape, dtype, chunks) in entries.items():
        properties = (NewGlobal("torch", _TORCH_NAMES[dtype]), layout, False, encoding, False)
        tensors[name] = made(
            "TensorStorageMetadata",
            {
                "properties": made("TensorProperties", properties),
                "size": size(shape),
                "chunks": [
                    made("ChunkStorageMetadata", {"offsets": size(c.offset), "sizes": size(c.size)}) for c in chunks
                ],
            },
        )
        for number, chunk in enumerate(chunks):
            file, begin, length = places[name, chunk.offset]
            index = made("MetadataIndex", {"fqn": name, "offset": size(chunk.offset), "index": number})
            info = {"relative_path": file, "offset": begin, "length": length, "transform_descriptors": None}
            stored[index] = made("_StorageInfo", info, _FILES)
    return made(
        "Metadata",
        {
            "state_dict_metadata": tensors,
            "planner_data": {name: tuple(name.split(".", 1)) for name in entries},
            "storage_data": stored,
            "storage_meta": None,
            "version": "1.0.0",
        },
    )

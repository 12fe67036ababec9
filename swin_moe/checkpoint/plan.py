"""Where everything goes: chunks and files of a new checkpoint, who writes what, and what a reader copies. Pure.

All of it is a function of names, shapes and dtypes: every layout, engine and number of ranks plans the same bytes.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from swin_moe.checkpoint.boxes import BoxFinder, find_gap, find_overlap, subtract_all
from swin_moe.checkpoint.digest import DEFAULT, digest
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.index import Index, StoredChunk, StoredFile, StoredTensor
from swin_moe.checkpoint.pieces import DTYPE_BYTES, FLOATS, Piece, is_expert_tensor
from swin_moe.layout import Chunk

ALIGNMENT = 64  # bytes; where the data of a file begins
METADATA = {"format": "swin_moe", "version": "1"}


class Spec(NamedTuple):
    """What the ranks tell each other about a piece."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunk: Chunk


class Share(NamedTuple):
    """A box that one rank writes, out of the piece it holds."""

    name: str
    piece: Chunk
    box: Chunk


@dataclass(frozen=True)
class FilePlan:
    """A checkpoint without its data: tensors with their places, files, and the header bytes of each file."""

    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]
    headers: dict[str, bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


class Copy(NamedTuple):
    """A box to read: `box` of tensor `name`, from one stored chunk."""

    name: str
    source: StoredChunk
    box: Chunk


def canonical_chunks(name: str, shape: tuple[int, ...]) -> list[Chunk]:
    """Returns the chunks a tensor is stored in, in any layout: one per expert for tensors of experts, else one."""
    if not shape or 0 in shape or not is_expert_tensor(name):
        return [Chunk.whole(shape)]
    return [Chunk((e, *(0,) * (len(shape) - 1)), (1, *shape[1:])) for e in range(shape[0])]


def chunk_key(name: str, chunk: Chunk) -> str:
    """Returns a chunk's name inside its safetensors file: "<tensor>@<offset,...>"."""
    return f"{name}@{','.join(map(str, chunk.offset))}"


def plan_files(specs: dict[str, tuple[tuple[int, ...], str]], file_size: int, algorithm: str = DEFAULT) -> FilePlan:
    """Returns the files of a checkpoint that holds these tensors (name -> shape, dtype); no data is needed.

    Tensors are sorted by name, chunks by offset; files are filled in that order until the next chunk would bring a
    file's data over `file_size` bytes. Inside a file wider dtypes come first: chunks are aligned to their elements.
    """
    groups: list[list[tuple[str, Chunk]]] = []
    filled = 0
    for name in sorted(specs):
        shape, dtype = specs[name]
        for chunk in canonical_chunks(name, shape):
            num_bytes = chunk.numel * DTYPE_BYTES[dtype]
            if not groups or filled + num_bytes > file_size:
                groups.append([])
                filled = 0
            groups[-1].append((name, chunk))
            filled += num_bytes
    chunks: dict[str, list[StoredChunk]] = {name: [] for name in sorted(specs)}
    files, headers = {}, {}
    for number, group in enumerate(groups):
        file = f"shard-{number:05d}.safetensors"
        header, places = _plan_file(group, specs)
        end = len(header)
        for (name, chunk), (begin, stop) in places:
            chunks[name].append(StoredChunk(chunk, file, len(header) + begin, len(header) + stop))
            end = max(end, len(header) + stop)
        files[file] = StoredFile(end, len(header), digest(header, algorithm))
        headers[file] = header
    tensors = {n: StoredTensor(*specs[n], tuple(sorted(c, key=lambda s: s.chunk))) for n, c in chunks.items()}
    return FilePlan(tensors, files, headers)


def _plan_file(
    group: list[tuple[str, Chunk]], specs: dict[str, tuple[tuple[int, ...], str]]
) -> tuple[bytes, list[tuple[tuple[str, Chunk], tuple[int, int]]]]:
    """Returns the header of one file and where each chunk's bytes lie behind it."""
    offset, entries, places = 0, {}, []
    # A stable sort: chunks of one element size stay in the order of name and offset.
    for name, chunk in sorted(group, key=lambda item: -DTYPE_BYTES[specs[item[0]][1]]):
        dtype = specs[name][1]
        end = offset + chunk.numel * DTYPE_BYTES[dtype]
        entries[chunk_key(name, chunk)] = {"dtype": dtype, "shape": list(chunk.size), "data_offsets": [offset, end]}
        places.append(((name, chunk), (offset, end)))
        offset = end
    return encode_header(entries), places


def encode_header(entries: dict[str, dict], metadata: dict[str, str] = METADATA) -> bytes:
    """Returns the safetensors header: 8 bytes of length, JSON with sorted keys, spaces up to a multiple of 64 bytes."""
    content = {**entries, "__metadata__": metadata}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def expected_headers(index: Index) -> dict[str, bytes]:
    """Returns the header that each file of this index must have."""
    entries: dict[str, dict[str, dict]] = {file: {} for file in index.files}
    for name, tensor in index.tensors.items():
        for stored in tensor.chunks:
            start = index.files[stored.file].header
            entries[stored.file][chunk_key(name, stored.chunk)] = {
                "dtype": tensor.dtype,
                "shape": list(stored.chunk.size),
                "data_offsets": [stored.begin - start, stored.end - start],
            }
    return {file: encode_header(chunks) for file, chunks in entries.items()}


def merge_specs(ranks: Sequence[list[Spec]]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns shape and dtype of every tensor that some rank holds a piece of.

    Raises:
        CheckpointError: Ranks disagree about a tensor; names it, the ranks and the values.
    """
    result: dict[str, tuple[tuple[int, ...], str]] = {}
    origin: dict[str, int] = {}
    for rank, specs in enumerate(ranks):
        for spec in specs:
            known = result.setdefault(spec.name, (spec.shape, spec.dtype))
            first = origin.setdefault(spec.name, rank)
            if known != (spec.shape, spec.dtype):
                raise CheckpointError(
                    f"tensor {spec.name}: rank {first} says shape {known[0]} {known[1]}, "
                    f"rank {rank} says {spec.shape} {spec.dtype}"
                )
    return result


def assign_shares(specs: dict[str, tuple[tuple[int, ...], str]], ranks: Sequence[list[Spec]]) -> list[list[Share]]:
    """Returns what each rank writes: every element exactly once, by the lowest rank that holds it.

    Raises:
        CheckpointError: No rank holds some part of a tensor; names the tensor and the box.
    """
    holders: dict[str, dict[Chunk, int]] = {name: {} for name in specs}
    for rank, held in enumerate(ranks):
        for spec in held:
            holders[spec.name].setdefault(spec.chunk, rank)
    shares: list[list[Share]] = [[] for _ in ranks]
    for name, boxes in holders.items():
        written = {box: [box] for box in boxes if box.numel}
        if find_overlap(written) is not None:
            order = {box: number for number, box in enumerate(written)}  # of their ranks
            ordered = sorted(written)
            finder = BoxFinder(ordered)
            for box in written:
                earlier = (ordered[i] for i, _ in finder.overlapping(box) if order[ordered[i]] < order[box])
                written[box] = subtract_all(box, earlier)
        gap = find_gap(specs[name][0], [box for parts in written.values() for box in parts])
        if gap is not None:
            raise CheckpointError(f"tensor {name}: no rank holds the box at {gap.offset} of {gap.size}")
        for piece, parts in written.items():
            shares[boxes[piece]].extend(Share(name, piece, part) for part in parts)
    return shares


def split_evenly(plan: FilePlan, parts: int) -> list[list[tuple[str, int]]]:
    """Returns (tensor, chunk number) of every chunk, dealt to `parts` ranks in file order with about equal bytes."""
    places = sorted((s.file, s.begin, name, i) for name, t in plan.tensors.items() for i, s in enumerate(t.chunks))
    total = max(1, plan.num_bytes)
    result: list[list[tuple[str, int]]] = [[] for _ in range(parts)]
    done = 0
    for _, _, name, i in places:
        stored = plan.tensors[name].chunks[i]
        result[min(parts - 1, done * parts // total)].append((name, i))
        done += stored.end - stored.begin
    return result


def plan_copies(index: Index, wanted: Iterable[Piece], *, convert: bool = False) -> list[list[Copy]]:
    """Returns, for each wanted piece, the reads that fill it, in file order.

    Args:
        convert: Allow a float dtype other than the stored one.

    Raises:
        CheckpointError: The checkpoint lacks a tensor, or stores it with another shape or dtype; names what and where.
    """
    wanted = list(wanted)
    missing = sorted({piece.name for piece in wanted} - index.tensors.keys())
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(f"{index.path}: holds no tensor {', '.join(missing[:3])}{more}")
    advice = "; `swin-moe checkpoint experts` makes another number of experts" if _other_experts(index, wanted) else ""
    return [_plan_piece(index, piece, convert, advice) for piece in wanted]


def _other_experts(index: Index, wanted: list[Piece]) -> bool:
    """Returns whether tensors of experts differ in their number; routers, which are read first, differ as well."""
    experts = [(index.tensors[piece.name].shape, piece.shape) for piece in wanted if is_expert_tensor(piece.name)]
    return any(stored != shape and stored[1:] == shape[1:] for stored, shape in experts)


def _plan_piece(index: Index, piece: Piece, convert: bool, advice: str) -> list[Copy]:
    piece.check()
    stored = index.tensors[piece.name]
    where = f"{index.path}: tensor {piece.name}"
    if stored.shape != piece.shape:
        raise CheckpointError(f"{where}: has shape {stored.shape}, {piece.shape} is wanted{advice}")
    floats = stored.dtype in FLOATS and piece.dtype in FLOATS
    if stored.dtype != piece.dtype and not (convert and floats):
        raise CheckpointError(f"{where}: has dtype {stored.dtype}, {piece.dtype} is wanted")
    copies = [Copy(piece.name, source, box) for source, box in stored.overlapping(piece.chunk)]
    assert sum(copy.box.numel for copy in copies) == piece.chunk.numel, "a checked index has no gaps"
    return sorted(copies, key=lambda copy: (copy.source.file, copy.source.begin))

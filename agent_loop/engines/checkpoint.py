"""Weights on disk in Hugging Face's safetensors format: what a folder holds, whether another one fits, and writing one."""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30

# Of each format, the bits of the exponent: all of them are set in what is infinite or no number.
_EXPONENTS: dict[str, Any] = {
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
    "F32": np.uint32(0x7F80_0000),
    "F64": np.uint64(0x7FF0_0000_0000_0000),
}


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one folder, by their headers only; nothing is loaded.

    Attributes:
        folder: where they lie.
        shapes: of each tensor, by its name.
        stamps: (file name, bytes, time of last change) of each file, to see later whether the folder was written over.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    stamps: tuple[tuple[str, int, int], ...]

    def unchanged(self) -> bool:
        """Whether the folder still holds the very files that were read."""
        try:
            return _stamps([self.folder / name for name, _, _ in self.stamps]) == self.stamps
        except FileNotFoundError:
            return False


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """What the safetensors files of `folder` hold.

    Raises:
        ValueError: not a folder, no safetensors files, or a file that is cut off or has no readable header.
    """
    folder = Path(folder).absolute()
    files = _weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        held = header_shapes(file)
        if twice := shapes.keys() & held.keys():
            raise ValueError(f"{folder} holds {_some('names', sorted(twice))} in two files; leave one set of weights in it")
        shapes |= held
    return Checkpoint(folder, shapes, _stamps(files))


def check_fits(new: Checkpoint, model: Checkpoint, *, tied: bool) -> None:
    """Raise `ValueError` unless `new` has the names and shapes of `model`.

    With `tied` embeddings the output matrix is the input's, and `new` may name it although `model` does not, as state dicts do.
    """
    given, wanted = new.shapes, model.shapes
    missing = sorted(wanted.keys() - given.keys())
    foreign = sorted(name for name in given.keys() - wanted.keys() if not (tied and is_output_matrix(name)))
    # An engine that is not told of a missing tensor keeps its old values: a mixture of two policies.
    if missing or foreign:
        raise ValueError(f"{new.folder} is not a checkpoint of this model: {_some('missing', missing)}, {_some('unknown', foreign)}")
    if wrong := [f"{name} is {given[name]}, not {wanted[name]}" for name in sorted(wanted) if given[name] != wanted[name]]:
        raise ValueError(f"{new.folder} has tensors of other shapes than the model: {_some('wrong', wrong)}")


def is_output_matrix(name: str) -> bool:
    """Whether `name` is the matrix that tied embeddings share with the input's."""
    return name.split(".")[-2:] == ["lm_head", "weight"]


def write_checkpoint(tensors: Mapping[str, Any] | Iterable[tuple[str, Any]], folder: Path) -> None:
    """Write (name, tensor) pairs as safetensors shards into `folder`, holding no more than one shard in memory.

    Raises:
        ValueError: no tensors, or a name that comes twice.
    """
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    shard: dict[str, Any] = {}
    size, names = 0, dict[str, str]()
    for name, tensor in pairs:
        if name in names:
            raise ValueError(f"the weights hold {name!r} twice")
        # A copy: safetensors refuses tensors that share memory, and the trainer may go on changing the original.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += shard[name].nbytes
        names[name] = ""
        if size >= SHARD_BYTES:
            _write_shard(shard, folder, names)
            shard, size = {}, 0
    if not names:
        raise ValueError("the weights are empty; give a folder, a mapping of names to tensors, or (name, tensor) pairs")
    _write_shard(shard, folder, names)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _write_shard(shard: dict[str, Any], folder: Path, names: dict[str, str]) -> None:
    if not shard:
        return
    from safetensors.torch import save_file

    file = f"model-{len(set(names.values())):05d}.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    names.update(dict.fromkeys(shard, file))


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one that holds a model in Hugging Face's format")
    if (folder / INDEX).exists():
        files = sorted({folder / name for name in json.loads((folder / INDEX).read_text())["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors files; save the model with save_pretrained")
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which its index names; was saving cut short?")
    return files


def header_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file, by its name, from its header.

    Raises:
        ValueError: the file is cut off, or has no readable header.
    """
    header, _ = _header(file)
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def not_finite(file: Path) -> str | None:
    """The name of a tensor in a safetensors file that holds an infinite number, or none; None where there is no such tensor."""
    header, data = _header(file)
    with file.open("rb") as stream:
        for name, entry in header.items():
            if (form := _EXPONENTS.get(entry["dtype"])) is None:
                continue  # of fewer bits than have an infinity
            begin, end = entry["data_offsets"]
            stream.seek(data + begin)
            numbers = np.frombuffer(stream.read(end - begin), form.dtype)
            if ((numbers & form) == form).any():
                return str(name)
    return None


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data starts."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file} is no whole safetensors file: its header does not fit; was saving cut short?")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    end = 0
    for start, stop in sorted(entry["data_offsets"] for entry in header.values()):
        if start != end:
            raise ValueError(f"{file} is no sound safetensors file: a tensor starts at byte {start} where the last ended at {end}")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"{file} has {size} bytes where its header tells of {8 + length + end}; was saving cut short?")
    return header, 8 + length


def _stamps(files: list[Path]) -> tuple[tuple[str, int, int], ...]:
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _some(what: str, names: list[str]) -> str:
    return f"{len(names)} {what}" + (f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "")

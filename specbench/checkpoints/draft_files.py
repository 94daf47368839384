"""The files of a draft folder: config.json and safetensors, in one file or in shards with an index, read completely.

Missing files of an index, shards that no index names and tensors in two files are errors, because a draft with a
missing part still decodes, with a lower acceptance. Pickled weights are never opened.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from specbench.checkpoints.config_keys import FormatError

INDEX = "model.safetensors.index.json"
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# The tables of a draft, which are weights in every format.
TABLES = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")
WHOLE_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
SHARD = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")


def read_json(file: Path) -> dict[str, Any]:
    """A file's one JSON object. Errors: FormatError naming the file, for a key that stands in it twice too."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = sorted({key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1})
            raise FormatError(f"{file} holds {', '.join(map(repr, twice))} twice; keep the right value")
        return found

    try:
        found = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{file} is not JSON ({error})") from error
    except OSError as error:
        raise FormatError(f"{file} cannot be read ({error.strerror})") from error
    if not isinstance(found, dict):
        raise FormatError(f"{file} holds {type(found).__name__}, not an object of settings")
    return found


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a draft folder. Errors: FormatError."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FormatError(f"draft={folder}: no config.json there; give a folder with config.json and *.safetensors")
    return read_json(file)


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a draft folder. Errors: FormatError naming what is missing, doubled or unreadable."""
    tensors: dict[str, Tensor] = {}
    for file, names in weight_files(Path(folder)):
        try:
            with safe_open(file, "pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in names}
        except FormatError:
            raise
        except Exception as error:
            raise FormatError(f"{file} cannot be read as safetensors ({error}); copy it again") from error
    return tensors


def sound(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, own: bool = False
) -> tuple[dict[str, Tensor], torch.dtype]:
    """Tensors of a checkpoint as finite floating-point numbers of one dtype, and that dtype: `dtype`, or the widest
    that the checkpoint holds, fp32 at most. The vocabulary map (d2t, t2d) stays whole numbers and marks, and so do the
    counts and marks that a folder of our `own` may hold for any method.

    A conversion between floating-point dtypes that was not requested gives a warning. Errors: FormatError naming
    each tensor of integers, truth values, complex or scaled 8-bit numbers, and each that holds NaN or infinity or does
    not fit the dtype.
    """
    maps = {name: tensors[name] for name in ("d2t", "t2d") if name in tensors}
    wrong = [
        f"{name} is {found.dtype}, not whole numbers"
        for name, found in maps.items()
        if found.is_floating_point() or found.is_complex() or (name == "d2t" and found.dtype == torch.bool)
    ]
    if own:
        whole = {name: found for name, found in tensors.items() if found.dtype in WHOLE_DTYPES}
        maps |= {name: found for name, found in whole.items() if name not in TABLES}
    weights = {name: found for name, found in tensors.items() if name not in maps}
    wrong += [
        f"{name} is {kind_of(found)}, not weights"
        for name, found in weights.items()
        if found.dtype not in WEIGHT_DTYPES
    ]
    if wrong:
        raise FormatError(f"the draft's checkpoint cannot be used: {'; '.join(wrong)}")
    held = sorted({kind_of(found) for found in weights.values()})
    widest = functools.reduce(torch.promote_types, (found.dtype for found in weights.values()), torch.bfloat16)
    if len(held) == 1 and held != ["float64"]:
        widest = next(iter(weights.values())).dtype
    wanted = dtype or (torch.float32 if widest == torch.float64 else widest)
    if len(held) > 1 or held == ["float64"]:
        warnings.warn(
            f"the draft's checkpoint holds {' and '.join(held)}; all of its tensors are converted to "
            f"{str(wanted).removeprefix('torch.')}",
            stacklevel=2,
        )
    converted = {name: found.to(wanted) for name, found in weights.items()}
    for name, found in converted.items():
        bad = int((~found.isfinite()).sum())
        if bad:
            own = int((~weights[name].isfinite()).sum())
            what = f"{own} of {found.numel()} are NaN or infinite" if own else f"{bad} of {found.numel()} do not fit it"
            wrong.append(f"{name} ({kind_of(found)}): {what}")
    if wrong:
        raise FormatError(f"the draft's checkpoint cannot be used: {'; '.join(wrong)}; train or download it again")
    return converted | maps, wanted


def kind_of(tensor: Tensor) -> str:
    """A tensor's dtype by its short name."""
    return str(tensor.dtype).removeprefix("torch.")


def tensor_names(folder: str | Path) -> set[str]:
    """The names alone, from the files' headers."""
    return {name for _, names in weight_files(Path(folder)) for name in names}


def weight_files(folder: Path) -> list[tuple[Path, list[str]]]:
    """The weight files of a folder with the names of their tensors, held against the index if there is one.

    Errors: FormatError.
    """
    files = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not files and not indexes:
        pickled = [file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in sorted(folder.glob(kind))]
        if pickled:
            raise FormatError(
                f"draft={folder}: {', '.join(pickled)} holds pickled weights, which are never opened because opening "
                "them runs what is in them; convert them to safetensors first"
            )
        raise FormatError(
            f"draft={folder}: no *.safetensors there; is the download complete, or are the weights in another format?"
        )
    if len(indexes) > 1:
        raise FormatError(f"draft={folder}: {', '.join(i.name for i in indexes)}: several indexes; keep one")
    found = list(_held_to_index(folder, indexes[0], files) if indexes else _without_index(folder, files))
    owner: dict[str, Path] = {}
    for file, names in found:
        for name in names:
            if name in owner:
                raise FormatError(f"draft={folder}: {name!r} stands in {owner[name].name} and in {file.name}; keep one")
            owner[name] = file
    return found


def _without_index(folder: Path, files: list[Path]) -> Iterator[tuple[Path, list[str]]]:
    for file in files:
        part = SHARD.fullmatch(file.name)
        if part is not None and int(part[2]) != len([f for f in files if SHARD.fullmatch(f.name)]):
            raise FormatError(
                f"draft={folder}: {file.name} is one of {int(part[2])} shards, and not all of them are there; is the "
                "download complete?"
            )
        yield file, _names(file)


def _held_to_index(folder: Path, index: Path, files: list[Path]) -> Iterator[tuple[Path, list[str]]]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise FormatError(f"{index} has no weight_map from tensors to files; download it again")
    there, named = {file.name: file for file in files}, sorted(set(places.values()))
    missing = [name for name in named if name not in there]
    if missing:
        raise FormatError(f"{index} names {', '.join(missing)}, which is not there; is the download complete?")
    unnamed = [name for name in there if name not in named]
    if unnamed:
        raise FormatError(
            f"{index} does not name {', '.join(unnamed)}, which lies beside it; take away what is not the draft's"
        )
    for name in named:
        held, expected = set(_names(there[name])), {key for key, place in places.items() if place == name}
        if held != expected:
            lost, extra = sorted(expected - held), sorted(held - expected)
            raise FormatError(
                f"{index} and {name} disagree: the index also names {lost}, the file also holds {extra}; download both "
                "again"
            )
        yield there[name], sorted(held)


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return sorted(opened.keys())
    except Exception as error:
        raise FormatError(f"{file} cannot be read as safetensors ({error}); copy it again") from error

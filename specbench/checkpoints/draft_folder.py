"""Reading and writing of draft folders: config.json + *.safetensors, in a folder or (to read) on the Hugging Face Hub.

`load_draft` reads every format of formats.py, `save_draft` that of SpecBench (DeepSpec's fields and names, and a
`specbench` section that can build any method again), `export_draft` writes the formats of exports.py. Missing and
unknown tensors are errors that list them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from safetensors.torch import save_file
from torch import Tensor

from specbench.checkpoints.config_keys import FormatError
from specbench.checkpoints.draft_files import kind_of, read_config, read_tensors, sound, tensor_names
from specbench.checkpoints.exports import (
    deepspec_fields,
    sglang,
    speculators,
    target_layers_of,
    tensors_of,
    vocabulary_map,
    zlab,
)
from specbench.checkpoints.formats import Reading, Scales, describe, draft_ids, read
from specbench.checkpoints.obstacles import FORMATS, OWN, obstacle
from specbench.drafts.draft import Draft
from specbench.drafts.installed import full_name
from specbench.files.hub_datasets import answered
from specbench.models.embedding_head import Tables

__all__ = [
    "FormatError",
    "build_draft",
    "export_draft",
    "fetch",
    "load_draft",
    "read_config",
    "read_folder",
    "save_draft",
]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a draft: itself, or a hub id downloaded into the hub's cache. Errors: FormatError."""
    path = Path(source)
    if path.exists():
        return path
    if not HUB_ID.fullmatch(str(source)) or str(source)[0] in "./":
        raise FormatError(f"draft={source}: there is no such folder, and it is no hub id of the form OWNER/NAME")
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError, HTTPError) as error:
        at = f" at revision {revision}" if revision else ""
        raise FormatError(
            f"draft={source}: there is no such folder, and the hub does not give it{at} ({answered(error)}): check "
            "the name and the network, or give a folder"
        ) from error


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and all tensors of a draft folder (one file or several). Errors: FormatError."""
    return read_config(folder), read_tensors(folder)


def taps_of(folder: str | Path, methods: Sequence[type[Draft]] = ()) -> list[int]:
    """The target layers that the draft of a folder reads; `methods` are classes of methods outside of this package."""
    config, names = read_config(folder), tensor_names(folder)
    return list(describe(config, methods=methods, tensors=names)[1]["target_layer_ids"])


def ships_embedding(folder: str | Path) -> bool:
    """Whether the checkpoint has an embedding, from the names of its tensors."""
    return any(key.removeprefix("model.") == "embed_tokens.weight" for key in tensor_names(folder))


def load_draft(
    folder: str | Path,
    target_tables: Tables | None = None,
    dtype: torch.dtype | None = None,
    taps: list[int] | None = None,
    methods: Sequence[type[Draft]] = (),
) -> Draft:
    """Build the draft of a folder and load every tensor; `target_tables` are used for formats without tables.

    `methods` are classes of methods outside of this package that the folder may ask for. Errors: FormatError listing
    missing and unexpected keys, or naming a method, a setting or a shape that is not right.
    """
    config, tensors = read_folder(folder)
    return build_draft(config, tensors, target_tables, dtype, taps, methods)


def build_draft(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    target_tables: Tables | None = None,
    dtype: torch.dtype | None = None,
    taps: list[int] | None = None,
    methods: Sequence[type[Draft]] = (),
) -> Draft:
    """The same from a configuration and tensors already read."""
    return assemble_draft(read(config, tensors, taps, methods), target_tables, dtype)


def assemble_draft(reading: Reading, target_tables: Tables | None, dtype: torch.dtype | None = None) -> Draft:
    """The draft of a checkpoint whose format was recognised.

    Errors: FormatError naming each tensor that is missing, unknown, of another shape, or not of finite weights.
    """
    tensors, dtype = sound(reading.tensors, dtype, reading.own)
    tables = _tables(reading, tensors, target_tables)
    draft = reading.kind(reading.backbone, tables, **reading.settings)
    expected = draft.state_dict()
    missing = sorted(set(expected) - set(tensors) - {k for k in expected if k.startswith("tables.")})
    unknown = sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise FormatError(
            f"draft checkpoint does not fit {reading.kind.__name__}: missing {missing}, unknown {unknown}"
        )
    whole = [k for k, v in tensors.items() if v.is_floating_point() != expected[k].is_floating_point()]
    if whole:
        found = ", ".join(f"{k} is {kind_of(tensors[k])}, not {kind_of(expected[k])}" for k in whole)
        raise FormatError(f"the draft's checkpoint cannot be used: {found}")
    wrong = [
        f"{k} {tuple(tensors[k].shape)}, not {tuple(expected[k].shape)}"
        for k in tensors
        if tensors[k].shape != expected[k].shape
    ]
    if wrong:
        raise FormatError(f"draft checkpoint has other shapes than its config.json says: {'; '.join(wrong)}")
    draft.load_state_dict(tensors, strict=False)
    return draft.to(dtype).eval()


def _tables(reading: Reading, tensors: dict[str, Tensor], given: Tables | None) -> Tables:
    """Take the tables and the vocabulary map out of `tensors`; what the checkpoint does not ship is the target's, where
    its format allows that."""
    facts = reading.backbone
    embedding, head = tensors.pop("embed_tokens.weight", None), tensors.pop("lm_head.weight", None)
    bias = tensors.pop("lm_head.bias", None)
    ids = draft_ids(tensors, facts.vocab_size)
    tensors.pop("d2t", None)
    tensors.pop("t2d", None)
    rows = facts.vocab_size if ids is None else len(ids)
    if reading.draft_vocabulary not in (None, rows):
        raise FormatError(
            f"draft_vocab_size={reading.draft_vocabulary} in config.json, and the checkpoint's d2t names {rows} tokens"
            if ids is not None
            else f"draft_vocab_size={reading.draft_vocabulary} of {facts.vocab_size} tokens in config.json, and the "
            "checkpoint has no d2t that says which ones"
        )
    lacks = [name for name, table in (("embed_tokens", embedding), ("lm_head", head)) if table is None]
    if reading.ships_tables and lacks:
        raise FormatError(f"draft checkpoint does not fit its format: missing {[f'{name}.weight' for name in lacks]}")
    if head is None and reading.head == "missing":
        raise FormatError("draft checkpoint does not fit its format: missing ['lm_head.weight']")
    shares_head = head is None and reading.head == "target"
    if given is None and (embedding is None or shares_head):
        raise FormatError(
            "this draft ships no embedding and head: give target=FOLDER_OR_ID (import and export: target_id=...) so "
            "that they can be shared"
        )
    if given is not None and (embedding is None or shares_head):
        found = tuple(given.embedding.shape)
        if found != (facts.vocab_size, facts.hidden_size):
            raise FormatError(
                f"the target's embedding is {found}, and the draft, which shares it, says vocab_size="
                f"{facts.vocab_size} and hidden_size={facts.hidden_size}: they do not belong together"
            )
    if embedding is None and shares_head and reading.scales is not None:
        asked = given.embedding_scale * reading.scales.embedding, reading.scales.soft_cap, reading.scales.logits
        if asked == (given.embedding_scale, given.soft_cap, given.logit_scale):
            return given.derive(ids=ids)
        scaled, cap, factor = asked
        own_head = given.head if ids is None else given.head[ids.to(given.head.device)]
        own_bias = given.bias if given.bias is None or ids is None else given.bias[ids.to(given.bias.device)]
        return Tables(given.embedding, own_head, scaled, cap, ids=ids, logit_scale=factor, bias=own_bias)
    scaled = given is not None and (given.embedding_scale, given.soft_cap, given.logit_scale) != (1.0, None, 1.0)
    if reading.scales_unknown and scaled:
        raise FormatError(
            "the target scales its embedding or its logits or caps them, and this draft's format does not say whether "
            "the draft does: it cannot be decoded faithfully"
        )
    embedding = given.embedding if embedding is None else embedding
    if head is None:
        source = embedding if reading.head == "embedding" else given.head
        head = source if ids is None else source[ids.to(source.device)]
        if bias is None and source is not embedding and given.bias is not None:
            bias = given.bias if ids is None else given.bias[ids.to(given.bias.device)]
    if bias is not None and tuple(bias.shape) != (len(head),):
        raise FormatError(f"lm_head.bias is {tuple(bias.shape)} and lm_head has {len(head)} rows")
    if len(head) != rows:
        raise FormatError(f"lm_head has {len(head)} rows and the draft's vocabulary {rows} tokens (d2t names them)")
    wanted = (facts.vocab_size, facts.hidden_size), (rows, facts.hidden_size)
    for name, table, shape in zip(("embed_tokens", "lm_head"), (embedding, head), wanted, strict=True):
        if tuple(table.shape) != shape:
            raise FormatError(
                f"draft checkpoint has other shapes than its config.json says: {name}.weight {tuple(table.shape)}, not "
                f"{shape}"
            )
    scales = reading.scales or Scales(facts.embedding_scale, facts.logit_scale, facts.soft_cap)
    return Tables(embedding, head, scales.embedding, scales.soft_cap, ids=ids, logit_scale=scales.logits, bias=bias)


def save_draft(draft: Draft, folder: str | Path, target_config: Mapping[str, Any], settings: Mapping[str, Any]) -> Path:
    """Write `draft` as config.json + model.safetensors: the published DeepSpec keys where the method has them.

    `settings` are the constructor arguments beyond backbone and tables; they are kept under `specbench` in
    config.json, so that any method, published or not, can be built again. A reduced vocabulary is kept as d2t and t2d.
    """
    text = dict(target_config.get("text_config") or target_config)
    config = text | deepspec_fields(draft, text)
    config.pop("specbench", None)
    config["specbench"] = {
        "class": full_name(type(draft)),
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if k != "draft_vocabulary"},
        "backbone": dataclasses.asdict(draft.backbone),
        "target_config": dict(target_config),
    }
    return _write(Path(folder), config, tensors_of(draft) | vocabulary_map(draft))


def export_draft(
    source: str | Path,
    folder: str | Path,
    form: str,
    verifier: str | None = None,
    tables: Tables | None = None,
    methods: Sequence[type[Draft]] = (),
) -> Path:
    """Write the draft of the folder `source` into `folder` in a published format; `verifier` names its target.

    Errors: FormatError when the format or its engine cannot hold the draft, with the reason.
    """
    if form not in FORMATS:
        raise FormatError(f"format={form!r}: choose one of {', '.join(FORMATS)}")
    config, tensors = read_folder(source)
    reading = read(config, tensors, methods=methods)
    draft = assemble_draft(reading, tables)
    text = reading.text.get("text_config") or reading.text
    target_layers = target_layers_of(text, draft) if reading.own else text.get("num_target_layers")
    reason = obstacle(draft, form, target_layers)
    if reason is not None:
        raise FormatError(f"draft={source} cannot be written as format={form}: {reason}")
    if form == OWN:
        return save_draft(draft, folder, reading.text, reading.settings)
    if form == "vllm":
        return _write(Path(folder), *speculators(draft, verifier, text))
    if form == "sglang":
        return _write(Path(folder), *sglang(draft, text, target_layers))
    if form == "zlab":
        return _write(Path(folder), *zlab(draft, text, target_layers))
    plain = {k: v for k, v in config.items() if k != "specbench"} if "specbench" in config else dict(reading.text)
    return _write(Path(folder), plain | deepspec_fields(draft, plain), tensors_of(draft))


def _write(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    named = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    config = {**config, **dict.fromkeys(named, dtype_of(tensors))}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def dtype_of(tensors: Mapping[str, Tensor]) -> str:
    """The dtype that a reader should load `tensors` in: theirs, or the narrowest that holds all of them exactly."""
    return str(reduce(torch.promote_types, (t.dtype for t in tensors.values() if t.is_floating_point()))).removeprefix(
        "torch."
    )

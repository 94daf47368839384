"""Published drafts through the command line's stages, on the embedded target: imported, evaluated, trained further."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import specbench
from experiments.quickstart import stage
from tests import pipeline, published

EMBEDDED = Path(specbench.__file__).parent / "data" / "embedded"


def folder_of(root: Path, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A draft of the format with the embedded target's sizes, and its tensors under our names."""
    about = json.loads((EMBEDDED / "config.json").read_text())
    keys = [key for key in published.FACTS if key in about]
    config = published.config(kind)
    config |= {key: about[key] for key in keys} | {"rope_theta": about["rope_parameters"]["rope_theta"]}
    if "draft_vocab_size" in config:
        config["draft_vocab_size"] = about["vocab_size"]
    held = {}
    generator = torch.Generator().manual_seed(0)
    scale = {32: about["hidden_size"], 48: about["intermediate_size"], 96: about["vocab_size"]}
    heads = about["num_attention_heads"] * about["head_dim"], about["num_key_value_heads"] * about["head_dim"]
    for name, value in published.tensors(kind).items():
        shape = [scale.get(size, size) for size in value.shape]
        if "proj" in name and "self_attn" in name:
            wide = 2 * about["hidden_size"] if value.shape[-1] == 64 else about["hidden_size"]
            rows = heads[0] if ".q_" in name else heads[1]
            shape = [about["hidden_size"], heads[0]] if ".o_" in name else [rows, wide]
        elif name == "fc.weight":
            shape = [about["hidden_size"], 3 * about["hidden_size"]]
        elif "q_norm" in name or "k_norm" in name:
            shape = [about["head_dim"]]
        held[name] = torch.randn(shape, generator=generator) * 0.05 + (len(shape) == 1)
    folder = root / kind
    folder.mkdir()
    stored = {name: value for name, value in published.stored(kind, held).items() if "embed_tokens" not in name}
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder, held


@pytest.mark.long
def test_published_drafts_are_imported_evaluated_and_trained_further(tmp_path: Path) -> None:
    common = pipeline.prepare(tmp_path)
    taps, short = f"target.target_layer_ids={published.TAPS}", ["max_new_tokens=8", "evaluate=false"]
    method = {
        "sglang": ["method=eagle3", "method.backbone=llama"],
        "z-lab": ["method=dflash", "method.draft.sample_from_anchor=false", "method.draft.layers=2"],
    }
    stage("cache", [f"root={tmp_path}", "data=jsonl", taps, "force=true"])
    for kind, settings in method.items():
        folder, held = folder_of(tmp_path, kind)
        slots = 7 if kind == "sglang" else 4
        ours = stage("import", [f"draft={folder}", f"root={tmp_path}", f"target_id={EMBEDDED}"])
        for draft in (folder, ours):
            suite = [word for word in common if word.startswith("suite")]
            stage("evaluate", [f"draft={draft}", f"root={tmp_path}", "tracking=disabled", "max_new_tokens=8", *suite])
        trained = stage(
            "train",
            [*common, *settings, *short, taps, f"start={folder}", f"method.draft.block_size={slots}", f"name={kind}"],
        )
        summary = json.loads((trained / "summary.json").read_text())
        tensors = load_file(trained / "draft" / "model.safetensors")
        mine = [name for name in held if name not in ("embed_tokens.weight", "lm_head.weight")]
        assert summary["lineage"]["copied"] == len(mine)
        # Two steps of warm-up move no weight far from where it started.
        assert all((tensors[name] - held[name]).abs().max() < 0.05 for name in mine)

"""EAGLE-3.1, the named choice: its draft computes the formulas from the tensors that it is published with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from specbench.blocks import with_anchors
from specbench.checkpoints.draft_folder import export_draft, load_draft, save_draft
from tests import published, tiny, transcriptions
from tests.test_interchange import made, same


def test_it_is_eagle3_with_two_flags() -> None:
    base, new = (OmegaConf.to_container(OmegaConf.load(tiny.FILES[name])) for name in ("eagle3", "eagle3_1"))
    changed = {key for key, value in new["draft"].items() if base["draft"][key] != value}
    assert changed == {"fc_norm", "norm_output"} and new["draft"]["fc_norm"] and new["draft"]["norm_output"]
    assert {k: v for k, v in new.items() if k not in ("name", "draft")} == {
        k: v for k, v in base.items() if k not in ("name", "draft")
    }


@pytest.mark.parametrize("form", ["vllm", "sglang"])
def test_an_engine_that_follows_the_formulas_gets_its_logits(form: str, tmp_path: Path) -> None:
    """Out: the flags and tensors of the written folder, computed by the transcription. In: the same draft."""
    taps = [0, 1, 2] if form == "sglang" else list(tiny.TAPS)  # SGLang has no tap of the target's last layer
    draft, kept, config = made("eagle3_1", backbone="llama", block_size=7, taps=taps)
    save_draft(draft, tmp_path / "own", config, kept)
    out = export_draft(tmp_path / "own", tmp_path / "out", form)
    owner = tiny.target("qwen3")
    same(draft, load_draft(out, owner.tables))

    written, held = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    flags = {name: written[name] for name in ("fc_norm", "norm_output")}
    assert flags == {"fc_norm": True, "norm_output": True} and not written.get("norm_before_fc")
    assert {f"fc_norm.{i}.weight" for i in range(3)} <= set(held) and "input_norm.weight" not in held
    held = {name.replace("midlayer.", "layers.0."): value for name, value in held.items()}
    held.setdefault("embed_tokens.weight", owner.tables.embedding)
    facts = draft.backbone
    c = published.FACTS | {"rope_theta": facts.rope_theta, "rms_norm_eps": facts.norm_eps}

    sample = tiny.samples("qwen3")[0]
    batch = with_anchors(tiny.pack([sample]), None)
    with torch.no_grad():
        blocks = draft(batch)
        found = draft.logits(blocks.hidden, blocks.previous)[0]
    for n in (1, 6):
        anchor = int(batch.anchors[0, n])

        def formulas(flags: dict, anchor: int = anchor) -> torch.Tensor:
            return transcriptions.eagle3(c | flags, held, sample.taps, sample.tokens, anchor, draft.block_size)

        torch.testing.assert_close(found[n], formulas(flags), atol=1e-4, rtol=1e-4)
        # Each flag matters: a loader that passes over one decodes with another draft, losslessly and slowly.
        for name in flags:
            assert (found[n] - formulas(flags | {name: False})).abs().max() > 1e-2

"""Which engine decodes which draft: the reasons for which a draft is refused, each with the version that was read.

An engine that ignores what it does not know would decode with a wrong draft, so a draft that a format or its engine
cannot represent is refused. Each reason names the engine's version and the file that decides; a later version may know
more. Sources: vLLM 0.32.0 model_executor/models/{llama_eagle,llama_eagle3,qwen3_eagle3,qwen3_dflash,qwen3_dspark,
medusa}.py, v1/worker/gpu/spec_decode/dflash/speculator.py, transformers_utils/configs/speculators/algos.py; SGLang
0.5.23 srt/models/{llama_eagle3,dflash,dspark,llama,qwen2}.py, srt/speculative/dspark_components/dspark_config.py;
DeepSpec, of which a public toolkit exists without version numbers, as read on 2026-11-26.
"""

from __future__ import annotations

import dataclasses

from specbench.checkpoints.formats import EAGLE_FLAGS
from specbench.checkpoints.medusa_format import medusa_obstacle
from specbench.drafts.domino import Domino
from specbench.drafts.draft import Draft
from specbench.drafts.dspark import DSpark
from specbench.drafts.eagle1 import Eagle1
from specbench.drafts.eagle3 import Eagle3
from specbench.drafts.fused_taps import FusedTaps
from specbench.drafts.jetspec import JetSpec
from specbench.drafts.medusa import Medusa
from specbench.drafts.p_eagle import PEagle
from specbench.drafts.parallel import ParallelDraft
from specbench.models.backbone import Backbone

OWN = "specbench"  # every method; only SpecBench reads it
FORMATS = ("deepspec", "vllm", "sglang", "zlab", OWN)
# The published architectures that each of them holds.
HELD = {
    "deepspec": ("dspark", "dflash", "eagle3"),
    "vllm": ("dspark", "dflash", "eagle3", "p_eagle", "medusa", "eagle1"),
    "sglang": ("dspark", "dflash", "eagle3", "eagle1"),
    "zlab": ("dflash", "jetspec", "domino", "dflash2"),
}
VLLM, SGLANG = "vLLM 0.32.0", "SGLang 0.5.23"
# Facts of a backbone that a Llama or Qwen3 configuration has keys for, or that are looked at before.
PLAIN = [
    "family",
    "hidden_size",
    "intermediate_size",
    "heads",
    "kv_heads",
    "head_dim",
    "vocab_size",
    "rope_theta",
    "rope_scaling",
    "norm_eps",
    "activation",
    "attention_bias",
    "head_norms",
    "norm_before_residual",
    "embedding_scale",
    "soft_cap",
    "logit_scale",
    "window",
]


def obstacle(draft: Draft, form: str, target_layers: int | None = None) -> str | None:
    """Why `draft` cannot be written as `form`; None when it can.

    target_layers: number of layers of the target (None: not known, so taps are not held against it). The weights of
    the draft are not read, so a draft on the meta device will do.
    """
    if form == OWN:
        return None
    if published(draft) is None:
        return f"{type(draft).__name__} has no published format: only SpecBench loads it; use format={OWN}"
    if published(draft) not in HELD[form]:
        others = [name for name, held in HELD.items() if published(draft) in held]
        return f"{type(draft).__name__} is no draft of this format; use format={' or '.join([*others, OWN])}"
    if draft.backbone.window is not None:
        return "a sliding window over the context has no common meaning there; train with method.window=null"
    if isinstance(draft, ParallelDraft) and draft.causal_block and form != "zlab":
        return "a causal block (causal_block) has no key there; train with method.draft.causal_block=false"
    if draft.backbone.logit_scale != 1.0:
        return f"scaled logits (logit_scale={draft.backbone.logit_scale:g}) have no key there"
    if draft.tables.bias is not None:
        return "the bias of the target's head has no key there"
    if form == "deepspec":
        return _deepspec_obstacle(draft)
    if form == "vllm":
        return _vllm_obstacle(draft)
    if form == "zlab":
        return _zlab_obstacle(draft)
    return _sglang_obstacle(draft) or _last_layer(draft, target_layers)


def servable(draft: Draft, target_layers: int | None = None) -> str:
    """One line that says which engines decode with `draft`, and the reason of each that does not."""
    engines = {"vllm": VLLM, "sglang": SGLANG}
    if not any(published(draft) in HELD[form] for form in engines):
        return f"no engine here decodes with {type(draft).__name__}; SpecBench does"
    reasons = {
        form: obstacle(draft, form, target_layers)
        if published(draft) in HELD[form]
        else f"it does not decode with {type(draft).__name__}"
        for form in engines
    }
    able = [f"{engines[form]} (export format={form})" for form, reason in reasons.items() if reason is None]
    unable = [f"not in {engines[form]}: {reason}" for form, reason in reasons.items() if reason is not None]
    return "; ".join(able + unable)


def published(draft: Draft) -> str | None:
    """The published architecture that the draft's very class is; what a base class is does not count."""
    return vars(type(draft)).get("published_format")


def norms_of(draft: Draft) -> dict[str, bool]:
    """The settings of formats.EAGLE_FLAGS that are on in a draft."""
    if not isinstance(draft, FusedTaps):
        return {}
    found = (draft.fc_norm is not None, draft.input_norm is not None, draft.feeds_normed_output)
    return {name: True for name, on in zip(EAGLE_FLAGS, found, strict=True) if on}


def _deepspec_obstacle(draft: Draft) -> str | None:
    facts = draft.backbone
    if isinstance(draft, ParallelDraft) and not draft.sample_from_anchor:
        return "DeepSpec's blocks predict slot 1 from the anchor; this draft predicts at mask tokens only"
    if norms_of(draft):
        return (
            f"DeepSpec's Eagle3 has no {' or '.join(norms_of(draft))}; format=vllm holds this draft's layers if Llama's"
        )
    if draft.draft_vocabulary is not None:
        return "DeepSpec's drafts have the whole vocabulary; this one has a reduced vocabulary"
    if facts.family not in ("qwen3", "gemma4") or facts.norm_before_residual:
        like = "Llama-like" if facts.family == "llama" else f"{facts.family}'s"
        return f"DeepSpec has Qwen3 and Gemma4 layers only; this draft's layers are {like}"
    if facts.sandwich != (facts.embedding_scale != 1.0) or (facts.soft_cap is not None and not facts.sandwich):
        return "DeepSpec ties layers to the target's family; this draft's backbone is of another family than its target"
    beyond = None if facts.sandwich else _beyond_plain(facts)
    return None if beyond is None else f"DeepSpec: {beyond}"


def _beyond_plain(facts: Backbone) -> str | None:
    """What a backbone has that the configuration of a Llama or Qwen3 layer has no key for."""
    if facts.family not in ("qwen3", "llama"):
        return f"its layers are Qwen3's or Llama's; this draft's are {facts.family}'s: train with method.backbone=qwen3"
    found = [
        f"{fact.name}={getattr(facts, fact.name)}"
        for fact in dataclasses.fields(facts)
        if fact.name not in PLAIN and getattr(facts, fact.name) != fact.default
    ]
    return f"its layers have no key for {', '.join(found)}" if found else None


def _vllm_obstacle(draft: Draft) -> str | None:
    facts = draft.backbone
    if isinstance(draft, Medusa):
        return medusa_obstacle(draft, VLLM)
    if isinstance(draft, Eagle1):
        return _eagle1_obstacle(draft, VLLM, "llama_eagle.py", bias=False)
    if facts.sandwich or facts.soft_cap is not None or facts.embedding_scale != 1.0:
        return (
            "speculators has no Gemma4-like layers, embedding scale or soft-cap; format=deepspec holds this draft, and "
            "vLLM has a Gemma4 DSpark model for that format"
        )
    if (beyond := _beyond_plain(facts)) is not None:
        return f"speculators: {beyond}"
    if isinstance(draft, FusedTaps):
        if facts.head_norms and facts.attention_bias:
            return f"{VLLM} has no bias of the output projection beside norms of queries and keys (qwen3.py)"
        if isinstance(draft, PEagle) and draft.fc_norm is not None:
            return f"{VLLM} does not read fc_norm of a P-EAGLE (algos.py); train with method.draft.fc_norm=false"
        return _one_layer(draft, f"{VLLM} (llama_eagle3.py)")
    if not facts.head_norms:
        return _unnormed(f"{VLLM} (qwen3_dflash.py)")
    if isinstance(draft, DSpark):
        if draft.markov_head is None or draft.markov_head.kind != "vanilla":
            kind = "no Markov head" if draft.markov_head is None else f"a {draft.markov_head.kind} Markov head"
            return f"{VLLM} decodes the vanilla Markov head only (qwen3_dspark.py); this draft has {kind}"
    elif draft.sample_from_anchor:
        return (
            f"{VLLM} has DFlash at mask tokens only (spec_decode/dflash/speculator.py); train with "
            "method.draft.sample_from_anchor=false"
        )
    return None


def _sglang_obstacle(draft: Draft) -> str | None:
    facts = draft.backbone
    if facts.sandwich or facts.soft_cap is not None or facts.embedding_scale != 1.0:
        return f"{SGLANG} has drafts with Qwen3's and Llama's layers, no embedding scale or soft-cap of the draft's own"
    if (beyond := _beyond_plain(facts)) is not None:
        return f"{SGLANG}: {beyond}"
    if isinstance(draft, Eagle1):
        return _eagle1_obstacle(draft, SGLANG, "llama_eagle.py", bias=True)
    if draft.tables.trainable:
        return f"{SGLANG} gives a draft the target's embedding; this draft has trained its own"
    if isinstance(draft, Eagle3):
        if facts.head_norms:
            return (
                f"{SGLANG} has EAGLE-3 without norms of queries and keys (llama_eagle3.py); this draft has them: train "
                "with method.backbone=llama"
            )
        if facts.norm_before_residual:
            return f"{SGLANG} adds to the feature as it is (llama_eagle3.py); this draft adds to the normed feature"
        if facts.attention_bias:
            return f"{SGLANG} has EAGLE-3 without biases of queries, keys and values (llama_eagle3.py)"
        return _one_layer(draft, f"{SGLANG} (llama_eagle3.py)")
    if not facts.head_norms:
        return _unnormed(f"{SGLANG} (dflash.py)")
    if draft.draft_vocabulary is not None:
        return f"{SGLANG} takes the target's head for block drafts (dflash.py); this draft has a reduced vocabulary"
    if isinstance(draft, DSpark):
        if draft.markov_head is None:
            return (
                f"{SGLANG} needs a Markov head in a DSpark draft (dspark.py); train with method.draft.markov_rank=256"
            )
    elif draft.sample_from_anchor:
        return f"{SGLANG} has DFlash at mask tokens only (dflash.py); train with method.draft.sample_from_anchor=false"
    return None


def _zlab_obstacle(draft: Draft) -> str | None:
    assert isinstance(draft, ParallelDraft)
    facts = draft.backbone
    if facts.sandwich:
        return "z-lab's drafts have Qwen3 layers; this draft's are Gemma4-like"
    if (beyond := _beyond_plain(facts)) is not None:
        return f"z-lab: {beyond}"
    if not facts.head_norms:
        return "z-lab's drafts have Qwen3 layers, with norms of queries and keys; this draft's are Llama-like"
    if draft.tables.trainable or draft.draft_vocabulary is not None:
        return "z-lab's drafts share the target's embedding and head; this draft has its own or a reduced vocabulary"
    if draft.sample_from_anchor and not isinstance(draft, Domino):
        return "z-lab's drafts predict at mask tokens only; train with method.draft.sample_from_anchor=false"
    if draft.full_layers and draft.causal_block:
        return "layers without the causal block of the others (full_layers) have no key there"
    if isinstance(draft, JetSpec) and draft.block_input != "masks":
        return f"JetSpec's released blocks hold masks; this draft reads block_input={draft.block_input}"
    return None


def _eagle1_obstacle(draft: Eagle1, engine: str, file: str, bias: bool) -> str | None:
    facts = draft.backbone
    if facts.sandwich or facts.soft_cap is not None or facts.embedding_scale != 1.0:
        return f"{engine} has EAGLE-1 with Llama layers, no embedding scale or soft-cap ({file})"
    if (beyond := _beyond_plain(facts)) is not None:
        return f"{engine}: {beyond}"
    if facts.head_norms:
        return (
            f"{engine} has EAGLE-1 with Llama layers, without norms of queries and keys ({file}); train with "
            "method.backbone=llama"
        )
    if (draft.fc.bias is not None) != bias:
        has = "a" if bias else "no"
        return (
            f"{engine} has {has} bias in the map of embedding and feature ({file}); train with "
            f"method.draft.fc_bias={str(bias).lower()}"
        )
    if draft.tables.trainable or draft.draft_vocabulary is not None:
        return (
            f"{engine} gives an EAGLE-1 the target's embedding and head ({file}); this draft has its own or a reduced "
            "vocabulary: train with method.draft.train_tables=false method.vocabulary=null"
        )
    return None


def _one_layer(draft: Draft, engine: str) -> str | None:
    if len(draft.layers) == 1 or not isinstance(draft, Eagle3):
        return None
    return (
        f"{engine}: EAGLE-3 reads the embedding in its first layer alone; this draft has {len(draft.layers)}, which "
        "all read it: train with method.draft.layers=1"
    )


def _unnormed(engine: str) -> str:
    return (
        f"{engine}: block drafts have Qwen3 layers, with norms of queries and keys; this draft's are Llama-like: train "
        "with method.backbone=qwen3"
    )


def _last_layer(draft: Draft, target_layers: int | None) -> str | None:
    """SGLang keeps the input of a layer, so the output of the last one is out of its reach."""
    if not draft.reads_taps or target_layers is None or target_layers - 1 not in draft.target_layer_ids:
        return None
    return (
        f"{SGLANG} has no tap of the target's last layer (set_eagle3_layers_to_capture); this draft reads layer "
        f"{target_layers - 1} of {target_layers}: train with taps below it (target.target_layer_ids)"
    )

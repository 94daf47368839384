"""`export_for`: what an engine needs is set, and what no setting can give is refused."""

from __future__ import annotations

import pytest

from specbench.checkpoints.obstacles import obstacle
from specbench.cli.assembly import composed, draft_without_weights, target_config
from specbench.cli.engine_settings import fitted, layers_of_target, said_servable


@pytest.mark.parametrize(
    ("engine", "words", "changed"),
    [
        ("vllm", ["method=dflash"], {"method.draft.sample_from_anchor=false"}),
        ("vllm", ["method=eagle3"], set()),
        ("vllm", ["method=eagle3", "target=smollm2_135m"], set()),
        ("vllm", ["method=dspark", "method.draft.markov_head=rnn"], {"method.draft.markov_head=vanilla"}),
        ("vllm", ["method=dspark", "target=smollm2_135m"], {"method.backbone=qwen3"}),
        ("vllm", ["method=eagle1"], {"method.backbone=llama", "method.draft.fc_bias=false"}),
        ("vllm", ["method=p_eagle", "method.draft.fc_norm=true"], {"method.draft.fc_norm=false"}),
        (
            "vllm",
            ["method=medusa", "method.vocabulary=99", "method.draft.own_heads=true"],
            {"method.draft.own_heads=false"},
        ),
        ("sglang", ["method=hass"], {"method.backbone=llama"}),
        ("sglang", ["method=eagle3", "target.target_layer_ids=[1,2,3]"], {"method.backbone=llama"}),
        (
            "sglang",
            ["method=dspark", "target.target_layer_ids=[1,3]", "method.vocabulary=99"],
            {"method.vocabulary=null"},
        ),
    ],
)
def test_an_engines_needs_are_set(engine: str, words: list[str], changed: set[str]) -> None:
    cfg, said = fitted(composed("train", [f"export_for={engine}", *words]))
    assert set(said) == changed
    config = target_config(cfg.target)
    assert obstacle(draft_without_weights(cfg.method, cfg.target, config), engine, layers_of_target(config)) is None


@pytest.mark.parametrize(
    ("engine", "words", "reason"),
    [
        ("vllm", ["method=mtp"], "no published format"),
        ("sglang", ["method=dflash"], "no tap of the target's last layer .* layer 5 of 6"),
    ],
)
def test_what_no_setting_mends_is_refused_before_the_training(engine: str, words: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=f"export_for={engine} .*{reason}"):
        fitted(composed("train", [f"export_for={engine}", *words]))


def test_a_plan_says_where_a_draft_will_be_servable() -> None:
    cfg = composed("train", ["method=dflash", "target=smollm2_135m"])
    config = target_config(cfg.target)
    line = said_servable(draft_without_weights(cfg.method, cfg.target, config), config)
    assert "not in vLLM 0.32.0" in line and "not in SGLang 0.5.23" in line and "method.backbone=qwen3" in line
    cfg = composed("train", ["method=eagle3", "target=smollm2_135m"])
    line = said_servable(draft_without_weights(cfg.method, cfg.target, config), config)
    assert "vLLM 0.32.0 (export format=vllm)" in line and "SGLang 0.5.23 (export format=sglang)" in line

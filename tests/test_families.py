"""Every family of tests/families.py decodes by its library model's own distribution: greedy text, distributions,
roll-backs."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.cli import main
from specbench.blocks import Context
from specbench.decoding.loop import Limits, decode, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.drafts.baselines import NGram
from specbench.models import library_pass, selfcheck
from specbench.models.target import Target, save
from tests import families

# Seconds instead of tenths: every prefix is a pass of its own there.
SLOW = {"deepseek_v4"}
# One of every kind of distribution, mask and cache; the others' distributions are drawn in the long tests.
KINDS = {"llama", "mistral", "qwen3", "gemma2", "gpt_oss", "granite", "cohere2", "phi3", "llama4_text", "falcon_h1"}


def marked(names, long) -> list:
    return [pytest.param(name, marks=pytest.mark.long) if long(name) else name for name in names]


NAMES = list(families.CONFIGS)
NEW = 12
# A total variation of 1e-5 is a hundred roundings of fp32 probabilities; a forgotten factor or soft-cap gives 0.1.
CLOSE = 1e-5
RECOMPUTED = {"qwen3_next", "qwen3_5_text", "deepseek_v4", "falcon_h1"}


@cache
def target(name: str) -> Target:
    return Target.from_config(families.config(name), [0, 1], seed=3, name=name, stop_token_ids=[])


def prompts() -> list[list[int]]:
    """Three prompts longer than every window, the middle one repeating itself so that prompt lookup has proposals."""
    generator = torch.Generator().manual_seed(5)
    first, last = (torch.randint(2, families.V, (n,), generator=generator).tolist() for n in (17, 12))
    return [first, (first[:5] * 4)[:18], last]


@torch.inference_mode()
def librarys(owner: Target, prompt: list[int]) -> list[int]:
    """The library's own generation, greedy and without a cache."""
    tokens = torch.tensor([prompt])
    settings = {"do_sample": False, "use_cache": False, "max_new_tokens": NEW, "pad_token_id": 0}
    out = owner.model.generate(tokens, attention_mask=torch.ones_like(tokens), eos_token_id=families.V + 9, **settings)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", marked(NAMES, lambda name: name in SLOW))
def test_plain_and_speculative_greedy_text_is_the_librarys(name: str) -> None:
    owner, limits = target(name), Limits(NEW, batch_size=3)
    wanted = [librarys(owner, prompt) for prompt in prompts()]
    plain = {d.index: d.output_ids for d in decode(owner, prompts(), Sampling(), limits)}
    assert [plain[i] for i in range(3)] == wanted
    drafted = {d.index: d for d in speculative_decode(owner, NGram(4), prompts(), Sampling(), limits)}
    assert [drafted[i].output_ids for i in range(3)] == wanted
    assert any(r.proposed > r.accepted for d in drafted.values() for r in d.rounds), "nothing was rolled back"


@pytest.mark.parametrize("name", marked(NAMES, lambda name: name not in KINDS))
def test_distributions_at_temperature_one_are_the_librarys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, seen, asked = target(name), [], prompts()[:2]
    extend, logits = owner.extend, owner.logits

    def extending(state, tokens):
        seen.append([state.cache.lengths.clone(), tokens])
        return extend(state, tokens)

    monkeypatch.setattr(owner, "extend", extending)
    monkeypatch.setattr(owner, "logits", lambda last: (seen and seen[-1].append(logits(last)), logits(last))[1])
    done = {d.index: d for d in speculative_decode(owner, NGram(3), asked, Sampling(1.0), Limits(NEW, batch_size=2))}
    texts, worst, rows = [asked[i] + done[i].output_ids for i in range(2)], 0.0, 0
    for lengths, block, *found in seen:
        if len(block) != 2 or block.shape[1] == max(map(len, asked)) or not found:
            continue  # a prefill, or a batch that one of the two has left
        for row, length in enumerate(lengths.tolist()):
            for place in range(block.shape[1]):
                text = torch.tensor([[*texts[row][:length], *block[row, : place + 1].tolist()]])
                truth = owner.live_logits(text, torch.tensor([text.shape[1]]))[0, -1].softmax(-1)
                ours = found[0][row, place].softmax(-1)
                worst, rows = max(worst, float((ours - truth).abs().sum()) / 2), rows + 1
    assert rows >= 8 and worst <= CLOSE


@pytest.mark.parametrize("name", NAMES)
def test_what_can_be_rolled_back_is_not_recomputed(name: str) -> None:
    report = selfcheck.settle(target(name))
    assert (report.mode in selfcheck.SLOWER) == (name in RECOMPUTED)
    assert bool(report.reason) == (name in RECOMPUTED)
    assert report.tokens > 2 * 8  # the windows of the table


def test_the_function_of_the_head_is_read_off_the_model() -> None:
    found = {name: target(name).tables for name in ("granite", "cohere2", "gemma2", "falcon_h1", "llama")}
    assert found["granite"].logit_scale == pytest.approx(1 / 0.3) and found["granite"].embedding_scale == 3.0
    assert (found["cohere2"].logit_scale, found["falcon_h1"].logit_scale) == (0.25, 0.4)
    assert (found["gemma2"].soft_cap, found["gemma2"].embedding_scale) == (5.0, 32**0.5)
    plain = found["llama"]
    assert (plain.logit_scale, plain.soft_cap, plain.embedding_scale, plain.bias) == (1.0, None, 1.0, None)
    biased = Target.from_config({"model_type": "phi", **families.CONFIGS["llama"]}, [0], stop_token_ids=[]).tables
    assert torch.equal(biased.derive(ids=torch.tensor([5, 2])).bias, biased.bias[[5, 2]])


def longrope() -> Target:
    """A target whose rope changes for texts of more than 24 tokens."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 24}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    config = families.config("phi3") | {"rope_parameters": rope, "original_max_position_embeddings": 24}
    return Target.from_config(config, [0, 1], seed=3, stop_token_ids=[])


def test_rope_that_depends_on_the_length_is_recomputed_behind_its_limit() -> None:
    owner = longrope()
    assert owner.rope_limit == 24 and not owner.recomputes
    limits = Limits(NEW, batch_size=3)
    found = {d.index: d.output_ids for d in speculative_decode(owner, NGram(4), prompts(), Sampling(), limits)}
    assert [found[i] for i in range(3)] == [librarys(owner, prompt) for prompt in prompts()]


@pytest.mark.parametrize("lengths", [(30, 5), (5, 30)])
@pytest.mark.parametrize("together", [True, False])
def test_a_short_text_stays_right_beside_and_after_one_behind_the_limit(lengths, together) -> None:
    owner, generator = longrope(), torch.Generator().manual_seed(1)
    tokens, more = (torch.randint(2, families.V, (2, n), generator=generator) for n in (30, 9))
    if together:
        state, _ = owner.prefill(tokens, torch.tensor(lengths))
    else:
        first, second = (owner.prefill(tokens[i : i + 1, :n], torch.tensor([n]))[0] for i, n in enumerate(lengths))
        state = first.merge(second)
    row = lengths.index(5)
    for start in range(0, 9, 3):
        if start == 6:  # the long one leaves
            state, more, tokens, row = state.select(torch.tensor([row])), more[[row]], tokens[[row]], 0
        context = owner.extend(state, more[:, start : start + 3])
        state.advance(3)
        text = torch.cat([tokens[row, :5], more[row, : start + 3]])[None]
        whole = owner.states(text, torch.tensor([text.shape[1]])).last[0, -3:]
        torch.testing.assert_close(context.last[row], whole, rtol=1e-4, atol=1e-4)


def test_a_wrong_mask_is_found_and_recomputed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner = Target.from_config(families.config("mistral"), [0], seed=4, stop_token_ids=[])
    owner.direct = None  # which makes its masks by itself
    monkeypatch.setattr(library_pass, "masks_by_row", lambda *args: nullcontext())
    report = selfcheck.settle(owner, anew=True)
    assert report.mode == "recompute" and owner.recomputes and "first in layer 0 of ragged" in report.reason
    assert sum("recomputed from its tokens" in r.message for r in caplog.records) == 1
    limits = Limits(NEW, batch_size=3)
    found = {d.index: d.output_ids for d in decode(owner, prompts(), Sampling(), limits)}
    assert [found[i] for i in range(3)] == [librarys(owner, prompt) for prompt in prompts()]


@pytest.mark.parametrize(("layer", "said"), [(1, "the output of layer 1"), (None, "the final states")])
def test_what_differs_everywhere_is_refused_by_layer(layer, said, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Target.from_config(families.config("llama"), [0], seed=4, stop_token_ids=[])
    states = owner.states

    def wrong(tokens, lengths):
        context = states(tokens, lengths)
        if layer is None:
            return Context(context.taps, context.last * 1.001, context.lengths)
        factor = torch.ones(context.taps.shape[2], 1)
        factor[layer + 1 :] = 1.001
        return Context(context.taps * factor, context.last, context.lengths)

    monkeypatch.setattr(owner, "states", wrong)
    with pytest.raises(selfcheck.Disagreement, match=rf"first in {said} \(relative difference 1.0e-03") as refused:
        selfcheck.settle(owner, anew=True)
    assert refused.value.report.mode is None


def test_a_result_is_remembered_for_the_same_target_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECBENCH_CACHE", str(tmp_path))
    calls = []
    examine = selfcheck.examine
    monkeypatch.setattr(selfcheck, "examine", lambda owner: (calls.append(owner), examine(owner))[1])
    for seed, checks in ((1, 1), (1, 1), (2, 2)):
        Target.from_config(families.config("llama"), [0], seed=seed, stop_token_ids=[])
        assert len(calls) == checks
    for path in (tmp_path / "selfcheck").glob("*.json"):
        good = json.loads(path.read_text())
        for bad in ("{", "[]", json.dumps(good | {"schema": "other"}), json.dumps(good | {"key": {}}),
                    json.dumps(good | {"report": good["report"] | {"mode": "anything"}}),
                    json.dumps(good | {"report": good["report"] | {"lines": [3]}})):  # fmt: skip
            path.write_text(bad)
            assert selfcheck.remembered(path, good["key"]) is None, bad
        path.write_text(json.dumps(good))
        assert selfcheck.remembered(path, good["key"]).mode == "direct"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("target") / "whole"
    save(target("llama").model, None, at)
    return at


def mangled(source: Path, at: Path, change) -> Path:
    """A copy of a target's folder whose tensors went through `change`."""
    at.mkdir()
    for file in source.iterdir():
        (at / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors, at)
    if (at / "model.safetensors").exists():
        save_file(tensors, at / "model.safetensors", {"format": "pt"})
    return at


def _poison(value: float):
    def change(tensors, at):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    return change


def _pickled(tensors, at):
    (at / "model.safetensors").unlink()
    torch.save(tensors, at / "pytorch_model.bin")


def _config(**settings):
    def change(tensors, at):
        path = at / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


UP = "model.layers.1.mlp.up_proj.weight"
FOLDERS = {
    "missing": (lambda tensors, at: tensors.pop(UP), f"lacks {UP}"),
    "surplus": (lambda tensors, at: tensors.update({"model.layers.0.extra": torch.ones(2)}), "model.layers.0.extra"),
    "shape": (lambda tensors, at: tensors.update({UP: torch.ones(4, 4)}), UP),
    "nan": (_poison(float("nan")), UP),
    "infinite": (_poison(float("-inf")), UP),
    "pickled": (_pickled, "pytorch_model.bin"),
    "other layers": (_config(num_hidden_layers=3), "lacks model.layers.2"),
    "fewer layers": (_config(num_hidden_layers=1), "layers.1"),
    "encoder-decoder": (_config(model_type="t5", architectures=["T5ForConditionalGeneration"]), "encoder-decoder"),
    "own code": (_config(model_type="mine", auto_map={"AutoModelForCausalLM": "m.Mine"}), "code of its own"),
    "no causal model": (_config(model_type="clip"), "no causal language model"),
    "unknown": (_config(model_type="no_such_model"), "config.json"),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_a_folder_that_is_not_whole_is_refused_by_name(fault, folder: Path, tmp_path: Path) -> None:
    change, named = FOLDERS[fault]
    at = mangled(folder, tmp_path / "target", change)
    with pytest.raises(ValueError, match="target") as refused:
        Target.load(at, [0], stop_token_ids=[])
    assert named in str(refused.value) and str(at) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_token_ids_and_lengths_that_a_target_does_not_have_are_refused() -> None:
    for name, new in (("llama", 1), ("gpt2", 40)):
        owner = target(name)
        with pytest.raises(ValueError, match="prompt 1 holds the token id 128 at position 2"):
            next(iter(decode(owner, [[5], [1, 2, families.V]], Sampling(), Limits(new))))
        with pytest.raises(ValueError, match="prompt 0 holds the token id -1"):
            next(iter(decode(owner, [[-1]], Sampling(), Limits(new))))
        with pytest.raises(ValueError, match=r"prompt 0 has 257 tokens.*256 positions"):
            next(iter(decode(owner, [[3] * 257], Sampling(), Limits(new))))
    with pytest.raises(ValueError, match=r"240 tokens and is to get 40 more.*lower max_new_tokens"):
        next(iter(decode(target("gpt2"), [[3] * 240], Sampling(), Limits(40))))
    # Up to the last learnt position, the proposal beyond it included.
    done = next(iter(speculative_decode(target("gpt2"), NGram(6), [[3] * 242], Sampling(), Limits(14))))
    assert len(done.output_ids) == 14


def test_the_check_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["target", f"check={folder}", f"root={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "decoded by its direct pass" in said and "direct: ragged, blocks and roll-backs" in said
    assert [line.split()[0] for line in said.splitlines()[2:]] == ["layer", "-1", "0", "1", "final", "logits"]
    broken = mangled(folder, tmp_path / "broken", FOLDERS["nan"][0])
    assert main(["target", f"check={broken}", f"root={tmp_path}"]) == 2
    assert UP in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

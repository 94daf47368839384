"""What an evaluation says beside the rounds: teacher-forced acceptance, the near-tie audit, classes of tokens."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

import specbench.decoding.loop
from experiments.cli import main
from specbench.blocks import Context
from specbench.checkpoints.draft_folder import save_draft
from specbench.decoding.loop import Limits, decode, speculative_decode
from specbench.decoding.sampling import Sampling, warp
from specbench.drafts.baselines import NGram, OracleDraft, Small
from specbench.evaluation.audit import Parting, audit, parting, spacing, verdict
from specbench.evaluation.draft_evaluation import Protocol
from specbench.evaluation.recorded_rounds import digest
from specbench.evaluation.teacher_forced import SlotAcceptance, TrueTokens, slot_acceptance
from specbench.evaluation.token_classes import token_classes
from specbench.models.target import Target, save
from specbench.runs.run_folder import read_summary
from tests import tiny, toys
from tests.wandblog import offline_run

PROMPTS = [[0, 3, 1], [2, 2], [4, 1, 0, 3, 2]]


def written(draft, sampling: Sampling, new: int = 24) -> list:
    return list(speculative_decode(toys.target(), draft, PROMPTS, sampling, Limits(new, batch_size=3)))


@pytest.mark.parametrize("method", [*toys.METHODS, "small"])
@torch.inference_mode()
def test_acceptance_on_text_equals_proposals_with_the_true_tokens_forced(method):
    """Against min(p, q) summed here, p from the draft's own rounds, q from a whole forward pass, anchor by anchor."""
    owner, draft, sampling, K = toys.target(), toys.draft(method), Sampling(0.8, top_k=4), 3
    prompt, output = [0, 3, 1], [2, 4, 1, 0, 3, 3, 1]
    found = slot_acceptance(owner, draft, prompt, output, sampling, K)
    text = torch.tensor([prompt + output])
    states = owner.states(text, torch.tensor([text.shape[1]]))
    q = warp(owner.logits(states.last[0]), sampling)
    for n, anchor in enumerate(range(len(prompt), text.shape[1] - 1)):
        before = Context(states.taps[:, :anchor], states.last[:, :anchor], torch.tensor([anchor]))
        true = torch.cat([text[:, anchor + 1 :], text.new_zeros(1, K)], 1)
        state = draft.begin(before, text[:, :anchor])
        p = draft.propose(state, text[0, anchor : anchor + 1], TrueTokens(true, sampling)).probabilities[0]
        there = min(K, text.shape[1] - 1 - anchor)
        wanted = torch.minimum(p[:there], q[anchor : anchor + there]).sum(-1)
        torch.testing.assert_close(found.alpha[n, :there], wanted, atol=1e-5, rtol=1e-4)
        assert found.mask[n].tolist() == [k < there for k in range(K)]
    assert found.alpha.shape == (len(output) - 1, K)


@pytest.mark.parametrize("method", toys.METHODS)
def test_every_round_accepts_what_the_text_says_at_its_anchor(method):
    """At temperature 0 a round's accepted length is the run of ones at its anchor, exactly."""
    draft = toys.draft(method)
    rounds = 0
    for done in written(draft, Sampling()):
        found = slot_acceptance(toys.target(), draft, done.prompt_ids, done.output_ids, Sampling(), 3)
        anchor = 0
        for r in done.rounds:
            if anchor + r.proposed < len(done.output_ids):
                assert r.accepted == int(found.alpha[anchor, : r.proposed].cumprod(0).sum())
                rounds += 1
            anchor += r.committed
    assert rounds > 12


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "drawn"])
def test_a_perfect_draft_is_accepted_everywhere(sampling):
    owner = toys.target()
    drafts = [Small(owner, toys.VOCABULARY, 3)] + ([OracleDraft(owner, 3)] if sampling.greedy else [])
    text = next(iter(decode(owner, PROMPTS[:1], sampling, Limits(20))))
    for draft in drafts:
        found = slot_acceptance(owner, draft, text.prompt_ids, text.output_ids, sampling, 3)
        torch.testing.assert_close(found.alpha, found.mask.float(), atol=1e-5, rtol=0)
        for anchors, alpha, survived, reached in found.sums():
            assert anchors == pytest.approx(alpha) == pytest.approx(survived) == pytest.approx(reached)


def test_the_sums_of_a_case_by_hand():
    alpha = torch.tensor([[0.5, 0.8, 0.1], [1.0, 0.25, 0.0], [0.4, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    wanted = [[3, 1.9, 1.9, 3], [2, 1.05, 0.4 + 0.25, 1.5], [1, 0.1, 0.04, 0.4]]
    assert torch.tensor(SlotAcceptance(alpha, mask).sums()).allclose(torch.tensor(wanted, dtype=torch.float64).float())
    assert SlotAcceptance(alpha[:0], mask[:0]).sums() == [[0.0] * 4] * 3


@pytest.fixture(scope="module")
def short() -> Target:
    """A random target in bf16."""
    model = Target.from_config(tiny.QWEN3, [], seed=3, stop_token_ids=[])
    return Target(model.model.to(torch.bfloat16), model.config, [], name="short", stop_token_ids=[])


def texts(target: Target, draft, count: int = 8, new: int = 32):
    prompts, limits = [[5 + i, 6, 7 * i + 1] for i in range(count)], Limits(new, batch_size=4)
    outputs = {d.index: d.output_ids for d in speculative_decode(target, draft, prompts, Sampling(), limits)}
    return prompts, [outputs[i] for i in range(count)], limits


def test_bf16_texts_part_at_near_ties_alone(short):
    rows = [parted and parted.row() for parted in audit(short, *texts(short, OracleDraft(short, 5)))]
    found = verdict(rows, 2.0)
    assert found["violations"] == 0 and found["identical"] + found["ties"] == found["texts"] == 8


def test_a_verification_that_accepts_too_much_is_found_out(short, monkeypatch):
    """Negative control: every proposal is accepted."""

    def lenient(proposed, target, lengths):
        return lengths, target.gather(1, lengths[:, None])[:, 0]

    monkeypatch.setattr(specbench.decoding.loop, "verify_greedy", lenient)
    found = verdict([parted and parted.row() for parted in audit(short, *texts(short, NGram(5)))], 2.0)
    assert found["violations"] >= 4 and found["worst"] > 4  # a repeating text hides the others behind a true tie


def test_where_texts_part_and_by_how_much():
    owner, limits = tiny.target("qwen3"), Limits(6)
    own = next(iter(decode(owner, [[5, 6]], Sampling(), limits))).output_ids
    assert parting(owner, [5, 6], own, limits) is None
    tokens = torch.tensor([[5, 6, *own[:3]]])
    logits = owner.model(tokens, use_cache=False).logits[0, -1].double()
    # The continuation after a foreign token is greedy again, so that this token is the only one that loses.
    wrong = [*own[:3], int(logits.argsort()[40])]
    wrong += next(iter(decode(owner, [[5, 6, *wrong]], Sampling(), Limits(2)))).output_ids
    found = parting(owner, [5, 6], wrong, limits)
    assert found.position == 3 and found.gap == pytest.approx(float(logits.max() - logits[wrong[3]]))
    assert not found.is_tie(2.0) and found.is_tie(math.inf)
    assert Parting.of(found.row()) == found
    cut = parting(owner, [5, 6], own[:4], limits)
    assert cut.position == 4 and Parting.of(cut.row()) == cut
    beyond = parting(owner, [5, 6], own, Limits(6, stop_token_ids=(own[2],)))
    assert beyond.position == own.index(own[2]) + 1 and math.isinf(beyond.gap)
    assert verdict([None, [], found.row(), cut.row()], 2.0)["violations"] == 2
    assert spacing(3.0, torch.bfloat16) == float(torch.tensor(3.0, dtype=torch.bfloat16).nextafter(_far())) - 3.0


def _far() -> torch.Tensor:
    return torch.tensor(9.0, dtype=torch.bfloat16)


def test_an_audit_of_drawn_texts_is_refused():
    with pytest.raises(ValueError, match=r"audit=true compares greedy texts and temperature=0\.7"):
        Protocol(Sampling(0.7), audit=True)


def test_both_from_the_command_line(tmp_path, capsys, monkeypatch):
    prompts, folder = tmp_path / "asked.jsonl", tmp_path / "short"
    lines = [{"id": str(i), "prompt_ids": [5 + i, 6, 7]} for i in range(3)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    save(tiny.target("qwen3").model, None, folder)
    words = ["evaluate", f"root={tmp_path}", f"target={folder}", "tracking=disabled", "max_new_tokens=9", "slots=3"]
    words += [f"prompts={prompts}", "stop_token_ids=[]", "audit=true"]
    assert main([*words, f"draft=small:{folder}", "name=twin", "teacher_forced=true"]) == 0, capsys.readouterr().err
    run = tmp_path / "runs" / "evaluate" / "twin"
    summary, rows = read_summary(run), pq.read_table(run / "records.parquet").to_pylist()
    assert summary["audit"] == {"texts": 3, "identical": 3, "ties": 0, "violations": 0, "worst": None, "spacings": 2.0}
    metrics = summary["metrics"]
    assert metrics["expected_length"]["value"] == metrics["accepted_length"]["value"] == 4.0
    assert metrics["length_gap"]["value"] == 0 and metrics["expected_length"]["count"] == 3 * 8
    assert [(s["slot"], s["anchors"], s["acceptance"], s["gap"]) for s in metrics["teacher_forced"]] == [
        (k, 3 * (9 - k), 1.0, 0.0) for k in (1, 2, 3)
    ]
    assert all(row["teacher_forced"] == [[9.0 - k] * 4 for k in (1, 2, 3)] and row["audit"] == [] for row in rows)
    assert all(sum(c for _, _, c in row["by_round"]) == row["committed"] for row in rows)
    assert [row["prompt_hash"] for row in rows] == [digest(line["prompt_ids"]) for line in lines]
    assert pq.read_schema(run / "records.parquet").metadata[b"schema"] == b"specbench.records/3"
    stated = {"slots": 3, "max_new_tokens": 9, "stop_token_ids": [], "dtype": "float32", "batch_size": 16, "top_p": 1.0}
    assert stated.items() <= summary["protocol"].items() and set(summary["metrics"]) >= {
        "tokens_per_second_per_request"
    }
    assert "tokens_per_second" not in metrics
    (said,) = summary["prompts"]["benchmarks"].values()
    assert said["file"] == str(prompts) and "dataset" not in said and len(said["sha256"]) == 64
    capsys.readouterr()
    accept_all = lambda proposed, target, lengths: (lengths, target.gather(1, lengths[:, None])[:, 0])  # noqa: E731
    monkeypatch.setattr(specbench.decoding.loop, "verify_greedy", accept_all)
    words.append("target.dtype=bfloat16")
    assert main([*words, "draft=ngram", "name=broken"]) == 0
    said = capsys.readouterr()
    assert re.search(r"AUDIT: [123] of 3 texts leave the target's greedy text", said.err), said.err
    assert re.search(r"audit violations: [123]", said.out)
    assert main([*words, "draft=plain", "name=plain"]) == 2
    assert "audit=true examines what a draft proposes" in capsys.readouterr().err


def test_tokens_have_classes():
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "specbench" / "data" / "embedded")
    ids = tokenizer("x = 12 + the", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    classes = token_classes(tokenizer, ids)
    assert len(classes) == len(ids) and classes[-1] == "x" and set(classes[:-1]) <= set("dswc")
    assert "d" in classes and "w" in classes and "c" in classes


def test_trees_from_the_command_line_reach_wandb_as_well(tmp_path, capsys):
    """A draft with a confidence head, whose reliability is drawn for chains and has no meaning for trees."""
    prompts, owner, draft = tmp_path / "asked.jsonl", tmp_path / "target", tiny.draft("dspark", "qwen3")
    prompts.write_text("".join(json.dumps({"id": str(i), "prompt_ids": [5 + i, 6, 7]}) + "\n" for i in range(3)))
    save(tiny.target("qwen3").model, None, owner)
    config = tiny.target("qwen3").config
    save_draft(draft, tmp_path / "draft", config, draft.settings | {"target_layer_ids": list(tiny.TAPS)})
    words = ["evaluate", f"root={tmp_path}", f"target={owner}", f"draft={tmp_path / 'draft'}", "tracking=offline"]
    words += [
        f"prompts={prompts}",
        "stop_token_ids=[]",
        "max_new_tokens=9",
        f"target.target_layer_ids={list(tiny.TAPS)}",
    ]
    written = {}
    for tree in ("chain", "dynamic"):
        assert main([*words, f"name={tree}", f"tree={tree}"]) == 0, capsys.readouterr().err
        run = tmp_path / "runs" / "evaluate" / tree
        assert offline_run(run).exit_code == 0
        assert (run / "figures" / "reliability.png").exists() == (tree == "chain")
        written[tree] = [json.loads(line)["output_ids"] for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert written["chain"] == written["dynamic"]  # temperature 0: the target's own text

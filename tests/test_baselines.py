"""Drafts without training: lossless through the whole loop, exact where the answer is known."""

import json
import random
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare

from experiments.cli import main
from specbench.blocks import Context
from specbench.decoding.loop import Limits, decode, speculative_decode
from specbench.decoding.sampling import Sampler, Sampling, warp
from specbench.drafts.baselines import BASELINES, NGram, Small, Suffix, baseline, lookup, pinned, short_name, small
from specbench.drafts.suffix_automaton import ROOT, SuffixAutomaton
from specbench.library.evaluation import evaluate
from specbench.models.target import Target, save
from specbench.runs.run_folder import read_lines, read_summary
from tests import tiny

PROMPTS = [[5, 6, 7, 5, 6], [8, 9], [3, 4, 5, 6, 7, 8, 9, 10]]


def nearly(owner: Target, noise: float) -> Target:
    """A model that is close to `owner`: some of its proposals are accepted and some are not."""
    made = Target.from_config(tiny.QWEN3, [], seed=3, stop_token_ids=[])
    generator = torch.Generator().manual_seed(0)
    for parameter in made.model.parameters():
        parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return made


def chosen(name: str, owner: Target, block_size: int):
    return (
        Small(nearly(owner, 0.01), tiny.VOCABULARY, block_size)
        if name == "small"
        else baseline(name, owner, block_size)
    )


def run(name, sampling, batch_size=1, prompts=PROMPTS, new=12, block_size=4):
    owner = tiny.target("qwen3")
    limits = Limits(max_new_tokens=new, batch_size=batch_size)
    own = {d.index: d.output_ids for d in decode(owner, prompts, sampling, limits)}
    draft = chosen(name, owner, block_size)
    return own, {d.index: d for d in speculative_decode(owner, draft, prompts, sampling, limits)}


@pytest.mark.parametrize("name", [*BASELINES, "small"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_greedy_text_is_the_targets_own(name, batch_size):
    own, done = run(name, Sampling(), batch_size)
    assert {i: d.output_ids for i, d in done.items()} == own


def test_the_oracle_has_every_slot_accepted():
    _, done = run("oracle", Sampling(), batch_size=2)
    assert all(r.accepted == r.proposed == 4 for d in done.values() for r in d.rounds)


def test_lookup_proposes_what_followed():
    assert lookup([1, 2, 3, 4, 1, 2, 5, 1, 2], 2, longest=2) == [5, 1]  # the latest of two matches
    assert lookup([1, 2, 3, 4, 9, 2, 5, 1, 2], 2, longest=2) == [3, 4]  # the longer suffix before the later one
    assert lookup([1, 2, 3], 2, longest=3) == [3, 3]
    assert lookup([4], 1, longest=3) == [4]


def test_a_repeating_target_makes_lookup_accept():
    state = NGram(3).begin(_context(4), torch.tensor([[1, 2, 3, 1]]))
    proposal = NGram(3).propose(state, torch.tensor([2]), lambda logits: (logits.argmax(-1), None))
    assert proposal.tokens.tolist() == [[3, 1, 2]] and proposal.probabilities is None


@pytest.mark.parametrize("name", [*BASELINES, "small"])
def test_sampled_text_has_the_targets_distribution(name):
    """Chi-square on the second token, which a round decides: 400 draws, false alarm 1e-4, four merged classes."""
    owner, sampling = tiny.target("qwen3"), Sampling(1.0, top_k=4)
    prompts, limits = [[5, 6, 7, 5, 6]] * 400, Limits(max_new_tokens=2, batch_size=400)
    first = {d.index: d for d in speculative_decode(owner, chosen(name, owner, 2), prompts, sampling, limits)}
    pairs = [tuple(d.output_ids[:2]) for d in first.values()]
    head = max(set(p[0] for p in pairs), key=[p[0] for p in pairs].count)
    tokens = torch.tensor([[*prompts[0], head]])
    states = owner.states(tokens, torch.tensor([6]))
    distribution = warp(owner.logits(states.last[:, -1]), sampling)[0]
    seen = torch.bincount(torch.tensor([b for a, b in pairs if a == head]), minlength=len(distribution))
    support = distribution > 0
    assert int(seen[~support].sum()) == 0 and int(support.sum()) == 4
    expected = distribution[support].double() / distribution[support].double().sum() * int(seen.sum())
    assert chisquare(seen[support].numpy(), expected.numpy()).pvalue > 1e-4


def continued(texts: list[list[int]], text: list[int], token: int, count: int):
    """What `SuffixAutomaton.follow` gives, by looking at every place of every suffix in every text."""
    own, tokens, shares = [*text, token], [], []
    for _ in range(count):
        following: dict[int, int] = {}
        for size in range(len(own), 0, -1):
            for known in texts:
                for i in range(len(known) - size):
                    if known[i : i + size] == own[-size:]:
                        following[known[i + size]] = following.get(known[i + size], 0) + 1
            if following:
                break
        best = min(following, key=lambda t: (-following[t], t)) if following else (tokens or [token])[-1]
        tokens.append(best)
        shares.append(following[best] / sum(following.values()) if following else 0.0)
        own = [*own, best] if following else own
    return tokens, shares


def test_a_suffix_automaton_says_what_a_search_of_all_texts_says():
    """Texts of three tokens that grow in turns, so that suffixes of all lengths occur in several of them."""
    draw = random.Random(0)
    for _ in range(60):
        automaton, texts = SuffixAutomaton(), [[] for _ in range(draw.randint(1, 3))]
        last = [ROOT] * len(texts)
        for _ in range(draw.randint(1, 20)):
            i, new = draw.randrange(len(texts)), [draw.randrange(3) for _ in range(draw.randint(1, 4))]
            last[i], texts[i] = automaton.extend(last[i], new), texts[i] + new
            token = draw.randrange(4)
            assert automaton.follow(last[i], token, 4) == continued(texts, texts[i], token, 4)


def draws_nothing(logits):
    raise AssertionError("a deterministic draft has no logits to draw from")


def test_suffix_decoding_reads_its_own_text_or_that_of_all_requests():
    for shared, found in ((False, [5, 5, 5]), (True, [6, 7, 8])):
        draft = Suffix(3, shared=shared)
        draft.begin(_context(4), torch.tensor([[5, 6, 7, 8]]))
        state = draft.begin(_context(4), torch.tensor([[1, 2, 3, 4]]))
        proposal = draft.propose(state, torch.tensor([5]), draws_nothing)
        assert proposal.tokens.tolist() == [found] and proposal.probabilities is None
        sure = torch.sigmoid(proposal.confidence)[0]
        assert (sure > 0.999).all() if shared else (sure < 0.001).all()


def test_a_threshold_shortens_what_has_seldom_followed():
    """After 1 came 2 twice and 3 once, and 9 after both 1 2: shares of 2/3 and 1. Nothing has followed 7 1."""
    state = Suffix(2).begin(_context(9), torch.tensor([[1, 2, 9, 1, 3, 1, 2, 9, 7]]))
    proposal = Suffix(2).propose(state, torch.tensor([1]), draws_nothing)
    assert proposal.tokens.tolist() == [[2, 9]]
    torch.testing.assert_close(torch.sigmoid(proposal.confidence), torch.tensor([[2 / 3, 1 - 1e-4]]))


def test_acceptance_on_texts_that_a_draft_has_read_is_refused():
    with pytest.raises(ValueError, match=r"teacher_forced=True with suffix.*draft=suffix"):
        evaluate(tiny.target("qwen3"), Suffix(3, shared=True), teacher_forced=True)


def test_unknown_baselines_are_refused():
    with pytest.raises(ValueError, match="ngram, suffix, suffix_all, oracle"):
        baseline("nothing", tiny.target("qwen3"))


@torch.inference_mode()
def greedy(model: Target, text: list[int], count: int) -> list[int]:
    """The model's own continuation from whole forward passes, without a cache."""
    text = list(text)
    for _ in range(count):
        last = model.states(torch.tensor([text]), torch.tensor([len(text)])).last[:, -1]
        text.append(int(model.logits(last).argmax()))
    return text[-count:]


@torch.inference_mode()
def test_a_small_model_proposes_its_own_continuation_whatever_was_accepted():
    """Rows of different lengths, that keep none, some and all of their proposals, shorter proposals in between."""
    owner = tiny.target("qwen3")
    model, K = nearly(owner, 0.01), 3
    draft, texts = Small(model, tiny.VOCABULARY, K), [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    lengths = torch.tensor([len(t) for t in texts])
    rows = torch.tensor([t + [0] * (4 - len(t)) for t in texts])
    state = draft.begin(Context(torch.zeros(3, 4, 0, 1), torch.zeros(3, 4, 1), lengths), rows)
    anchor, sampler = torch.tensor([20, 21, 22]), Sampler(Sampling(), [0, 1, 2])
    for kept, slots in (((0, 1, 3), None), ((3, 0, 2), None), ((1, 2, 0), 2), ((3, 3, 3), None), ((2, 0, 1), None)):
        count = slots or K
        proposal = draft.propose(state, anchor, sampler, slots)
        want = [greedy(model, [*t, int(a)], count) for t, a in zip(texts, anchor, strict=True)]
        assert proposal.tokens.tolist() == want and proposal.probabilities is None
        block = torch.cat([anchor[:, None], proposal.tokens], 1)
        counts = torch.tensor(kept) + 1
        width = int(counts.max())
        context = Context(torch.zeros(3, width, 0, 1), torch.zeros(3, width, 1), counts)
        state = draft.commit(state, context, block[:, :width])
        texts = [t + block[b, : counts[b]].tolist() for b, t in enumerate(texts)]
        anchor = anchor + 7


def test_the_distributions_of_a_small_model_are_its_own():
    """Drawn at temperature 0.7 with top-k: the probabilities are those of a whole forward pass over what it drew."""
    owner, sampling = tiny.target("qwen3"), Sampling(0.7, top_k=5)
    model, text = nearly(owner, 0.01), [5, 6, 7]
    draft = Small(model, tiny.VOCABULARY, 4)
    state = draft.begin(_context(3), torch.tensor([text]))
    proposal = draft.propose(state, torch.tensor([9]), Sampler(sampling, [3]))
    whole = torch.tensor([[*text, 9, *proposal.tokens[0, :-1].tolist()]])
    states = model.states(whole, torch.tensor([whole.shape[1]]))
    assert torch.allclose(proposal.probabilities, warp(model.logits(states.last[:, 3:]), sampling), atol=1e-5)


def test_a_table_padded_to_another_size_is_the_same_vocabulary():
    owner = tiny.target("qwen3")
    for size in (tiny.VOCABULARY - 8, tiny.VOCABULARY + 8):
        model = Target.from_config({**tiny.QWEN3, "vocab_size": size}, [], seed=4)
        limits, sampling = Limits(max_new_tokens=6), Sampling(1.0)
        draft = Small(model, tiny.VOCABULARY, 3)
        done = list(speculative_decode(owner, draft, [[5, 94, 95]], sampling, limits))  # beyond the smaller table
        assert len(done[0].output_ids) == 6


def test_another_vocabulary_is_refused(tmp_path):
    owner = tiny.target("qwen3")
    save(Target.from_config({**tiny.QWEN3, "vocab_size": 64}, []).model, None, tmp_path / "other")
    with pytest.raises(ValueError, match=r"has 64 tokens and target tiny_qwen3 has 96.*target's own tokenizer"):
        small(tmp_path / "other", owner)
    embedded = Path(__file__).parents[1] / "specbench" / "data" / "embedded"
    target = Target.load(embedded, [])
    renamed = tmp_path / "renamed"
    save(target.model, None, renamed)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (renamed / file).write_text((embedded / file).read_text())
    assert small(renamed, target).weights_hash == target.weights_hash
    words = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    a, b = (next(k for k, v in vocabulary.items() if v == i) for i in (40, 41))
    vocabulary[a], vocabulary[b] = 41, 40
    (renamed / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match=r"2 of its \d+ tokens differ \(token 40 is"):
        small(renamed, target)


def test_every_baseline_from_the_command_line(tmp_path, capsys):
    prompts = tmp_path / "asked.jsonl"
    prompts.write_text("".join(json.dumps({"id": str(i), "prompt_ids": ids}) + "\n" for i, ids in enumerate(PROMPTS)))
    save(tiny.target("qwen3").model, None, tmp_path / "twin")
    common = [f"root={tmp_path}", "target=tiny_qwen3", f"prompts={prompts}", "tracking=disabled", "max_new_tokens=9"]
    found = {}
    for draft in ("plain", *BASELINES, f"small:{tmp_path}/twin"):
        name = draft.partition(":")[0]
        slots = [] if name == "plain" else ["slots=3"]  # plain decoding proposes nothing
        assert main(["evaluate", *common, f"draft={draft}", f"name={name}", *slots]) == 0, capsys.readouterr().err
        folder = tmp_path / "runs" / "evaluate" / name
        lines = {line["prompt_id"]: line for line in read_lines(folder / "rounds.jsonl")}
        found[name] = read_summary(folder), lines
    plain = {key: line["output_ids"] for key, line in found["plain"][1].items()}
    assert len(plain) == len(PROMPTS) and all(len(ids) == 9 for ids in plain.values())
    for name, (summary, lines) in found.items():
        assert {key: line["output_ids"] for key, line in lines.items()} == plain
        proposed = {m for line in lines.values() for m in line["proposed"]}
        assert proposed == (set() if name == "plain" else {3}), name
        if name in ("oracle", "small"):
            assert summary["metrics"]["accepted_length"]["value"] == 4.0
    assert found["small"][0]["method"] == "small-twin"
    assert found["small"][0]["lineage"]["draft"] == found["small"][0]["lineage"]["target"]
    assert found["small"][0]["draft_parameters"] == sum(p.numel() for p in tiny.target("qwen3").model.parameters())


def test_a_baseline_is_timed_like_a_draft(tmp_path, capsys):
    prompts = tmp_path / "asked.jsonl"
    prompts.write_text("".join(json.dumps({"id": str(i), "prompt_ids": [5, 6, 7 + i]}) + "\n" for i in range(4)))
    common = [f"root={tmp_path}", "target=tiny_qwen3", f"prompts={prompts}", "repeats=1", "warmup=0", "step_tokens=6"]
    common += ["batch_sizes=[1]", "lengths=[1]", "clock_prompts=2", "clock_repeats=1", "max_new_tokens=9", "check=[]"]
    common += ["stop_token_ids=[]", "clock_library=true"]
    assert main(["speed", *common, "draft=oracle", "slots=3"]) == 0, capsys.readouterr().err
    summary = read_summary(tmp_path / "runs" / "speed" / "oracle-tiny_qwen3-s0")
    metrics = summary["metrics"]
    assert summary["method"] == "oracle" and metrics["accepted_length"] == 4.0
    assert metrics["loop_plain"] == pytest.approx(
        metrics["plain_tokens_per_second"] / metrics["library_tokens_per_second"]
    )
    assert main(["speed", *common, "draft=plain"]) == 2
    assert "draft=plain is what every draft is timed against" in capsys.readouterr().err
    assert main(["speed", *common, "draft=oracle", "batch_size=2", "name=two"]) == 2
    assert "clock_library=true with batch_size=2" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "speed" / "two").exists()


def test_a_revision_stands_behind_an_at_unless_a_folder_is_called_so(tmp_path):
    assert pinned("Qwen/Qwen3-0.6B@c1899de") == ("Qwen/Qwen3-0.6B", "c1899de")
    assert pinned("Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B", None)
    folder = tmp_path / "model@home"
    folder.mkdir()
    assert pinned(str(folder)) == (str(folder), None)
    assert [short_name(n) for n in ("Qwen/Qwen3-0.6B@refs/pr/5", "Qwen/Qwen3-0.6B", str(folder))] == [
        "Qwen3-0.6B-refs-pr-5",
        "Qwen3-0.6B",
        "model@home",
    ]


def _context(length):
    return Context(torch.zeros(1, length, 0, 2), torch.zeros(1, length, 2), torch.tensor([length]))

"""The switch between fast and plain computations: what it switches, and that both give the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import cli
from specbench import fast
from specbench.blocks import with_anchors
from specbench.data.loading.buffers import SMALL, Recycler
from specbench.decoding.loop import Limits, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.losses import fused, reference
from specbench.losses.objective import Objective
from specbench.models.fast.folded_layers import Folded, Plain
from tests import tiny

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_switch_goes_back_whatever_happens_inside() -> None:
    with pytest.raises(RuntimeError, match="stop"), fast.plain():
        assert not fast.enabled()
        with fast.plain():
            pass
        assert not fast.enabled()
        raise RuntimeError("stop")
    assert fast.enabled()


def test_contexts_of_several_threads_can_end_in_any_order() -> None:
    first, second = fast.plain(), fast.plain()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not fast.enabled()
    second.__exit__(None, None, None)
    assert fast.enabled()


def test_one_switch_turns_off_every_fast_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for module in (fused, reference):
        known = module.slot_losses
        monkeypatch.setattr(
            module,
            "slot_losses",
            lambda *given, name=module.__name__, known=known: (calls.append(name), known(*given))[1],
        )
    draft, target = tiny.draft("dspark", "qwen3"), tiny.target("qwen3")
    batch = with_anchors(tiny.batch("qwen3"), 3)

    def seen() -> tuple:
        calls.clear()
        blocks = draft(batch)
        Objective(ce=1.0)(draft, target.tables, blocks)
        recycler = Recycler()
        one = recycler.zeros(torch.empty(0), (SMALL,))
        state, _ = target.prefill(batch.tokens, (batch.document >= 0).sum(-1))
        draft.stack.renew()
        kinds = type(draft.stack._steps), target.decodes_directly, blocks.lookups is not None, bool(recycler._stores)
        del one, state
        return *calls, *kinds

    assert seen() == ("specbench.losses.fused", Folded, True, True, True)
    with fast.plain():
        assert seen() == ("specbench.losses.reference", Plain, False, False, False)


@pytest.mark.parametrize("method", ["dspark", "eagle3"])
def test_text_and_training_step_are_the_same(method: str) -> None:
    draft, target = tiny.draft(method, "qwen3").train(), tiny.target("qwen3")
    batch = with_anchors(tiny.batch("qwen3"), None if draft.anchors_per_sample is None else 3)
    objective = Objective(ce=0.1, tv=0.9, slot_weight={"exp": 4.0})

    def everything() -> tuple:
        prompts = [row[:9].tolist() for row in batch.tokens]
        done = speculative_decode(target, draft, prompts, Sampling(), Limits(12, batch_size=2))
        text = {one.index: (one.output_ids, [r.accepted for r in one.rounds]) for one in done}
        draft.zero_grad()
        loss = objective(draft, target.tables, draft(batch))
        loss.mean.backward()
        return (
            text,
            loss.mean.detach(),
            {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None},
        )

    quick = everything()
    with fast.plain():
        plain = everything()
    assert quick[0] == plain[0]
    torch.testing.assert_close(quick[1:], plain[1:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("value", [True, False])
def test_the_command_line_switches(value: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    verb = SimpleNamespace(run=lambda cfg: seen.append(fast.enabled()))
    monkeypatch.setattr(cli, "load", lambda found: verb)
    assert cli.main(["evaluate", "draft=ngram", f"fast={str(value).lower()}"]) == 0
    assert seen == [value]


@pytest.mark.long
def test_recorded_cases_and_contract_hold_for_plain_computations() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--plain"]
    command += ["-k", "golden or qwen3"]  # of the contract one family
    files = ["tests/test_golden.py", "tests/test_contract.py"]
    ran = subprocess.run([*command, *files], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:]

"""The counters of a running engine beside those of an evaluation."""

from __future__ import annotations

import pytest

from specbench.data.answers.engines import AnswerPolicy
from specbench.evaluation.engine_counters import EngineComparison, EngineCounters, compare, of_rounds, parsed
from tests.data.chat_server import STOP, ChatServer

PAGE = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a"} 300.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a"} 17.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="a"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="a"} 2.219e+03
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="a"} 136.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a",position="1"} 51.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a",position="0"} 80.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="a",position="0"} 5.0
"""


def test_a_page_of_metrics_is_summed_over_engines() -> None:
    found = parsed(PAGE)
    assert (found.verifications, found.proposed, found.accepted, found.by_position) == (317, 2219, 136, (85, 51))
    assert found.accepted_length == pytest.approx(1 + 136 / 317)
    with pytest.raises(ValueError, match="num_accepted_tokens_total: start vLLM with --speculative-config"):
        parsed("\n".join(line for line in PAGE.splitlines() if "accepted" not in line))


def test_our_rounds_give_the_same_counts() -> None:
    lines = [{"proposed": [3, 3, 1], "accepted": [0, 3, 1]}, {"proposed": [3], "accepted": [2]}]
    found = of_rounds(lines)
    assert (found.verifications, found.proposed, found.accepted, found.by_position) == (4, 10, 6, (3, 2, 1))


class Counting(ChatServer):
    """A server that counts one verification with two of three tokens accepted for each completion."""

    def page(self) -> str:
        n = len(self.completions) + 5  # what ran before is not ours
        counts = {"drafts": n, "draft_tokens": 3 * n, "accepted_tokens": 2 * n}
        lines = [f'vllm:spec_decode_num_{name}_total{{engine="0"}} {count}.0' for name, count in counts.items()]
        per = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        return "\n".join([*lines, *(f'{per}{{position="{k}"}} {float(n * (k < 2))}' for k in range(3))])


def test_an_engine_is_asked_the_same_prompts() -> None:
    said = {(5, 6): "ab", (7,): "c"}
    lines = [
        {
            "prompt_id": "p",
            "turn": 0,
            "prompt_ids": [5, 6],
            "output_ids": [*b"ab", STOP],
            "proposed": [3],
            "accepted": [2],
        },
        {"prompt_id": "q", "turn": 0, "prompt_ids": [7], "output_ids": [*b"x", STOP], "proposed": [1], "accepted": [1]},
    ]
    policy = AnswerPolicy("tiny", temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=9)
    with Counting() as server:
        server.completes = lambda ids: said[tuple(ids)]
        found = compare(server.url, lines, policy, [STOP])
    assert (found.texts, found.equal) == (2, 1)
    there = found.there
    assert (there.verifications, there.proposed, there.accepted, there.by_position) == (2, 6, 4, (2, 2, 0))
    assert {tuple(body["prompt"]) for body in server.completions} == set(said)
    body = server.completions[0]
    assert (body["temperature"], body["top_k"], body["max_tokens"], body["stop_token_ids"]) == (0.0, -1, 9, [STOP])
    table = "\n".join(found.table())
    assert "equal texts: 1 of 2" in table and "1 texts differ" in table and "3.0000" in table


@pytest.mark.parametrize(
    ("accepted", "proposed", "said"),
    [(102, 1805, "behind the limit of new tokens"), (106, 1805, "something else"), (100, 1805, "something else")],
)
def test_tokens_behind_the_limit_are_no_other_draft(accepted: int, proposed: int, said: str) -> None:
    """The engine proposes a whole block in the last round of a text; here it is cut to what is still allowed."""
    here, there = EngineCounters(361, 1801, 101, (67,)), EngineCounters(361, proposed, accepted, (67,))
    assert said in EngineComparison(here, there, texts=12, equal=12).differences(greedy=True)[0]

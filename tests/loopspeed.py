"""Tokens a processor second of the decoding loop on the golden tiny targets, in turns with the library's generation.

    python -m tests.loopspeed

One thread, one request at a time, every recorded run of a case (thresholds and stop tokens included) against plain
generation of as many tokens from the same prompts. Decoded texts are held against the recorded ones on the way.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

from specbench.checkpoints.draft_folder import load_draft
from specbench.decoding.loop import Limits, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.decoding.scheduling import FixedLength, StaticThreshold
from specbench.models.target import Target

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
CASES = ("qwen3_dspark_vanilla", "qwen3_dspark_rnn", "qwen3_dflash", "qwen3_eagle3")
REPEATS = 3


def main() -> None:
    """Print one line a case: medians over the repeats, and the median of the repeats' own ratios."""
    torch.set_num_threads(1)
    for case in CASES:
        draft = load_draft(GOLDEN / case / "draft")
        target = Target.load(GOLDEN / "targets" / "qwen3_tiny", draft.target_layer_ids)
        runs = json.loads((GOLDEN / case / "decode.json").read_text())["runs"]
        passes = [one_pass(target, draft, runs) for _ in range(REPEATS + 1)][1:]  # the first one warms up
        ours, library = (statistics.median(found[side] for found in passes) for side in (0, 1))
        ratio = statistics.median(mine / theirs for mine, theirs in passes)
        print(f"{case}: {ours:.0f} tokens a processor second, library {library:.0f}, ratio {ratio:.2f}", flush=True)


def one_pass(target: Target, draft, runs: list[dict]) -> tuple[float, float]:
    """Tokens a processor second of the loop and of the library's generation, run by run in turns."""
    tokens, seconds = 0, [0.0, 0.0]
    for run in runs:
        stops, threshold = tuple(run["stop_token_ids"] or ()), run["confidence_threshold"]
        limits = Limits(run["max_new_tokens"], stops, accounting="deepspec")
        scheduler = StaticThreshold(threshold) if threshold else FixedLength()
        began = time.process_time()
        (done,) = speculative_decode(target, draft, [run["prompt_ids"]], Sampling(), limits, scheduler=scheduler)
        between = time.process_time()
        target.generate(run["prompt_ids"], len(done.output_ids))
        seconds[0] += between - began
        seconds[1] += time.process_time() - between
        assert run["prompt_ids"] + done.output_ids == run["output_ids"], "the text is not the recorded one"
        tokens += len(done.output_ids)
    return tokens / seconds[0], tokens / seconds[1]


if __name__ == "__main__":
    main()

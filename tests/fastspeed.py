"""What each fast computation buys: the same work with one of them replaced by its plain form.

    python -m tests.fastspeed step      # a training step of DSpark at a vocabulary of 151,936, one process a variant
    python -m tests.fastspeed decode    # a draft and a target with and without their faster passes, in turns
    python -m tests.fastspeed target FOLDER [bfloat16] # passes over 1 to 8 tokens, by the library and by our layers
    python -m tests.fastspeed shapes    # steps of random targets of several depths and widths, and proposals of drafts
    python -m tests.fastspeed collate   # a batch in used memory and in fresh memory, in turns

Processor seconds on one thread, which a busy machine changes least, and the highest memory above the resident model.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from specbench import fast
from specbench.blocks import Sample, pack
from specbench.checkpoints.draft_folder import load_draft
from specbench.data.loading.buffers import Recycler
from specbench.decoding.loop import Limits, decode, speculative_decode
from specbench.decoding.sampling import Sampler, Sampling
from specbench.drafts import dspark
from specbench.drafts.dflash import DFlash
from specbench.drafts.eagle3 import Eagle3
from specbench.drafts.parallel import ParallelDraft
from specbench.losses import objective
from specbench.models.fast import projection
from specbench.models.target import Target
from specbench.profiling import step_measurement, training_speed
from tests import families

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
PRE_NORM = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "granite")


# Layers, width and width of the feed-forward part.
SHAPES = ((6, 128, 384), (16, 128, 384), (24, 96, 288), (24, 128, 384), (24, 160, 480), (32, 128, 256))


def without_linears() -> None:
    projection.Linears.__torch_function__ = lambda self, func, types, args=(), kwargs=None: func(
        *args, **(kwargs or {})
    )


def without_kept_products() -> None:
    projection.Linears.product = lambda self, x, weight: F.linear(x, weight)


def without_returned_memory() -> None:
    dspark.return_memory = lambda gradient: None


def without_early_lookup() -> None:
    dspark.DSpark.forward = ParallelDraft.forward


def without_shared_lookups() -> None:
    without_early_lookup()
    objective.SharedLookups = nullcontext


STEPS: dict[str, Callable[[], None]] = {
    "all of them": lambda: None,
    "autograd's linear layers": without_linears,
    "fresh memory for products": without_kept_products,
    "freed memory kept": without_returned_memory,
    "and no early lookup": without_early_lookup,
    "and a lookup for each reader": without_shared_lookups,
}


def step(name: str) -> tuple[float, int]:
    """Processor seconds of a step (median of two), and bytes of memory above the model."""
    STEPS[name]()
    made = []

    def build() -> Callable[[], object]:
        made.append(training_speed.whole_step(training_speed.SMALL["dspark"]))
        return made[0]

    before, peak = step_measurement._memory(build, 1)
    return statistics.median(_processor_seconds(made[0]) for _ in range(2)), peak - before


def collation() -> dict[str, float]:
    """Processor milliseconds to collate two conversations of 2,400 tokens and six states of 2,560 features, in bf16."""
    samples = []
    for length in (1500, 900):
        states, text = torch.randn(length, 6, 2560).bfloat16(), torch.ones(length, dtype=torch.long)
        samples.append(Sample(text, text.bool(), states[:, :-1], states[:, -1], len(samples)))
    variants = {"recycled memory": Recycler().zeros, "fresh memory": torch.Tensor.new_zeros}
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(12):
        for name, zeros in variants.items():
            began = time.process_time()
            batch = pack(samples, None, zeros)
            if turn > 1:
                taken[name].append(1e3 * (time.process_time() - began))
            del batch
    return {name: statistics.median(found) for name, found in taken.items()}


def decoding() -> Iterator[tuple[str, dict[str, float]]]:
    """Processor milliseconds a token, by which passes are used: medians of three after a warm-up."""
    case = "qwen3_dspark_vanilla"
    runs = json.loads((GOLDEN / case / "decode.json").read_text())["runs"][:3]
    prompts = [run["prompt_ids"] for run in runs]
    pairs = {}
    for name in ("both fast", "draft by its modules", "target by the library", "both plain"):
        draft = load_draft(GOLDEN / case / "draft")
        target = Target.load(GOLDEN / "targets" / "qwen3_tiny", draft.target_layer_ids)
        if name == "draft by its modules":
            draft.stack.renew = lambda: None
        if name == "target by the library":
            target.direct = None
        pairs[name] = target, draft
    limits = Limits(24)
    yield (
        case,
        _in_turns(
            {
                name: (name != "both plain", partial(speculative_decode, *pair, prompts, Sampling(), limits))
                for name, pair in pairs.items()
            }
        ),
    )
    for family in PRE_NORM:
        config = families.config(family) | {"num_hidden_layers": 4}
        target = Target.from_config(config, [0], seed=3, stop_token_ids=[])
        work = partial(decode, target, [list(range(2, 20))], Sampling(), Limits(32))
        yield f"{family}, plain decoding", _in_turns({"direct": (True, work), "library": (False, work)})


@torch.inference_mode()
def verification(
    folder: str, dtype: str = "float32", context: int = 200, repeats: int = 5
) -> Iterator[tuple[int, dict[str, float]]]:
    """Processor milliseconds (medians of `repeats`) in which a target reads 1, 2, 4 and 8 tokens behind a context and
    gives their logits: transformers over its own cache, and `extend` here; and the vocabulary head alone."""
    from transformers import DynamicCache

    target, own = Target.load(folder, [], dtype=dtype), DynamicCache()
    tokens = torch.randint(1000, (1, context), generator=torch.Generator().manual_seed(0))
    state, _ = target.prefill(tokens, torch.tensor([context]))
    target.model(input_ids=tokens, past_key_values=own, use_cache=True)

    def library(block: torch.Tensor) -> None:
        target.model(input_ids=block, past_key_values=own, use_cache=True)
        own.crop(-block.shape[1])

    for size in (1, 2, 4, 8):
        block, last = tokens[:, :size], torch.randn(1, size, target.tables.embedding.shape[1]).to(target.dtype)
        ways = {
            "library": partial(library, block),
            "extend and logits": lambda block=block: target.logits(target.extend(state, block).last),
            "logits": lambda last=last: target.logits(last),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats + 1):
            for name, work in ways.items():
                taken[name].append(1e3 * _processor_seconds(work))
        yield size, {name: statistics.median(found[1:]) for name, found in taken.items()}


@torch.inference_mode()
def step_and_proposals(
    layers: int, width: int, feed_forward: int, repeats: int = 15, context: int = 120
) -> dict[str, float]:
    """Processor milliseconds (medians of `repeats`) of random Qwen3 targets: reading 1, 4 and 8 tokens, and the
    proposals of four slots by drafts of one layer."""
    config = families.config("qwen3") | {"vocab_size": 1024, "hidden_size": width, "num_hidden_layers": layers}
    config |= {"intermediate_size": feed_forward, "num_attention_heads": width // 32, "head_dim": 32}
    config |= {"num_key_value_heads": 2 if width == 128 else width // 32, "tie_word_embeddings": True}
    target = Target.from_config(config, sorted({0, layers // 2, layers - 3}), seed=3, stop_token_ids=[])
    tokens = torch.randint(4, 1024, (1, context), generator=torch.Generator().manual_seed(0))
    state, seen = target.prefill(tokens, torch.tensor([context]))

    def median(work: Callable[[], object]) -> float:
        return 1e3 * statistics.median([_processor_seconds(work) for _ in range(repeats + 2)][2:])

    found = {
        f"{size} tokens": median(lambda size=size: target.logits(target.extend(state, tokens[:, :size]).last))
        for size in (1, 4, 8)
    }
    for kind in (dspark.DSpark, DFlash, Eagle3):
        draft = kind.for_target(target, layers=1, block_size=4, start="random", mask_token_id=3).eval()
        begun, sampler = draft.begin(seen, tokens), Sampler(Sampling(), range(1))
        found[kind.__name__] = median(lambda d=draft, s=begun, draw=sampler: d.propose(s, tokens[:, 0], draw, 4))
    return found


def _in_turns(variants: dict[str, tuple[bool, Callable[[], Iterator]]]) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(4):
        for name, (quick, work) in variants.items():
            began, tokens = time.process_time(), 0
            with fast.switched(quick):
                tokens = sum(len(done.output_ids) for done in work())
            if turn:
                taken[name].append(1e3 * (time.process_time() - began) / tokens)
    return {name: statistics.median(found) for name, found in taken.items()}


def _processor_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main(what: str, *folder: str) -> None:
    torch.set_num_threads(1)
    if what == "step":
        for name in STEPS:
            seconds, memory = step_measurement.fresh(partial(step, name))
            print(f"{name}: {seconds:.2f} s, {memory / 1e6:.0f} MB", flush=True)
    elif what == "target":
        for size, found in verification(*folder):
            print(f"{size} tokens", {name: f"{value:.1f} ms" for name, value in found.items()}, flush=True)
    elif what == "shapes":
        for shape in SHAPES:
            print(shape, {name: f"{value:.2f} ms" for name, value in step_and_proposals(*shape).items()}, flush=True)
    elif what == "collate":
        print({name: f"{value:.1f} ms" for name, value in collation().items()}, flush=True)
    else:
        for case, found in decoding():
            print(case, {name: f"{value:.2f} ms" for name, value in found.items()}, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

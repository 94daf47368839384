"""Settings that do not decide a result. The list has two readers, who ask different questions.

The command line asks whether a folder holds **the same run** before it skips, continues or refuses it: everything
decides but `without_effect(VERB)`, which says where a result goes, how it is shown and how the work is spread out.

A comparison asks which runs are repetitions of **the same configuration**, one row of a table: `compared(KIND, KEY)`.
That leaves out the same settings and more: seeds, because a row is taken over them; what the records or the lineage
state themselves; what adds columns to the records; and how the same steps are computed (compiled, sharded, how often
validated), which moves a number by rounding alone. The command line does not take such runs for each other.

All are dotted keys of a configuration; a key stands for everything below it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from specbench.runs.run_schema import TIMED

# Where something goes, how it is shown and by how many hands it is done.
ANYWHERE = (
    *(
        "root",
        "force",
        "name",
        "folder",
        "plan",
        "memory",
        "yes",
        "study",
        "docs",
        "methods",
        "check",
        "check_dtype",
        "suggest",
    ),
    *("tracking", "progress", "logging", "verbose", "logger"),
    *(f"callbacks.{name}" for name in ("progress", "learning_rate_monitor", "model_checkpoint", "model_summary")),
    *("device", "devices", "target.device", "target.threads", "threads", "fast"),
    *("batch_size", "token_budget", "concurrency", "patience", "servers", "api_key", "chunk"),
    *("trainer.recipe.log_every", "trainer.data.threads"),
    *(f"trainer.{key}" for key in ("accelerator", "devices", "enable_progress_bar")),
    *(f"trainer.lightning.{key}" for key in ("accelerator", "devices", "num_nodes", "enable_progress_bar")),
)
# What else leaves the result of one verb alone.
OF_VERB = {
    # Settings of the evaluation that follows a training, and what sizes there were to choose from.
    "train": (
        *("evaluate", "temperatures", "max_new_tokens", "limit", "evaluation_seed", "suite"),
        *("trainer.evaluation", "method.sizes"),
        "export_for",  # what it set stands in the method's own settings
    ),
    # Answers are added to those that are there; whose they are is said by their header.
    "answers": ("count", "policy.model"),
    # A running engine is asked after the evaluation, which is the same with and without it.
    "evaluate": ("engine", "engine_model"),
    # Where a copy goes, which is written each time.
    "calibrate": ("draft",),
}
# A measurement of time is another one on another device, and with other numbers of threads and requests.
OF_TIMING = ("root", "force", "name", "folder", "yes", "study", "tracking", "progress", "logging", "verbose")

# What a comparison leaves out beside these.
SEEDS = ("seed", "evaluation_seed")
STATED = {
    # Benchmark, target, temperature and their like stand in the records; teacher forcing and the audit add columns.
    "evaluate": (
        *("target", "suite", "temperature", "accounting", "thinking", "teacher_forced", "audit", "audit_spacings"),
        "method.name",
    ),
    # The target's states are known by their cache; how the same steps are computed moves a number by rounding alone.
    "train": (
        *("target", "method.name", "trainer.validate_every", "trainer.recipe.compile", "trainer.lightning.strategy"),
    ),
}
# Paths of what the lineage and the records know by its content. What lies below such a key is a setting, and compared.
KNOWN_BY_CONTENT = {"evaluate": ("draft", "prompts"), "train": ("cache",)}
# These are compared although a key above them is left out.
COMPARED = ("suite.turns", "target.target_layer_ids", "target.mask_token_id")


def without_effect(verb: str) -> tuple[str, ...]:
    """The settings that leave the result of a run of `verb` alone: whatever they are, it is the same run."""
    return OF_TIMING if verb in TIMED else (*ANYWHERE, *OF_VERB.get(verb, ()))


@cache
def compared(kind: str, key: str) -> bool:
    """Whether runs of `kind` (evaluate or train) with other values of the setting `key` are other configurations."""
    if _under(key, COMPARED):
        return True
    left_out = (*without_effect(kind), *SEEDS, *STATED[kind])
    return key not in KNOWN_BY_CONTENT[kind] and not _under(key, left_out)


def _under(key: str, settings: Iterable[str]) -> bool:
    return any(key == setting or key.startswith(f"{setting}.") for setting in settings)

"""What a target cache is built from: a target and answers as tokens; its identity, its plan and its build follow."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from specbench.data.answers.chat import Encoded
from specbench.data.answers.generation import all_encoded, answers_file
from specbench.data.answers.kept_states import KeptStates
from specbench.data.cache.build import OnProgress, build
from specbench.data.cache.manifest import Manifest, fingerprint, identity_of, sha256
from specbench.data.cache.plan import CachePlan, plan
from specbench.data.cache.storage import Storage

log = logging.getLogger("specbench")


@dataclass(frozen=True)
class CacheSource:
    """Conversations of a target, how their states are stored, and the files that they came from.

    sources: file name -> SHA-256. counts: how many conversations were truncated, and how many left out. kept: states
    that the target computed while it answered; None: the build computes all.
    """

    target: Any
    conversations: list[Encoded]
    storage: Storage
    max_length: int
    sources: dict[str, str]
    counts: dict[str, int]
    kept: KeptStates | None = None

    @classmethod
    def read(
        cls,
        target: Any,
        answers: str | Path,
        storage: Storage,
        max_length: int,
        thinking: bool | None = None,
        name: str | None = None,
        left_out: Callable[[str], None] = log.warning,
        kept_states: bool = True,
    ) -> CacheSource:
        """From an answers.jsonl or its folder, encoded with the target's template and cut at `max_length` tokens.

        thinking: passed to the template. name: what the identity calls the file; None: as it is called. left_out: told
        of every conversation that cannot be encoded. kept_states: use the states beside the answers, if they are there.
        Errors: ValueError for answers that this target cannot use, and for states of another target.
        """
        file, rows = answers_file(answers), len(target.tables.embedding)
        chats, counts = all_encoded(file, target.tokenizer, max_length, thinking, rows, left_out)
        target.require([one.tokens for one in chats], names=[f"conversation {one.id!r}" for one in chats])
        kept = KeptStates(file.parent, target) if kept_states else None
        kept = kept if kept is not None and kept.there else None
        return cls(target, chats, storage, max_length, {name or file.name: sha256(file)}, counts, kept)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the content of the cache."""
        return identity_of(self.target, self.storage, self.max_length, self.conversations, self.sources)

    @property
    def fingerprint(self) -> str:
        """Short hash of the identity: the name of the cache's folder."""
        return fingerprint(self.identity)

    def plan(self, folder: str | Path) -> CachePlan:
        """Sizes, free disk space and hours of a build below `folder`, the hours from a timed sample."""
        hidden, taps = self.target.tables.embedding.shape[-1], len(self.target.target_layer_ids)
        return plan(self.conversations, Path(folder), self.storage, hidden, taps, self.target)

    def build(
        self,
        folder: str | Path,
        rank: int = 0,
        world: int = 1,
        progress: OnProgress = lambda done, total: None,
        **sizes: int,
    ) -> Manifest | None:
        """Build or complete the cache in `folder`; `sizes` are shard_bytes and batch_tokens. None while other ranks
        write. `counts` then says too of how many conversations this rank's build read or computed the states. Errors:
        as `specbench.data.cache.build.build`."""
        norm = getattr(self.target.parts.final_norm, "weight", None)
        norm = None if norm is None else norm.detach()
        known = {"sources": self.sources, "norm": norm, "kept": self.kept, "counts": self.counts, **sizes}
        return build(
            self.target, self.conversations, folder, self.storage, self.max_length, rank, world, progress, **known
        )

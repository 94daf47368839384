"""Build a target cache: run the target over the conversations, write shards and the frozen tables.

Ranks (processes) communicate only by files in the folder. Each writes the shards s with s % world == rank. A shard is
renamed into place when it is complete, so a build that was killed continues with the missing shards, with any number
of ranks, and gives the same files. The rank that finds all shards present merges their rows and writes the manifest,
last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specbench.data.answers.kept_states import KeptStates
from specbench.data.cache.agreement import Agreement, check, require
from specbench.data.cache.manifest import (
    INDEX,
    MANIFEST,
    TABLES,
    Manifest,
    fingerprint,
    identity_of,
    read_part,
    require_same,
    sha256,
    write_index,
    write_tables,
)
from specbench.data.cache.shard_plan import lay_out
from specbench.data.cache.shards import EncodedConversation, members, shard_name
from specbench.data.cache.storage import Storage
from specbench.data.cache.target_states import states_of
from specbench.data.cache.writing import create_once, room_for, written
from specbench.data.loading.order import permutation
from specbench.files.atomic import plain

FIT_TOKENS = 4096  # tokens whose states set the codecs' channel scales
OnProgress = Callable[[int, int], None]


class CacheBuilder:
    """Builds one cache folder, shard by shard. `build` calls it in a plain loop, `CachePrediction` in a Lightning loop.

    storage: which states are kept, and the codecs. max_length: maximum tokens of a conversation. sources: file name ->
    SHA-256 of the files with the conversations. shard_bytes: approximate size of a shard. batch_tokens: padded tokens
    of a forward pass. norm: weight of the final norm, stored with the tables. If a build is continued, the sizes with
    which it was started are used. kept: states that the target computed while it answered, which are not computed
    again. counts: gets how many conversations' states were read from `kept`, and how many were computed.
    """

    def __init__(
        self,
        target: Any,
        conversations: Sequence[EncodedConversation],
        folder: str | Path,
        storage: Storage,
        max_length: int,
        sources: Mapping[str, str] | None = None,
        shard_bytes: int = 1 << 30,
        batch_tokens: int = 8192,
        norm: Tensor | None = None,
        kept: KeptStates | None = None,
        counts: dict[str, int] | None = None,
    ):
        self.target, self.conversations, self.folder = target, conversations, Path(folder)
        self.storage, self.norm, self.kept = storage, norm, kept
        self.counts = {} if counts is None else counts
        self.counts |= {"states_kept": 0, "states_computed": 0}
        self.lengths = np.array([len(one.tokens) for one in conversations], np.int64)
        self._require_sound(max_length)
        self.identity = identity_of(target, storage, max_length, conversations, sources or {})
        self.fingerprint = fingerprint(self.identity)
        hidden, taps = target.tables.embedding.shape[-1], len(target.target_layer_ids)
        per_token = sum(storage.bytes_per_token(hidden, taps).values())
        sizes = {"batch_tokens": batch_tokens, "shard_tokens": max(1, round(shard_bytes / per_token))}
        self.sizes = self._agree("build.json", {"identity": plain(self.identity), "sizes": sizes})["sizes"]
        self.layout = lay_out(self.lengths, **self.sizes)

    def _require_sound(self, max_length: int) -> None:
        if not len(self.lengths):
            raise ValueError("there is no conversation to build a cache from: the answers stage has to run first")
        long = np.flatnonzero(self.lengths > max_length)
        if len(long):
            one = self.conversations[long[0]]
            raise ValueError(
                f"{len(long)} conversations are longer than max_length={max_length}, first {one.id!r} with "
                f"{len(one.tokens)} tokens: encode them with that max_length or raise it"
            )
        short = np.flatnonzero(self.lengths == 0)
        if len(short):
            raise ValueError(f"conversation {self.conversations[short[0]].id!r} holds no token")
        seen: set[str] = set()
        for one in self.conversations:
            if one.id in seen:
                raise ValueError(f"conversation id {one.id!r} appears twice: ids must be unique")
            seen.add(one.id)

    def _agree(self, name: str, wanted: dict[str, Any]) -> dict[str, Any]:
        """Write a small file unless another rank or an earlier run has written it; return its content."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        create_once(path, lambda temporary: temporary.write_text(json.dumps(wanted)))
        found = json.loads(path.read_text())
        require_same(found["identity"], wanted["identity"], self.folder, "choose another folder or remove this one")
        return found

    def _fitted(self) -> Storage:
        """Storage with channel scales; all ranks use those of the first rank that computed them."""
        if not self.storage.learns:
            return self.storage
        path = self.folder / "scales.safetensors"
        if not path.exists():
            taps, last, tokens = [], [], 0
            for ordinal in permutation(len(self.conversations), 1):
                ((of_taps, of_last),) = self._states([self.conversations[ordinal]])
                taps.append(of_taps.cpu()), last.append(of_last.cpu())
                tokens += len(taps[-1])
                if tokens >= FIT_TOKENS:
                    break
            fitted = self.storage.fitted(torch.cat(taps)[:FIT_TOKENS], torch.cat(last)[:FIT_TOKENS])
            create_once(path, lambda temporary: save_file(fitted.scales(), temporary))
        return self.storage.with_scales(load_file(path))

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """Shards of this rank that are not complete yet."""
        mine = range(rank, len(self.layout.shards), world)
        return [s for s in mine if not ((self.folder / shard_name(s)).exists() and self._part(s).exists())]

    def write(self, shard: int, progress: Callable[[int], None] = lambda tokens: None) -> None:
        """Compute and write one shard; computing and writing overlap."""
        for stale in self.folder.glob(f"{shard_name(shard)}.*.tmp"):
            stale.unlink()
        self.storage = self._fitted()
        counts: list[Agreement] = []
        rows = written(self.folder, shard, self._samples(shard, counts, progress))
        write_index(self._part(shard), rows, {"agreement": vars(sum(counts, Agreement()))})

    def _part(self, shard: int) -> Path:
        return self.folder / "parts" / f"{shard_name(shard)}.parquet"

    def _samples(
        self, shard: int, counts: list[Agreement], progress: Callable[[int], None]
    ) -> Iterator[Callable[[], dict[str, bytes]]]:
        """Each conversation of a shard as a function that encodes it, which the writer calls in its own thread."""
        for batch in self.layout.shards[shard]:
            chosen = [self.conversations[ordinal] for ordinal in batch]
            states = self._states(chosen, self.counts)
            if not counts:
                counts.append(self._check(chosen[0], *states[0]))
            for ordinal, one, (taps, last) in zip(batch, chosen, states, strict=True):
                yield lambda n=int(ordinal), c=one, t=taps, x=last: members(n, c, t, x, self.storage)
            progress(sum(len(one.tokens) for one in chosen))

    def _states(
        self, chosen: Sequence[EncodedConversation], counts: dict[str, int] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Taps (T, C, D) and final states (T, D) of each conversation; what was not kept is computed in one batch."""
        found = [None if self.kept is None else self.kept.read(one.id, one.tokens) for one in chosen]
        missing = [at for at, states in enumerate(found) if states is None]
        if counts is not None:
            counts["states_computed"] += len(missing)
            counts["states_kept"] += len(chosen) - len(missing)
        if missing:
            context = states_of(self.target, [chosen[at] for at in missing])
            for row, at in enumerate(missing):
                length = len(chosen[at].tokens)
                found[at] = context.taps[row, :length], context.last[row, :length]
        return found

    def _check(self, conversation: EncodedConversation, taps: Tensor, last: Tensor) -> Agreement:
        length = len(conversation.tokens)
        loss_mask = torch.as_tensor(conversation.loss_mask, dtype=torch.bool)
        _, encoded = self.storage.encode(taps[:length].cpu(), last[:length].cpu(), loss_mask)
        stored = self.storage.decode_last(encoded, loss_mask)
        found = check(self.target, conversation, last[:length], stored, loss_mask, self.storage)
        require(found, self.storage)
        return found

    def finish(self) -> Manifest | None:
        """Merge all shards' rows and write tables and manifest; None while other ranks still have shards to write."""
        if self.missing():
            return None
        parts = [read_part(self._part(shard)) for shard in range(len(self.layout.shards))]
        rows = [row for part, _ in parts for row in part]
        if sorted(row["sample"] for row in rows) != list(range(len(self.conversations))):
            raise ValueError(f"shards in {self.folder} do not hold every conversation once: remove it and build again")
        write_index(self.folder / INDEX, rows)
        tables = self.target.tables
        write_tables(self.folder / TABLES, tables, self.norm, self._fitted().scales())
        shards = [(shard_name(number), len(part)) for number, (part, _) in enumerate(parts)]
        manifest = Manifest(
            fingerprint=self.fingerprint,
            identity=self.identity,
            hidden_size=tables.embedding.shape[-1],
            vocabulary=tables.embedding.shape[0],
            target_config=dict(self.target.config),
            soft_cap=tables.soft_cap,
            embedding_scale=float(tables.embedding_scale),
            logit_scale=float(tables.logit_scale),
            samples=len(rows),
            tokens=sum(row["length"] for row in rows),
            supervised=sum(row["supervised"] for row in rows),
            shards=[{"name": n, "bytes": (self.folder / n).stat().st_size, "samples": count} for n, count in shards],
            index_hash=sha256(self.folder / INDEX),
            tables_hash=sha256(self.folder / TABLES),
            agreement=sum((Agreement(**notes["agreement"]) for _, notes in parts), Agreement()).rates(),
            layout=self.sizes,
        )
        manifest.write(self.folder)
        return manifest


def build(
    target: Any,
    conversations: Sequence[EncodedConversation],
    folder: str | Path,
    storage: Storage,
    max_length: int,
    rank: int = 0,
    world: int = 1,
    progress: OnProgress = lambda done, total: None,
    **options: Any,
) -> Manifest | None:
    """Build or complete the cache in `folder` and return its manifest (None if other ranks are still writing).

    `progress` is called with the tokens done and all tokens of this rank; `options` are those of CacheBuilder. A
    complete cache of the same identity is not changed. Errors: CacheMismatch for a folder of another identity, NoRoom
    on a full disk, WrongCapture if the states do not give the target's log-probabilities. KeyboardInterrupt is not
    caught; complete shards remain.
    """
    with room_for(Path(folder)):
        builder = CacheBuilder(target, conversations, folder, storage, max_length, **options)
    missing = builder.missing(rank, world)
    if not builder.missing() and (builder.folder / MANIFEST).exists():
        return Manifest.read(builder.folder)
    total = int(sum(builder.lengths[batch].sum() for shard in missing for batch in builder.layout.shards[shard]))
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total)

    with room_for(builder.folder):
        for shard in missing:
            builder.write(shard, count)
        return builder.finish()


class CachePrediction(L.LightningModule):
    """Builds in Lightning's predict loop, so that torchrun and Slurm start the ranks; then call `builder.finish()`."""

    def __init__(self, builder: CacheBuilder):
        super().__init__()
        self.builder = builder

    def predict_dataloader(self) -> list[int]:
        return self.builder.missing(self.trainer.global_rank, self.trainer.world_size)

    def predict_step(self, shard: int, index: int) -> None:
        with room_for(self.builder.folder):
            self.builder.write(shard)

"""States that the target computed while it answered, kept beside the answers, so that a cache need not compute them.

A folder `states` beside answers.jsonl:

    header.json         of which target, weights and taps the states are
    ab/abcd...          one safetensors file a conversation, named by a hash of its id: tokens (T) int32, taps
                        (T, C, D) and last (T, D) in the dtype in which the target computes

The folder only saves work. A conversation without a readable file, or with other tokens, is computed when a cache is
built; the folder can be removed as soon as the cache is there.

Axes: T tokens, C taps, D hidden size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specbench.files.atomic import changes, read_json, write_json

SCHEMA = "specbench.states/1"


def facts_of(target: Any) -> dict[str, Any]:
    """What decides the states of given tokens."""
    return {
        "schema": SCHEMA,
        "weights": target.weights_hash,
        "taps": list(target.target_layer_ids),
        "hidden_size": target.tables.embedding.shape[-1],
        "dtype": str(target.tables.embedding.dtype).removeprefix("torch."),
    }


class KeptStates:
    """The states beside the answers in a folder, of this target."""

    def __init__(self, answers: str | Path, target: Any):
        self.folder, self._target = Path(answers) / "states", target

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return facts_of(self._target)

    @property
    def there(self) -> bool:
        """Whether states were kept here. Errors: ValueError if they are those of another target, or of other taps."""
        found = read_json(self.folder / "header.json", None)
        if found is None:
            return False
        if differing := changes(found, self._facts):
            raise ValueError(
                f"{self.folder} holds states of another target or of other taps ({'; '.join(differing)}): "
                "kept_states=false computes them again, or remove that folder"
            )
        return True

    def begin(self) -> None:
        """Make the folder. Errors: ValueError if it holds states of another target, or of other taps."""
        if not self.there:
            write_json(self.folder / "header.json", self._facts)

    def keep(self, id: str, tokens: Sequence[int], states: tuple[Float[Tensor, "T C D"], Float[Tensor, "T D"]]) -> None:
        """Write the states of the tokens of one conversation, whole or not at all."""
        path = self._file(id)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        taps, last = states
        stored = {"tokens": torch.tensor(list(tokens), dtype=torch.int32), "taps": taps, "last": last}
        save_file({name: one.contiguous() for name, one in stored.items()}, temporary)
        os.replace(temporary, path)

    def read(self, id: str, tokens: Sequence[int]) -> tuple[Float[Tensor, "T C D"], Float[Tensor, "T D"]] | None:
        """The states of `tokens`, with which the kept ones may go on; None if they are not there."""
        try:
            found = load_file(self._file(id))
            kept, taps, last = found["tokens"], found["taps"], found["last"]
        except (OSError, SafetensorError, KeyError):
            return None
        count = len(tokens)
        hidden, layers = self._facts["hidden_size"], len(self._facts["taps"])
        whole = taps.shape == (len(kept), layers, hidden) and last.shape == (len(kept), hidden)
        return (taps[:count], last[:count]) if whole and kept[:count].tolist() == list(tokens) else None

    def _file(self, id: str) -> Path:
        name = hashlib.sha256(id.encode()).hexdigest()[:32]
        return self.folder / name[:2] / name

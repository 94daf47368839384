"""Reading of training checkpoints as tensors and plain containers, without running code from a pickle."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, its tensors mapped from the file until they are used.

    The restricted reader of torch builds only tensors, numbers, texts and containers of them. Errors: ValueError for a
    file that is truncated or not a checkpoint, and for one with other objects.
    """
    remedy = "take the checkpoint of another run, or train again with force=true"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects beside tensors and plain containers, which are never loaded because they can run "
            f"code: {remedy}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of torch ({_first(error)}): {remedy}") from error
    if not isinstance(found, dict) or "state_dict" not in found or "global_step" not in found:
        raise ValueError(f"{path} is not a checkpoint of a training: it lacks state_dict or global_step; {remedy}")
    return found


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

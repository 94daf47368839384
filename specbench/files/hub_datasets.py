"""Data sets of the Hugging Face Hub, from the network or the local cache; errors are one sentence with a remedy."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit


def load(*args: Any, remedy: str, label: str | None = None, **kwargs: Any) -> Any:
    """datasets.load_dataset; a ValueError that ends with `remedy` if the data cannot be loaded."""
    import datasets  # slow to import, and offline work does not need it

    try:
        with _without_network_at_once():
            return datasets.load_dataset(*args, **kwargs)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"the hub's dataset {label or args[0]!r} cannot be read ({first_line(error)}): {remedy}"
        ) from error


def file(address: str, remedy: str, label: str | None = None) -> str:
    """Path of the local copy of a file that is not on the Hub; a ValueError that ends with `remedy` without one."""
    import datasets  # slow to import, and offline work does not need it

    try:
        return str(datasets.DownloadManager().download(address))
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the data set {label or address!r} cannot be read from {address} ({first_line(error)}): {remedy}"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for one-sentence errors."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def answered(error: BaseException) -> str:
    """The message and status of the Hub if it answered; otherwise the first line of the error."""
    response, said = getattr(error, "response", None), getattr(error, "server_message", None)
    return f"{response.status_code}: {said}" if response is not None and said else first_line(error)


@contextmanager
def _without_network_at_once() -> Iterator[None]:
    """If the name of the Hub cannot be resolved, use the cache at once instead of retrying for half a minute."""
    import datasets
    from huggingface_hub import constants

    places = ((constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in places]
    offline = not _resolves(urlsplit(constants.ENDPOINT).hostname or "")
    try:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value or offline)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _resolves(host: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True

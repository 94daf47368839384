"""The W&B server and key of this environment, without a request and without the W&B client."""

from __future__ import annotations

import netrc
import os
from contextlib import suppress
from urllib.parse import urlparse

SERVER = "https://api.wandb.ai"


def server() -> str:
    """The address of the server: WANDB_BASE_URL, or W&B's own."""
    return os.environ.get("WANDB_BASE_URL", SERVER).rstrip("/")


def key() -> str | None:
    """The key for that server: WANDB_API_KEY, or that of the netrc file (NETRC, ~/.netrc); None without one."""
    if named := os.environ.get("WANDB_API_KEY"):
        return named
    with suppress(OSError, netrc.NetrcParseError):
        entry = netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(server()).hostname or "")
        return None if entry is None else entry[2]
    return None

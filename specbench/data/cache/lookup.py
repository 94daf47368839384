"""Which of the caches below a root fits a training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from specbench.data.cache.manifest import DamagedManifest, Manifest
from specbench.data.cache.storage import storage

log = logging.getLogger("specbench")


def find_cache(root: Path, target: str, taps: Sequence[int], data: str, codec: str | None = None) -> Path:
    """The one complete cache below root/cache that was built from the target and the answers `data` of these names.

    taps: layers that it must hold. codec: what it must be stored in; None takes any, and bf16 where several fit.

    Errors: ValueError naming what to run when there is none, and the candidates when there are several.
    """
    fitting, others = {}, []
    for path in sorted((root / "cache").glob("[!.]*/manifest.json")):
        try:
            identity = Manifest.read(path.parent).identity
        except DamagedManifest as error:
            log.warning("a cache is passed over: %s", error)
            continue
        wanted = set(taps) <= set(identity["taps"])
        stored = codec is None or storage(codec).facts() == identity["codec"]
        if identity["target"] == target and f"{data}/answers.jsonl" in identity["sources"] and wanted and stored:
            fitting[path.parent] = identity["codec"]
        else:
            built = f"target {identity['target']}, taps {identity['taps']}, {identity['codec']['taps']}"
            others.append(f"{path.parent.name} ({built})")
    if not fitting:
        there = f"; there are {', '.join(others)}" if others else ""
        raise ValueError(
            f"no cache below {root / 'cache'} fits target={target} data={data} with taps {list(taps)} in "
            f"{codec or 'any codec'}{there}: run `specbench cache target={target} data={data}"
            f"{f' codec={codec}' if codec else ''}`"
        )
    plain = [path for path, stored in fitting.items() if stored == storage("bf16").facts()]
    chosen = plain if len(fitting) > 1 and len(plain) == 1 else list(fitting)
    if len(chosen) > 1:
        raise ValueError(
            f"{len(chosen)} caches fit target={target} data={data}; choose one with cache=FOLDER: "
            + ", ".join(map(str, chosen))
        )
    return chosen[0]

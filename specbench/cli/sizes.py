"""Draft sizes for a trainer: `sizes` in a method's YAML, as options of the group `size`.

`sizes: {laptop: {layers: 2}}` in configs/method/dspark.yaml defines the option size=laptop_dspark, which is the default
with trainer=laptop and method=dspark. With a trainer that `sizes` does not name, and with size=published, the sizes are
those of the YAML file, which are the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

PUBLISHED = "published"


def offer_sizes(config_loader: Any, search: Sequence[str] = ()) -> None:
    """Make the options of the group `size` from every method's YAML; `search` are overrides of hydra.searchpath."""
    store = ConfigStore.instance()
    store.store(PUBLISHED, {}, group="size", package="method")
    repository = repository_of(config_loader, search)
    for name in repository.get_group_options("method", ObjectType.CONFIG):
        method = _method(repository, name, search)
        draft, sizes = method.get("draft") or {}, method.get("sizes") or {}
        changed = {key for size in sizes.values() for key in size}
        published = {key: draft.get(key) for key in sorted(changed)}
        for trainer, size in sizes.items():
            node = {"draft": dict(size), "sizes": {PUBLISHED: published}}
            store.store(f"{trainer}_{name}", node, group="size", package="method")


def repository_of(config_loader: Any, search: Sequence[str] = ()) -> Any:
    """Hydra's files. Its own accessors copy every source first, which is needed for further folders (`search`) only and
    takes half of the time of a composition."""
    if not search:
        return config_loader.repository
    _, repository = config_loader._parse_overrides_and_create_caching_repo(None, list(search))
    return repository


def _method(repository: Any, name: str, search: Sequence[str]) -> dict[str, Any]:
    """The content of a method's YAML, with that of the files that it is built on."""
    loaded = repository.load_config(f"method/{name}")
    found = loaded.config
    if any(not default.is_self() for default in loaded.defaults_list or ()):
        found = hydra.compose(f"method/{name}", list(search)).method
    return OmegaConf.to_container(found, resolve=False)


def smaller(method: DictConfig | Mapping[str, Any]) -> str | None:
    """One line on the sizes that a trainer chose and that are not the published ones; None where there are none."""
    published = (method.get("sizes") or {}).get(PUBLISHED) or {}
    draft = method["draft"]
    changed = [
        f"{key}={_said(draft[key])} (published: {_said(value)})"
        for key, value in published.items()
        if draft.get(key) != value
    ]
    if not changed:
        return None
    return f"method.draft.{', '.join(changed)}: a small draft; size={PUBLISHED} trains the published one"


def _said(value: Any) -> str:
    return "null" if value is None else str(value)

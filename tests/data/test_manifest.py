"""A manifest that was changed after it was written is refused, whichever of its facts it was."""

import json
import shutil

import pytest

from specbench.data.cache.build import build
from specbench.data.cache.manifest import DamagedManifest, Manifest, fingerprint
from specbench.data.cache.shards import DamagedShard
from specbench.data.cache.storage import storage
from specbench.data.loading.reading import CacheReader, LocalFiles
from tests.data.tiny_target import TinyTarget, talks

REFUSED = (DamagedManifest, DamagedShard)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    build(TinyTarget(), talks(12), folder, storage("fp32"), 24, shard_bytes=10_000, batch_tokens=48)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "cache")


def changed(folder, change, sealed=True):
    """Change the manifest in place; without its seal where one is not to give the change away."""
    path = folder / "manifest.json"
    facts = json.loads(path.read_text())
    if not sealed:
        del facts["seal"]
    change(facts)
    path.write_text(json.dumps(facts))
    return facts


def leaves(tree, path=()):
    """Every leaf of a JSON tree as (path, value)."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [leaf for key, value in items for leaf in leaves(value, (*path, key))]
    return found if isinstance(tree, (dict, list)) else [(path, tree)]


def put(tree, path, value):
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def test_every_fact_is_sealed(folder):
    """Each leaf set to something else, one at a time."""
    whole = (folder / "manifest.json").read_text()
    facts = json.loads(whole)
    paths = [path for path, _ in leaves(facts) if path != ("schema",)]
    assert len(paths) > 30
    for path in paths:
        old = dict(leaves(facts))[path]
        other = f"{old}x" if isinstance(old, str) else not old if isinstance(old, bool) else (old or 0) + 1
        changed(folder, lambda facts, path=path, other=other: put(facts, path, other))
        with pytest.raises(DamagedManifest, match=r"manifest\.json was changed after it was written"):
            Manifest.read(folder)
        (folder / "manifest.json").write_text(whole)
    Manifest.read(folder)


UNSEALED = {
    "another target": lambda f: f["identity"].update(target="other"),
    "another codec": lambda f: f["identity"]["codec"].update(taps="int8"),
    "other taps": lambda f: f["identity"].update(taps=[0]),
    "another fingerprint": lambda f: f.update(fingerprint="0" * 16),
    "more samples": lambda f: f.update(samples=f["samples"] + 1),
    "fewer tokens": lambda f: f.update(tokens=f["tokens"] - 1),
    "supervised": lambda f: f.update(supervised=0),
    "a wider state": lambda f: f.update(hidden_size=f["hidden_size"] * 2),
    "a larger vocabulary": lambda f: f.update(vocabulary=10**9),
    "another index": lambda f: f.update(index_hash="0" * 64),
    "other tables": lambda f: f.update(tables_hash="0" * 64),
    "a shorter shard": lambda f: f["shards"][0].update(bytes=f["shards"][0]["bytes"] - 1),
    "a shard too few": lambda f: f["shards"].pop(),
    "a shard elsewhere": lambda f: f["shards"][0].update(name="../../secret"),
    "a shard of no size": lambda f: f["shards"][0].update(bytes=None),
    "samples of a shard": lambda f: f["shards"][0].update(samples=0),
    "a field too many": lambda f: f.update(run="rm -rf"),
    "a field too few": lambda f: f.pop("layout"),
    "a text for a number": lambda f: f.update(samples="12"),
    "true for a number": lambda f: f.update(samples=True),
    "a number below 0": lambda f: f.update(tokens=-1),
    "no identity": lambda f: f.update(identity={}),
    "a list for the identity": lambda f: f.update(identity=[]),
    "no shards": lambda f: f.update(shards={}),
}


@pytest.mark.parametrize("name", UNSEALED)
def test_without_a_seal_content_still_has_to_agree(folder, name):
    """Early caches have no seal: fingerprint, index, tables and shards are held against what the manifest says."""
    changed(folder, UNSEALED[name], sealed=False)
    with pytest.raises(REFUSED, match=r"manifest|tables|shard"):
        CacheReader(LocalFiles(folder))


def test_a_cache_without_a_seal_is_read(folder):
    changed(folder, lambda facts: None, sealed=False)
    assert len(CacheReader(LocalFiles(folder))) == 12


def test_the_fingerprint_is_that_of_the_identity(pristine):
    manifest = Manifest.read(pristine)
    assert manifest.fingerprint == fingerprint(manifest.identity)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a manifest"),
        (b"{", "not a manifest"),
        (b"[]", "schema None"),
        (b'{"schema": "other"}', "schema 'other'"),
        (b"\xff\xfe\0", "not a manifest"),
        (b"[" * 5000, "not a manifest"),
        (b'{"schema": "specbench.cache/1", "schema": "specbench.cache/1"}', "occurs twice"),
        (b'{"schema": "specbench.cache/1", "tokens": NaN}', "NaN"),
    ],
)
def test_what_is_no_manifest_says_so(folder, content, why):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"manifest\.json .*{why}"):
        Manifest.read(folder)

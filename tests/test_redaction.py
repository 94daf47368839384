"""Keys and passwords: planted through every door, and looked for in every byte that was written or shown."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from experiments.cli import main
from specbench.cli.overrides import values as swept
from specbench.cli.recording import recorded
from specbench.cli.stages import Stage
from specbench.cli.withholding import withhold
from specbench.files import redaction
from specbench.files.json_lines import read
from specbench.files.redaction import VARIABLE, learn, redact, redacted
from specbench.runs.run_folder import RunFolder
from tests.pipeline import prepare


@pytest.fixture(autouse=True)
def nothing_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of another test is known, and none stays in the environment."""
    monkeypatch.setattr(redaction, "_learned", set())
    before = {name for name in os.environ if name.startswith(VARIABLE)}
    yield
    for name in [name for name in os.environ if name.startswith(VARIABLE) and name not in before]:
        del os.environ[name]


def bytes_below(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_absent(keys: list[str], folder: Path, *shown: str) -> None:
    """No key in a file, in the name of a file, or on the screen; also not as base64, percent-encoded or hexadecimal."""
    written = bytes_below(folder)
    assert written, "nothing was written, so nothing was tested"
    for key in keys:
        for form in {key, base64.b64encode(key.encode()).decode().rstrip("="), key.encode().hex()}:
            holding = [str(file) for file, data in written.items() if form.encode() in data or form in str(file)]
            assert not holding, f"{key} is in {holding}"
            assert not any(form in text for text in shown), f"{key} was shown"


GIVEN_AWAY = [
    ("api_key=abc123 seed=1", "api_key=*** seed=1"),
    ("+model.api_key=abc123", "+model.api_key=***"),
    ("{'api_key': 'abc', 'n': 1}", "{'api_key': '***', 'n': 1}"),
    ('{"access_token": "abc", "n": 1}', '{"access_token": "***", "n": 1}'),
    ("WANDB_API_KEY=0123456789abcdef", "WANDB_API_KEY=***"),
    ("HF_TOKEN=abc and more", "HF_TOKEN=*** and more"),
    ("password: hunter2", "password: ***"),
    ("https://me:pass@host:80/a?b=1", "https://***@host:80/a?b=1"),
    ("https://ghp@host/a", "https://***@host/a"),
    ("[s3://a:p@ss@host/x,http://c:d@e]", "[s3://***@host/x,http://***@e]"),
    ("https://h/a?X-Amz-Signature=abc&x=1", "https://h/a?X-Amz-Signature=***&x=1"),
    ("https://h/a?x=1&sig=a%2Fb", "https://h/a?x=1&sig=***"),
    ("https://h/a?key=abc#part", "https://h/a?key=***#part"),
    ("Authorization: Bearer abc", "Authorization: Bearer ***"),
    ("{'Authorization': 'Basic dXNlcjpwYXNz'}", "{'Authorization': 'Basic ***'}"),
    ("sent Bearer abcdef123", "sent Bearer ***"),
    ("x-api-key: abc", "x-api-key: ***"),
    ("Incorrect API key provided: abc.", "Incorrect API key provided: ***"),
    ("hf_abcdEFGH12345678 there", "*** there"),
    ("sk-proj-abcd1234_x there", "*** there"),
    ("ghp_abcdefghij0123456789", "***"),
    ("AKIAABCDEFGHIJKLMNOP", "***"),
    ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeK", "***"),
    ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY----- after", "*** after"),
    ("${oc.env:ANY,a default that is a key}", "${oc.env:ANY}"),
    (f"api_key=${{oc.env:{VARIABLE}1}}", "api_key=***"),
]
HARMLESS = [
    "mask_token_id=5 stop_token_ids=[1,2] max_new_tokens=48 token_budget=3 tokens_per_second=2.5",
    "eos_token: <|im_end|> pad_token=None",
    "unexpected token: at line 3",
    "api_key: none # of the servers",
    "api_key=null",
    "api_key: ${oc.env:OPENAI_API_KEY}",
    "https://host:8000/v1/models?limit=3&page=2",
    "hf://datasets/owner/name@main/file",
    "hf_transformers sk-learn-like key: value",
    "git@host and me@example.org",
    "a1b2c3d4e5f6a1b2c3d4e5f6a1b2c3d4e5f6a1b2",  # a commit
    "method.draft.num_key_value_heads=2, attention_k_eq_v, key=3",
    "",
]


@pytest.mark.parametrize(("text", "expected"), GIVEN_AWAY)
def test_a_key_is_known_by_its_place_or_form(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_key_stays(text: str) -> None:
    assert redact(text) == text


# Eight or more letters and digits, as keys have them; `Q7` keeps random words from being words of the templates.
KEYS = st.text("abcdefghijkmnpqrstuvwxyzABCDEFGH23456789", min_size=6, max_size=40).map(lambda text: f"Q7{text}")
DOORS = [
    "api_key={}", "+servers.api_key={} x=1", "OPENAI_API_KEY={}", "'password': '{}'", "https://u:{}@h/v1", "ftp://{}@h",
    "https://h/?token={}", "https://h/?a=1&X-Goog-Signature={}&b", "Authorization: Bearer {}", "authorization=Basic {}",
    "Proxy-Authorization: {}", "hf_{}", "sk-{}", "glpat-{}xxxxxxxx", "hf_token: {}", "secret_access_key = {}",
]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(key=KEYS)
@pytest.mark.parametrize("door", DOORS)
def test_any_key_is_withheld_at_every_door(door: str, key: str) -> None:
    text = f"before {door.format(key)} after"
    once = redact(text)
    assert key not in once and once.startswith("before ") and redact(once) == once


@settings(max_examples=30, deadline=None)
@given(key=KEYS, around=st.sampled_from(["{}", "key {}!", "<{}>", "a/{}/b", "['{}']", "(invalid: {})"]))
def test_a_key_that_was_seen_is_found_wherever_it_turns_up(key: str, around: str) -> None:
    for door in ({"api_key": key}, [f"http://me:{key}@h"], {"a": {"b": [{"password": key}]}}, f"x?token={key}"):
        redaction._learned.clear()
        assert key in redact(around.format(key))
        learn(door)
        assert redact(around.format(key)) == around.format("***")
    redaction._learned.clear()
    learn(f"http://me:{key}@h")
    assert redact(base64.b64encode(f"me:{key}".encode()).decode()) == "***"


def test_the_keys_of_the_environment_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_VENDOR_API_KEY", "e1e2e3e4e5")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:p1p2p3p4p5@proxy:3128")
    assert redact("e1e2e3e4e5, p1p2p3p4p5") == "***, ***"


def test_trees_keep_their_shape_and_lose_their_keys() -> None:
    tree = {"api_key": "abc", "n": {"token": 5, "mask_token": "<m>"}, "urls": ["http://a:b@c", 3], "password": None}
    kept = {"api_key": "***", "n": {"token": "***", "mask_token": "<m>"}, "urls": ["http://***@c", 3], "password": None}
    assert redacted(tree) == kept
    assert redacted({"api_key": "${oc.env:A}", "hf_token": "${oc.env:A,b}"}) == {
        "api_key": "${oc.env:A}",
        "hf_token": "${oc.env:A}",
    }


@pytest.mark.parametrize(
    "door",
    [
        {"api_key": "KEY"}, {"cache": "https://me:KEY@host/x"}, {"cache": "https://host/x?sig=KEY"},
        {"servers": ["http://KEY@a/v1"]}, {"deep": [{"hf_token": "KEY"}]}, {"note": "hf_KEY"},
        {"note": "${oc.env:PLANTED}"}, {"note": "a ${oc.env:PLANTED} b"}, {"api_key": "${oc.env:NONE,KEY}"},
    ],
    ids=str,
)  # fmt: skip
def test_the_identity_of_a_run_does_not_depend_on_its_keys(
    door: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for key in ("Q7abcdef123", "Q7zyxwvu987"):
        monkeypatch.setenv("PLANTED", key)
        filled = json.loads(json.dumps(door).replace("KEY", key))
        found.append(Stage("x", tmp_path, OmegaConf.create(filled | {"steps": 3})).identity)
        assert key not in json.dumps([found[-1].settings, found[-1].inputs])
    assert found[0] == found[1] and found[0].code == found[1].code and found[0].settings["steps"] == 3


def test_what_depends_on_the_environment_is_recorded_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/data")
    monkeypatch.setenv("STEPS", "5")
    cfg = OmegaConf.create(
        {
            "folder": "${oc.env:PLACE}/x",
            "steps": "${oc.decode:${oc.env:STEPS}}",
            "also": "${folder}",
            "absent": "${oc.env:NOT_THERE,a secret default}",
            "list": ["${oc.env:PLACE}"],
        }
    )
    assert recorded(cfg) == {
        "folder": "${oc.env:PLACE}/x",
        "steps": "${oc.env:STEPS}",
        "also": "${oc.env:PLACE}/x",
        "absent": "${oc.env:NOT_THERE}",
        "list": ["${oc.env:PLACE}"],
    }
    assert (cfg.folder, cfg.steps, cfg.also) == ("/data/x", 5, "/data/x")  # it is used as ever, afterwards too


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("api_key=Q7abc", "Q7abc"),
        ("api_key='Q7 a,b'", "Q7 a,b"),
        ("+deep.hf_token=Q7abc", "Q7abc"),
        ("cache=https://me:Q7abc@host/x", "https://me:Q7abc@host/x"),
        ('cache="https://host/x?a=1&sig=Q7abc&b=2"', "https://host/x?a=1&sig=Q7abc&b=2"),
        ("servers=[http://me:Q7abc@a/v1,http://me:Q7abd@b/v1]", ["http://me:Q7abc@a/v1", "http://me:Q7abd@b/v1"]),
        ("name=hf_Q7abcdefgh12", "hf_Q7abcdefgh12"),
        ("seed=1", 1),
        ("api_key=null", None),
        ("token_budget=4", 4),
    ],
)
def test_a_word_without_its_key_still_means_the_same(word: str, value: object) -> None:
    (kept,) = withhold([word])
    assert "Q7" not in kept and withhold([kept]) == [kept]
    (override,) = OverridesParser.create().parse_overrides([kept])
    cfg = OmegaConf.create({"x": override.value()})
    assert OmegaConf.to_container(cfg, resolve=True)["x"] == value


def test_a_key_that_one_word_names_is_withheld_from_every_other() -> None:
    words = ["tracking.tags=[run,Q7twice99]", "name=run", "api_key=Q7twice99"]
    kept = withhold(words)
    assert not any("Q7" in word for word in kept) and kept[1] == words[1]
    (override,) = OverridesParser.create().parse_overrides(kept[:1])
    tags = OmegaConf.create({"x": override.value()})
    assert OmegaConf.to_container(tags, resolve=True)["x"] == ["run", "Q7twice99"]


def test_the_keys_of_a_sweep_are_withheld_one_by_one() -> None:
    (kept,) = withhold(["api_key=Q7one,Q7two"])
    (override,) = OverridesParser.create().parse_overrides([kept])
    values = [OmegaConf.create({"x": value}).x for value in swept(override)]
    assert "Q7" not in kept and values == ["Q7one", "Q7two"]


def test_a_failure_is_recorded_without_the_key_that_it_repeats(tmp_path: Path) -> None:
    keys = ["Q7passw0rd", "Q7t0ken99", "Q7header11"]
    cfg = OmegaConf.create({"cache": f"https://me:{keys[0]}@host", "api_key": keys[1]})
    said = f"401 from https://me:{keys[0]}@host: key {keys[1]} refused, headers {{'Authorization': 'Bearer {keys[2]}'}}"
    with pytest.raises(ValueError, match="refused"), RunFolder(tmp_path, "train", "x", recorded(cfg)) as run:
        run.write_provenance({"command": ["specbench", f"api_key={keys[1]}"]}, f"+KEY = {keys[1]}\n")
        run.update(lineage={"cache": {"folder": cfg.cache}})
        raise ValueError(said)
    assert_absent(keys, tmp_path)
    summary = json.loads((tmp_path / "runs/train/x/summary.json").read_text())
    assert summary["error"].startswith("ValueError: 401 from https://***@host: key *** refused")


class Unfriendly(BaseHTTPRequestHandler):
    """A server that serves a model and refuses every question, repeating what it was sent, half of it encoded."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._say(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        sent = self.headers.get("Authorization", "")
        self.server.sent.add(sent)
        coded = base64.b64encode(sent.partition(" ")[2].encode()).decode()
        self._say(400, {"error": {"message": f"no: {sent.partition(' ')[2]} {dict(self.headers)} {coded}"}})

    def _say(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def served(handler: object) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.sent = set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize("sweep", [False, True], ids=["one", "sweep"])
def test_a_server_that_repeats_the_key_does_not_get_it_into_a_file(
    sweep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Doors: command line, address, environment, a file of settings of the user's own, the server's own words."""
    root, chats = tmp_path / "root", tmp_path / "chats.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"What is {n}?"}]} for n in range(6)]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "own" / "data").mkdir(parents=True)
    (tmp_path / "own" / "data" / "mine.yaml").write_text(
        "defaults: [jsonl]\nname: jsonl\nsource: {paths: ['https://me:Q7fileT0ken@host/x']}\n"
    )
    common = [f"root={root}", f"hydra.searchpath=[file://{tmp_path / 'own'}]", "data=mine"]
    source = [f"data.source.paths=[{chats}]", "decontaminate=null", "near_duplicate=null", "validation=0.5"]
    assert main(["prompts", *common, *source]) == 0
    monkeypatch.setenv("PLANTED_API_KEY", "Q7fromTheEnv1ronment")
    server = served(Unfriendly)
    keys = ["Q7argument5", "Q7passw0rd", "Q7fromTheEnv1ronment", "Q7fileT0ken"]
    address = f"http://me:Q7passw0rd@127.0.0.1:{server.server_address[1]}/v1"
    plain = address.replace("me:Q7passw0rd@", "")
    words = [
        *common,
        "tracking=offline",
        f"servers=[{address},{plain}]",
        "concurrency=1",
        "model=tiny",
        "target.revision=${oc.env:PLANTED_API_KEY}",
    ]
    words += ["-m", "api_key=Q7argument5", "patience.attempts=1,2"] if sweep else ["api_key=Q7argument5"]
    code = main(["answers", *words])
    server.shutdown()
    shown = capfd.readouterr()
    assert code == 0, shown.err
    assert any("Q7argument5" in sent for sent in server.sent), "the key must reach the server"
    assert any(sent.startswith("Basic") for sent in server.sent), "so must the password of the address"
    causes = [row["cause"] for _, row in read(root / "answers/jsonl/embedded/failed.jsonl")]
    assert causes and all("HTTP 400" in cause and "***" in cause for cause in causes)
    assert_absent(keys, root, shown.out, shown.err)
    if sweep:
        (notes,) = (root / "sweeps").rglob("multirun.yaml")
        assert yaml.safe_load(notes.read_text())["servers"] == [address.replace("me:Q7passw0rd", "***"), plain]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.long
def test_a_training_and_its_mirror_hold_no_key(tmp_path: Path) -> None:
    """A command of its own, with a password in the address of its cache and keys in its environment, W&B offline."""
    root = tmp_path / "root"
    root.mkdir()
    words = [word for word in prepare(root) if not word.startswith("tracking=")]
    (cache,) = (root / "cache").iterdir()
    server = served(partial(Quiet, directory=str(cache)))
    keys = ["Q7urlPassw0rd", "Q7fromEnv1ronment", "a7" * 20, "hf_Q7abcdefghijklmnop12"]
    words += ["method=dflash", "name=planted", "tracking=offline", "tracking.tags=[${oc.env:PLANTED_API_KEY}]"]
    words.append(f"cache=http://me:{keys[0]}@127.0.0.1:{server.server_address[1]}")
    environment = os.environ | {"PLANTED_API_KEY": keys[1], "WANDB_API_KEY": keys[2], "HF_TOKEN": keys[3]}
    command = [sys.executable, "-m", "experiments.cli", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=500)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert_absent(keys, root, done.stdout, done.stderr)
    record = yaml.safe_load((root / "runs" / "train" / "planted" / "config.yaml").read_text())
    assert record["tracking"]["tags"] == ["${oc.env:PLANTED_API_KEY}"] and record["cache"].startswith("http://***@")
    assert list((root / "runs").rglob("*.wandb")), "the mirror is among what was searched"

"""Resolve names to models: paths, the built-in table, and a hub that is a local server, or nothing at all."""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dejavu.errors import ModelError
from dejavu.model.resolve import ALIASES, eos_token_ids, hub_id, resolve_model
from dejavu.model.table import MODELS

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 7,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_model(directory: Path, **files: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in {"config": CONFIG, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_directory_comes_first(tmp_path, monkeypatch):
    write_model(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    found = resolve_model("gpt2")
    assert (found.name, found.spec.family, found.directory) == ("gpt2", "llama", tmp_path / "gpt2")
    (tmp_path / "opt-125m").mkdir()  # holds no model, so the name stands for the built-in one
    assert resolve_model("opt-125m", "dummy").spec == MODELS["opt-125m"]


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({"eos_token_id": 3}, (3,)), ({"eos_token_id": [3, 4]}, (3, 4)), ({"eos_token_id": None}, (7,)), ({}, (7,))],
)
def test_stops_come_from_the_generation_config_first(tmp_path, generation, expected):
    directory = write_model(tmp_path / "model", generation_config=generation)
    assert eos_token_ids(directory) == expected
    assert resolve_model(str(directory)).spec.eos_token_ids == expected


def test_dummy_by_name_has_the_shape_only():
    for name, spec in MODELS.items():
        found = resolve_model(name.upper(), "dummy")
        assert (found.spec, found.directory) == (spec, None)
    for alias, name in ALIASES.items():
        assert resolve_model(alias, "dummy").spec == MODELS[name]


def test_dummy_of_a_directory_keeps_the_directory(tmp_path):
    assert resolve_model(str(write_model(tmp_path / "model")), "dummy").directory == tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "load_format", "message"),
    [
        ("opt-13B-x", "auto", "did you mean opt-13b"),
        ("qqqqqqqq", "auto", "known names are bloom-176b"),
        ("./nowhere", "auto", "no file or directory"),
        ("nowhere.gguf", "auto", "no file or directory"),
        ("opt-175b", "auto", "--load-format dummy"),
        ("owner/name", "gguf", "download a .gguf file"),
    ],
)
def test_names_that_mean_nothing(name, load_format, message):
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model(name, load_format)
    assert "\n" not in str(caught.value)


def test_paths_that_hold_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("[")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).touch()
    for name, message in {
        "empty": "neither config.json",
        "notes.txt": "no GGUF file",
        "broken": "cannot read",
        "two": "2 GGUF files",
    }.items():
        with pytest.raises(ModelError, match=message):
            resolve_model(str(tmp_path / name))
    (tmp_path / "two" / "b.gguf").unlink()
    with pytest.raises(ModelError, match="not safetensors"):
        resolve_model(str(tmp_path / "two"), "safetensors")


def test_every_published_shape_has_its_hub_id():
    assert {name for name in MODELS if hub_id(name) is None} == {"opt-175b"}
    assert hub_id("opt-13b") == "facebook/opt-13b"
    assert hub_id("gpt2") == "openai-community/gpt2"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serve one repository, `owner/name`, as the hub does; remember what was asked for."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def log_message(self, *arguments):
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/owner/name/tree/"):
            self.reply(json.dumps([self.entry(name) for name in self.files]).encode())
        elif path.startswith("/api/models/owner/name"):
            self.reply(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"/owner/name/resolve/{COMMIT}/") and path.split("/", 5)[5] in self.files:
            self.asked.append(path.split("/", 5)[5])
            self.reply(self.files[self.asked[-1]])
        else:
            self.reply(b"", 404, {"X-Error-Code": "RepoNotFound"})

    def entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def reply(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        for key, value in {"ETag": etag, "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def resolve_apart(tmp_path: Path, endpoint: str, *names: str) -> list[str]:
    """Resolve `names` in a fresh process, where the hub's address is read anew; gives one line for each."""
    code = (
        "import sys\n"
        "from dejavu.errors import ModelError\n"
        "from dejavu.model import resolve\n"
        "resolve.HUB_TIMEOUT_S = 0.5\n"
        "for name in sys.argv[1:]:\n"
        "    try: print('found', resolve.resolve_model(*name.split('@')).directory)\n"
        "    except ModelError as error: print(error)\n"
    )
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "files", {"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": b"pickle"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_hub_gives_safetensors_and_never_pickles(tmp_path, hub):
    pickled, unknown = resolve_apart(tmp_path, hub, "owner/name", "owner/other")
    assert "has no safetensors" in pickled
    assert "no model 'owner/other'" in unknown
    Hub.files |= {"model.safetensors": b"weights", "onnx/model.safetensors": b"copy", "tokenizer.json": b"{}"}
    (dummy,) = resolve_apart(tmp_path / "other", hub, "owner/name@dummy")
    assert dummy.startswith("found")
    assert "model.safetensors" not in Hub.asked
    (found,) = resolve_apart(tmp_path / "other", hub, "owner/name")
    assert found.startswith("found")
    assert set(Hub.asked) == {"config.json", "model.safetensors", "tokenizer.json"}
    (offline,) = resolve_apart(tmp_path / "other", "http://127.0.0.1:9", "owner/name")
    assert offline == found


def test_silent_hub_is_given_up_soon(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        began = time.monotonic()
        (line,) = resolve_apart(tmp_path, f"http://127.0.0.1:{deaf.getsockname()[1]}", "opt-13b")
    assert time.monotonic() - began < 15
    assert line.startswith("'facebook/opt-13b' is not on this machine and the hub cannot be reached")
    assert "--load-format dummy" in line


def test_resolving_needs_no_heavy_import():
    code = (
        "import sys, dejavu.assets\n"
        "from dejavu.model.resolve import resolve_model\n"
        "resolve_model('gpt2', 'dummy')\n"
        "heavy = ('torch', 'numpy', 'transformers', 'huggingface_hub', 'gguf', 'jinja2', 'tokenizers')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"

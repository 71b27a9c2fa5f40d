"""`--push-to-hub` against a local server that answers as the Hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from convert.command import ConvertError
from convert.hub import check_push
from convert.neox_to_hf import main
from tests.convert.synthetic import Model, write

REPOSITORY = "somebody/metala"
API = f"/api/models/{REPOSITORY}"


class Hub(ThreadingHTTPServer):
    """A server for one repository: creation, choice of upload, LFS, commits.

    Attributes:
        created: what the repository was asked to be, `None` if it was not made.
        files: path to content, as committed.
        stored: LFS objects by SHA-256.
        broken: a path whose requests fail with status 500.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: dict | None = None
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.broken: str | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments) -> None:
        pass

    def do(self) -> None:
        path = self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == self.server.broken:
            return self.answer({"error": "the server is on fire"}, 500)
        if path.startswith("/store/"):
            self.server.stored[path.removeprefix("/store/")] = body
            return self.answer({})
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer({"url": f"{self.server.address}/{REPOSITORY}"})
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\nlibrary_name: transformers\n")
            return self.answer({"errors": [], "warnings": []})
        if path == f"{API}/preupload/main":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        if path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.address}/store/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if path == f"{API}/commit/main":
            return self.commit([json.loads(line) for line in body.splitlines()])
        if path in (API, f"{API}/revision/main"):
            siblings = [{"rfilename": name} for name in self.server.files]
            return self.answer({"id": REPOSITORY, "sha": "0" * 40, "siblings": siblings})
        if path.startswith(f"{API}/tree/main"):
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in self.server.files.items()
            ]
            return self.answer(files)
        self.answer({"error": f"no such thing: {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = do

    def commit(self, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.stored[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.server.files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del self.server.files[value["path"]]
        address = f"{self.server.address}/{REPOSITORY}/commit/{'1' * 40}"
        self.answer({"commitUrl": address, "commitOid": "1" * 40})

    def answer(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub():
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def export(hub, run_main, tmp_path, monkeypatch):
    """Function: exports tmp_path/neox with these flags, and uploads it to the test's server."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Xet servers speak a protocol of their own.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def run(*flags: str):
        paths = ("--checkpoint", tmp_path / "neox", "--output", tmp_path / "hf")
        return run_main(main, *paths, "--push-to-hub", REPOSITORY, *flags)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_is_what_the_hub_gets(hub, export, vocab_file, tmp_path):
    write(tmp_path / "neox", Model(), 2, 1, vocab_file)
    # from_pretrained would prefer the single file of an earlier upload to the new files.
    hub.files = {"model.safetensors": b"stale", "LICENSE": b"kept"}
    process = export("--private", "--max-shard-size", "40KB")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == f"uploaded to {hub.address}/{REPOSITORY}"
    assert (hub.created["name"], hub.created["organization"]) == ("metala", "somebody")
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    assert hub.files == {**contents(tmp_path / "hf"), "LICENSE": b"kept"}
    assert "model-00001-of-00002.safetensors" in hub.files and "README.md" in hub.files


def test_a_failed_upload_leaves_the_folder_and_one_line(hub, export, vocab_file, tmp_path):
    write(tmp_path / "neox", Model(), 1, 0, vocab_file)
    hub.broken = f"{API}/commit/main"
    process = export()
    assert process.returncode == 1
    lines = [line for line in process.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and "Traceback" not in process.stderr
    line = f"command: {tmp_path / 'hf'} is complete, but was not uploaded to {REPOSITORY}: "
    assert lines[0].startswith(line) and "500" in lines[0]
    assert lines[0].endswith(f"`hf upload {REPOSITORY} {tmp_path / 'hf'}` tries again")
    assert {"config.json", "model.safetensors", "README.md"} <= contents(tmp_path / "hf").keys()
    assert hub.files == {}


def test_what_can_be_known_before_is_refused_before(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConvertError, match="nobody is logged in; `hf auth login`, or set HF_TOKEN"):
        check_push(REPOSITORY)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_test")
    check_push(REPOSITORY)
    with pytest.raises(ConvertError, match="--push-to-hub a/b/c: "):
        check_push("a/b/c")

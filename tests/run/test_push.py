"""`lorica push`: nothing leaves the machine unasked; what leaves is what was written with the weights, in one commit."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lorica.durable import manifest, sha256

Lorica = Callable[..., tuple[int, str]]
CARD = "# mine\n"


class Hub(BaseHTTPRequestHandler):
    """What the hub answers to a client that makes a repository and commits files to it."""

    refuses = False
    asked: list[tuple[str, Any]]

    def do_HEAD(self) -> None:
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"sha": "0" * 40, "id": "me/mine", "siblings": []})

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in body.decode().splitlines() if line]
        type(self).asked.append((self.path, lines))
        if type(self).refuses:
            self._answer({"error": "You don't have the rights"}, 403)
        elif self.path.endswith("/repos/create"):
            self._answer({"url": f"http://{self.headers['Host']}/me/mine", "name": "me/mine"})
        elif "/preupload/" in self.path:
            self._answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]})
        elif "/commit/" in self.path:
            self._answer({"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True})
        else:
            self._answer({})

    def _answer(self, what: Any, status: int = 200) -> None:
        body = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    from huggingface_hub import constants

    kind = type("OneHub", (Hub,), {"asked": [], "refuses": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for module in ("huggingface_hub.constants", "huggingface_hub.hf_api"):
        monkeypatch.setattr(f"{module}.ENDPOINT", address, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield kind
    server.shutdown()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, text in {
        "adapter_config.json": "{}",
        "adapter_model.safetensors": "weights",
        "lorica.json": '{"weights": "adapter"}',
    }.items():
        (folder / name).write_text(text)
    (folder / "SHA256SUMS").write_text(manifest({f.name: sha256(f) for f in folder.iterdir()}))
    (folder / "README.md").write_text(CARD)
    (folder / "notes.txt").write_text("hf_not_for_others")
    return folder


def test_without_consent_nothing_is_asked_of_anybody(lorica: Lorica, adapter: Path, hub: type[Hub]) -> None:
    code, said = lorica("push", f"run={adapter}", "repo=me/mine")
    assert code == 0 and "nothing was uploaded" in said and "confirm=true" in said and "private" in said
    assert "adapter_model.safetensors" in said and "not uploaded, for they came later: notes.txt" in said and hub.asked == []


def test_what_was_written_with_the_weights_goes_in_one_commit(lorica: Lorica, adapter: Path, hub: type[Hub]) -> None:
    code, said = lorica("push", f"run={adapter}", "repo=me/mine", "confirm=true")
    assert code == 0 and "commit/1" in said, said
    made = hub.asked[0][1][0]
    assert hub.asked[0][0].endswith("/repos/create") and (made.get("private") or made.get("visibility") == "private"), made
    (commit,) = [lines for path, lines in hub.asked if "/commit/" in path]
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in commit if line["key"] == "file"}
    assert sent == {f.name: f.read_bytes() for f in adapter.iterdir() if f.name != "notes.txt"}


def test_a_hub_that_refuses_is_quoted(lorica: Lorica, adapter: Path, hub: type[Hub]) -> None:
    hub.refuses = True
    code, said = lorica("push", f"run={adapter}", "repo=me/mine", "confirm=true")
    assert code == 2 and "does not let you write" in said and "rights" in said and "hf_secret" not in said, said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_text("others"), "is damaged"),
        (lambda f: (f / "README.md").unlink(), "has no README.md"),
        (lambda f: (f / "SHA256SUMS").unlink(), "has no SHA256SUMS"),
    ],
)
def test_damaged_or_unfinished_weights_stay_here(change: Callable[[Path], Any], says: str, lorica: Lorica, adapter: Path) -> None:
    change(adapter)
    code, said = lorica("push", f"run={adapter}", "repo=me/mine", "confirm=true")
    assert code == 2 and says in said, said


def test_a_hub_that_can_not_be_asked(lorica: Lorica, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "must be owner/name" in lorica("push", f"run={adapter}", "repo=mine")[1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, said = lorica("push", f"run={adapter}", "repo=me/mine", "confirm=true")
    assert code == 2 and "HF_HUB_OFFLINE" in said

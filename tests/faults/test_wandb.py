"""W&B that falls silent, at the start or midway, costs seconds and no metric."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

KEY = "0123456789abcdef0123456789abcdef01234567"
CALLER = """
import sys, time
from pathlib import Path
from lorica.config import WandbLoggerConfig
from lorica.composition import compose
from lorica import loggers
import wandb
run = Path(sys.argv[1])
config = compose("train", ["logger=wandb", f"run_dir={run}"])
begun = time.monotonic()
built, notes = loggers.build_loggers(config, run, None)
started = time.monotonic()
for step in range(3):
    for logger in built:
        logger.log_metrics({"train/loss": 1.0 / (step + 1)}, step=step)
time.sleep(1.0)
finishing = time.monotonic()
said = loggers.finish_wandb(built, run, None, [], {"test/loss": 0.5}, failed=False)
print(notes, said, flush=True)
print(started - begun, finishing, flush=True)
loggers.leave(0)
"""


class Service(BaseHTTPRequestHandler):
    """As much of W&B's service as a run needs to begin; silent while `silent` is set."""

    protocol_version = "HTTP/1.1"
    silent = threading.Event()
    then_silent = False  # once a run has begun

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        while self.silent.is_set():
            time.sleep(0.1)
        answer: dict[str, object] = {"data": {}}
        if b"upsertBucket" in body:
            project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "e"}}
            bucket = {"id": "QQ==", "name": "abc", "displayName": "abc", "config": "{}", "historyLineCount": 0, "project": project}
            answer = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        elif b"viewer" in body.lower():
            answer = {"data": {"viewer": {"id": "V", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}}
        with suppress(BrokenPipeError):  # who asked has given up
            self._say(answer)
        if b"upsertBucket" in body and self.then_silent:
            self.silent.set()

    def _say(self, answer: dict[str, object]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_POST


@pytest.fixture
def service() -> Iterator[type[Service]]:
    Service.silent.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Service.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield Service
    Service.silent.clear()
    server.shutdown()


def call(run: Path) -> tuple[float, str]:
    """(seconds that W&B takes, to begin and to end; what the user is told)."""
    run.mkdir()
    done = subprocess.run([sys.executable, "-c", CALLER, str(run)], capture_output=True, text=True, timeout=120)
    ended = time.monotonic()
    assert done.returncode == 0, done.stderr
    assert len((run / "metrics.csv").read_text().splitlines()) == 4
    notes, times = done.stdout.strip().splitlines()[-2:]
    starting, finishing = map(float, times.split())
    return starting + ended - finishing, notes


@pytest.mark.faults
def test_w_and_b_that_falls_silent_costs_at_most_five_seconds_and_no_metric(
    service: type[Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", service.address)  # type: ignore[attr-defined]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    usual, _ = call(tmp_path / "offline")
    monkeypatch.delenv("WANDB_MODE")
    service.silent.set()
    seconds, notes = call(tmp_path / "start")
    assert seconds < usual + 5.0, (seconds, usual)
    assert "W&B is offline: W&B does not answer" in notes and list((tmp_path / "start" / "wandb").glob("offline-run-*/*.wandb"))
    service.silent.clear()
    service.then_silent = True
    seconds, notes = call(tmp_path / "midway")
    assert seconds < usual + 5.0, (seconds, usual)
    assert "nothing is lost: wandb sync" in notes and list((tmp_path / "midway" / "wandb").glob("run-*/*.wandb"))

"""Whether W&B can be used from here: its address, the key, the mode. Neither wandb nor torch is imported."""

from __future__ import annotations

import base64
import http.client
import json
import netrc
import os
import urllib.error
import urllib.request

from lorica import hub
from lorica.config import ConfigError

HOST = "https://api.wandb.ai"
ANSWER_SECONDS = 2.0


def address() -> str:
    """W&B's address: WANDB_BASE_URL, or the public service."""
    return os.environ.get("WANDB_BASE_URL", HOST).rstrip("/")


def key() -> str | None:
    """The key that W&B would log in with without asking: WANDB_API_KEY, or an entry in ~/.netrc."""
    if given := os.environ.get("WANDB_API_KEY"):
        return given
    host = address().split("//")[-1].split("/")[0]
    try:
        entry = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return entry[2] if entry is not None else None


def answers() -> bool:
    """Whether W&B can be asked anything, found out within 2 s."""
    return hub.answers(address(), ANSWER_SECONDS)


def account(given: str, seconds: float) -> str | None:
    """The name of the account that a key opens, None where it opens none.

    Raises:
        OSError, ValueError: what was answered is neither.
    """
    request = urllib.request.Request(
        f"{address()}/graphql",
        json.dumps({"query": "query { viewer { username } }"}).encode(),
        {"Content-Type": "application/json", "Authorization": "Basic " + base64.b64encode(f"api:{given}".encode()).decode()},
    )
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            viewer = json.load(response)["data"]["viewer"]
    except urllib.error.HTTPError as e:
        if e.code in (401, 403):
            return None
        raise
    except (KeyError, TypeError, http.client.HTTPException) as e:
        raise ValueError("the answer is not W&B's") from e
    return None if viewer is None else str(viewer["username"])


def mode_of(asked: str) -> tuple[str, str]:
    """(online or offline, why it is offline or ""). Found out within 2 s.

    Raises:
        ConfigError: online was asked for and can't be had.
    """
    if asked == "offline" or os.environ.get("WANDB_MODE") == "offline":
        return "offline", ""
    if key() is None:
        why = "no W&B key (WANDB_API_KEY, or `wandb login`)"
    elif not answers():
        why = "W&B does not answer"
    else:
        return "online", ""
    if asked == "online":
        raise ConfigError("logger.mode", "online", why, "logger.mode=auto")
    return "offline", why

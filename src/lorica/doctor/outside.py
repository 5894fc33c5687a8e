"""The Hugging Face hub, its token and the base model; W&B. Each is given up within seconds, and no secret is ever printed."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorica import hub, wandb_login
from lorica.config import ConfigError
from lorica.doctor.verdicts import FAIL, Finding, Once, fail, hide, ok, said, warn, within

SECONDS = 2.5  # for each question
SETTINGS = "https://huggingface.co/settings/tokens"
LOGIN = "hf auth login"


class Hub:
    """What is asked of the hub, once for all checks.

    Args:
        base: of a model: a folder, or a name on the hub; None: none is looked for. wanted: the user named it, so it must be there.
    """

    def __init__(self, base: str | None, revision: str | None, wanted: bool) -> None:
        self.base_name, self._revision, self._wanted = base, revision, wanted
        self._answer = Once(self._ask)
        self._refused = Once(self._ask_token)

    def _ask(self) -> int | str:
        from huggingface_hub import constants

        return hub.answer(constants.ENDPOINT, SECONDS)

    @property
    def _up(self) -> bool:
        answer = self._answer()
        return isinstance(answer, int) and answer < 500 and answer != 407

    def reached(self) -> Finding:
        """Whether the hub answers."""
        from huggingface_hub import constants

        if hub.offline():
            return ok("not asked: HF_HUB_OFFLINE is set, only what is in the cache is used")
        answer = self._answer()
        if self._up:
            return ok(f"{constants.ENDPOINT} answers")
        why = {407: "the proxy asks who you are (407)"}.get(answer, f"answers with error {answer}") if isinstance(answer, int) else answer
        fix = "a network, or HF_HUB_OFFLINE=1 to use what is in the cache without waiting"
        if "certificate" in str(why):
            fix = "SSL_CERT_FILE=<the certificates of your network's proxy, in PEM>"
        elif answer == 407:
            fix = "HTTPS_PROXY=http://user:password@proxy:port"
        elif isinstance(answer, int):
            fix = "later again: https://status.huggingface.co"
        elif "HF_ENDPOINT" in os.environ:
            fix = f"unset HF_ENDPOINT, or {fix}"
        return warn(f"{constants.ENDPOINT}: {why}; bases and data sets come from the cache and local folders only", fix)

    def token(self) -> Finding:
        """Whether there is a token, and the hub takes it."""
        from huggingface_hub import get_token

        token = get_token()
        if token is None:
            return warn(
                "none: gated and private repositories can't be read, and nothing can be pushed",
                f"{LOGIN}, or a token from {SETTINGS} in HF_TOKEN",
            )
        hide(token)
        if hub.offline():
            return ok(f"there, {_place()}; not tried: HF_HUB_OFFLINE is set")
        if not self._up:
            return ok(f"there, {_place()}; not tried: the hub can't be asked")
        return self._refused()

    def _ask_token(self) -> Finding:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            who: dict[str, Any] = within(SECONDS, HfApi().whoami)
        except HfHubHTTPError as e:
            code = e.response.status_code
            if code in (401, 403):
                renewed = f"a new one from {SETTINGS}, then " + ("export HF_TOKEN=<it>, or unset HF_TOKEN" if _named() else LOGIN)
                return fail(f"refused by the hub ({code}), {_place()}: it has expired or was revoked", renewed)
            return warn(f"there, {_place()}; the hub answers {code} when asked whose it is", "later again: https://status.huggingface.co")
        except Exception as e:
            return warn(f"there, {_place()}; the hub does not say whose it is: {said(e)}", "later again, or HF_HUB_OFFLINE=1")
        role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
        return ok(f"of {who.get('name', 'unknown')}{f', may {role}' if role else ''}, {_place()}")

    @property
    def missing(self) -> bool:
        """Whether the base is on no disk here."""
        name = self.base_name
        return not (name is None or _is_folder(name) or hub.packaged(name) or name == hub.TINY or self._cached(name))

    def _cached(self, name: str) -> bool:
        from huggingface_hub import constants

        commit = hub.cached_commit(name, self._revision, "model")
        snapshot = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots" / (commit or "")
        return commit is not None and any(file.exists() for file in snapshot.glob("*.safetensors"))

    def base(self) -> Finding:
        """Whether the base is here, or may be downloaded."""
        name = self.base_name
        assert name is not None
        lacking = fail if self._wanted else warn
        if _is_folder(name):
            if (Path(name).expanduser() / "config.json").is_file():
                return ok(f"{name} is a folder here")
            return lacking(
                f"{name} has no config.json, or is no folder", "base=<a folder that from_pretrained can load, or a name on the hub>"
            )
        if name == hub.TINY:
            return ok(f"{name} is made by the run itself")
        if (home := hub.packaged(name)) is not None:
            return ok(f"{name} comes with the package {home.parent.name}")
        if self._cached(name):
            return ok(f"{name} is in the hub's cache")
        here = (
            "python train.py model=minilm_lora  (needs no download)" if hub.packaged(next(iter(hub.PACKAGED))) else "base=<a local folder>"
        )
        if hub.offline():
            return lacking(f"{name} is not in the cache, and HF_HUB_OFFLINE is set", f"HF_HUB_OFFLINE=0, or {here}")
        if not self._up:
            return lacking(f"{name} is not in the cache, and the hub can't be asked", f"a network, or {here}")
        if self.token().verdict == FAIL:
            return lacking(f"{name} is not in the cache, and the hub refuses the token", "mend the token first, above")
        return _access(name, lacking)


def _is_folder(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).expanduser().is_dir()


def _access(name: str, lacking: Callable[[str, str], Finding]) -> Finding:
    """Whether the hub gives a base to who has this token. lacking: the verdict where it does not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def ask() -> None:
        with hub.hub_errors("base", name):
            HfApi().auth_check(name)

    try:
        within(SECONDS, ask)
    except ConfigError as e:
        return lacking(f"{name} {e.rule}", e.fix)
    except HfHubHTTPError as e:
        return warn(f"the hub answers {e.response.status_code} when asked for {name}", "later again: https://status.huggingface.co")
    except Exception as e:
        return warn(f"the hub does not say whether {name} may be read: {said(e)}", "later again")
    return ok(f"{name} may be downloaded")


def _named() -> bool:
    """Whether the token comes from the environment, which stands over the file."""
    return any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))


def _place() -> str:
    from huggingface_hub import constants

    return "from HF_TOKEN" if _named() else f"from {constants.HF_TOKEN_PATH}"


def wandb() -> Finding:
    """Whether runs with logger=wandb are seen by W&B."""
    if find_spec("wandb") is None:
        return warn("the package is missing: logger=wandb is refused", "pip install wandb")
    key = wandb_login.key()
    if key is not None:
        hide(key)
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode in ("offline", "dryrun", "disabled"):
        return ok(f"runs stay {'unrecorded' if mode == 'disabled' else 'on this disk'}: WANDB_MODE={mode}")
    address = wandb_login.address()
    login = "wandb login" if address == wandb_login.HOST else f"wandb login --host {address}"
    if key is None:
        return warn(f"not logged in to {address}: runs with logger=wandb are offline", f"{login}, or the key in WANDB_API_KEY")
    answer = hub.answer(address, wandb_login.ANSWER_SECONDS)
    if not isinstance(answer, int):
        return warn(f"{address}: {answer}; runs with logger=wandb are offline", "a network, or logger.mode=offline; later: wandb sync")
    place = "WANDB_API_KEY" if os.environ.get("WANDB_API_KEY") else "~/.netrc"
    try:
        who = within(SECONDS, lambda: wandb_login.account(key, SECONDS))
    except Exception as e:
        return warn(f"{address} does not say whose the key is: {said(e)}", "later again, or logger.mode=offline")
    if who is None:
        again = f"{login} --relogin" + (", and unset WANDB_API_KEY" if place == "WANDB_API_KEY" else "")
        return warn(f"{address} refuses the key from {place}: it has expired or is another service's", again)
    return ok(f"logged in to {address} as {who}, by {place}")

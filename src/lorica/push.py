"""`lorica push`: weights and their card to the Hugging Face hub, after the user has seen what would go and said so."""

from __future__ import annotations

from pathlib import Path

from lorica import hub
from lorica.config import ConfigError, PushConfig
from lorica.durable import FOR_PEOPLE, MANIFEST, damage, read_manifest
from lorica.runs import read_task, weights_folder
from lorica.screen import Screen, quiet_libraries, short


def run(config: PushConfig) -> int:
    """Show what would be uploaded, and upload it where that is confirmed.

    Raises:
        ConfigError: no weights, damaged ones, no card; a hub that can't be reached, or that refuses.
    """
    screen = Screen()
    folder = weights_folder(Path(config.run).expanduser())
    files = _files(folder)
    task = read_task(folder)
    sizes = [(name, (folder / name).stat().st_size) for name in files]
    screen.facts(
        f"to {config.repo} on the hub, {'private' if config.private else 'public: everybody can read it'}",
        [(name, f"{short(size)}B") for name, size in sizes],
    )
    if others := sorted(f.name for f in folder.iterdir() if f.name not in files):
        screen.note(f"not uploaded, for they came later: {', '.join(others)}")
    if Path(str(task.get("base"))).is_absolute() and task.get("weights") == "adapter":
        screen.note(f"the adapter's base is a folder of this machine ({task['base']}), which the card names: others can't load it as it is")
    if not config.confirm:
        screen.print("nothing was uploaded. Read the card first; then the same command with confirm=true")
        return 0
    url = _upload(config, folder, files)
    screen.print(f"uploaded: {url}")
    return 0


def _files(folder: Path) -> list[str]:
    """Names of what was written with the weights, all intact, and their card.

    Raises:
        ConfigError: something is missing or damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise ConfigError("run", folder, f"has no {MANIFEST}: it is not known what belongs to it", "a run or a merge of this version")
    if what := damage(folder / MANIFEST):
        raise ConfigError("run", folder, what, "a copy of that folder, or a new run")
    if not (folder / FOR_PEOPLE).is_file():
        raise ConfigError("run", folder, f"has no {FOR_PEOPLE}: the card is written when a run is finished", "resume=auto finishes the run")
    return [FOR_PEOPLE, MANIFEST, *sorted(read_manifest(folder / MANIFEST))]


def _upload(config: PushConfig, folder: Path, files: list[str]) -> str:
    """One commit with all files; its address."""
    quiet_libraries()
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if hub.offline():
        raise hub.unreachable("repo", config.repo, "HF_HUB_OFFLINE is set", "HF_HUB_OFFLINE=0")
    if get_token() is None:
        raise ConfigError("repo", config.repo, "the hub asks who writes", "hf auth login, or HF_TOKEN=...")
    if not hub.answers(constants.ENDPOINT, hub.CONNECT_SECONDS):
        raise hub.unreachable("repo", config.repo, f"{constants.ENDPOINT} does not answer", "a network")
    api = HfApi()
    with hub.hub_errors("repo", config.repo, "a network"):
        try:
            api.create_repo(config.repo, private=config.private, exist_ok=True)
            done = api.upload_folder(
                repo_id=config.repo, folder_path=folder, allow_patterns=files, commit_message=f"{folder.name} by Lorica"
            )
        except HfHubHTTPError as e:
            if e.response.status_code not in (401, 403):
                raise
            why = (e.server_message or str(e)).splitlines()[0]
            raise ConfigError(
                "repo", config.repo, f"the hub does not let you write there ({why})", "a token that may: hf auth login"
            ) from None
    return str(done.commit_url)

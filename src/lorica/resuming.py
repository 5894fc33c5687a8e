"""Going on with a run: whether its state fits what is asked for now, and whether its best weights are still what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorica import checkpoints, fingerprint, states
from lorica.config import ConfigError
from lorica.data.module import LoricaDataModule
from lorica.durable import MANIFEST, damage, recover_folder
from lorica.models.module import LoricaModule


def go_on(folder: Path, state: dict[str, Any], data: LoricaDataModule, found: dict[str, str]) -> list[str]:
    """Set where training goes on; what to tell the user.

    Args:
        found: data and machine as they are now, in the words of `fingerprint`.
    Raises:
        ConfigError: the state is of other data or another plan, or of a longer one.
    """
    saved = state["callbacks"][checkpoints.Checkpoints.__name__]
    fingerprint.check_same(folder, saved["made_for"]["found"], found)
    data.resume_at = int(state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"])
    if data.resume_at > len(data.plan):
        raise ConfigError(
            "resume",
            folder,
            f"{data.resume_at} micro-steps were trained, more than the {len(data.plan)} that are asked for now",
            "a larger trainer.max_epochs or trainer.max_steps",
        )
    if saved["stopped"]:  # early: only the test is missing
        data.resume_at = len(data.plan)
    changed = fingerprint.differences(saved["made_for"]["versions"], fingerprint.versions())
    return [f"other versions than the run began with: the same bits are not promised: {'; '.join(changed)}"] if changed else []


def mend_best(folder: Path, weights: Path, kept: dict[str, Any] | None, module: LoricaModule, write: Callable[[], None]) -> list[str]:
    """See that the best weights so far are intact; write them again from the state of their step where they are not.

    Args:
        kept: what the state says of them. write: writes the module's weights to `weights`.
    Returns:
        What to tell the user.
    Raises:
        ConfigError: that state is gone.
    """
    recover_folder(weights)
    if kept is None or kept["best"] is None or not (what := damage(weights / MANIFEST)):
        return []
    for state in states.states(folder):
        if states.step_of(state) == kept["best_step"] and not damage(states.manifest_of(state)):
            module.load_state_dict(checkpoints.load(state)["state_dict"])
            write()
            return [f"{what}; written again from {state}"]
    raise ConfigError("resume", folder, f"{what}; it holds the best weights, of step {kept['best_step']}, whose state is gone", "a new run")

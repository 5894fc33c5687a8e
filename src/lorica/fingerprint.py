"""What a run was made for: configuration, data, plan, machine, versions. A resumed run agrees with it, or is refused with what differs.
No torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lorica
from lorica.checks import walk
from lorica.config import ConfigError, TrainConfig, as_typed
from lorica.data.batching import PLAN_VERSION
from lorica.data.token_cache import content_hash
from lorica.durable import sha256
from lorica.proposals import pasted

if TYPE_CHECKING:
    from lorica.data.module import LoricaDataModule
    from lorica.hardware import Machine

PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "numpy")
# What a run may go on with another value of: where things go, how often, how far, how fast. Where data and weights come from is
# compared by what they are; `auto` and null by what they became.
HARMLESS = (
    *(
        "run_dir",
        "resume",
        "drill",
        "logger.",
        "model.name",
        "model.base",
        "model.revision",
        "model.license",
        "model.recommended.",
        "model.attn_implementation",
    ),
    *(
        "data.name",
        "data.source",
        "data.path",
        "data.hub_id",
        "data.hub_config",
        "data.revision",
    ),
    *("data.license", "data.token_cache", "data.num_workers"),
    *("data.report_only", "data.near_duplicate_similarity", "data.max_leakage", "data.max_unsupervised", "data.min_eos_share"),
    "data.min_label_examples",
    *("data.max_new_tokens", "data.max_generated_examples", "data.max_test_examples"),
    *("trainer.max_epochs", "trainer.max_steps", "trainer.val_check_interval", "trainer.checkpoint_every_n_steps"),
    *(
        "trainer.keep_checkpoints",
        "trainer.early_stopping_patience",
        "trainer.log_every_n_steps",
        "trainer.max_skipped_steps",
        "trainer.on_oom",
    ),
    *("trainer.enable_progress_bar", "trainer.detect_anomaly", "trainer.accelerator", "trainer.devices", "trainer.num_nodes"),
    *("trainer.strategy", "trainer.precision", "trainer.compile", "trainer.cuda_graphs", "trainer.gradient_checkpointing"),
    *("trainer.resident_weights", "trainer.offload_embeddings", "trainer.fit"),
    "distillation.teacher",
)


def of_configuration(config: TrainConfig) -> dict[str, Any]:
    """Every key that decides what is trained, with its value."""
    return {name: value for name, value, _ in walk(config) if not any(name == h or (h[-1] == "." and name.startswith(h)) for h in HARMLESS)}


def of_data(data: LoricaDataModule) -> dict[str, str]:
    """Rows as the model gets them, by content: another tokenizer or template is another set. And the plan's settings beyond the keys."""
    rows = {"training": data.train_rows, "validation": data.eval_rows["validation"]}
    found = {f"{split} rows": f"{len(of_split):,}, sha256 {content_hash(of_split)[:16]}" for split, of_split in rows.items()}
    batching = data.batching
    return {
        **found,
        "devices": str(batching.world_size),
        "parts of a micro-batch": str(data.plan.parts),
        "batches": f"{'padded' if batching.padded else 'end to end'}, plan {PLAN_VERSION} {data.plan.fingerprint()[:16]}",
    }


def of_machine(machine: Machine, compiled: bool, attention: str, base: str) -> dict[str, str]:
    """Device, arithmetic, attention and base weights, as they were chosen."""
    layers = "yes" if compiled else "no"
    return {"device": machine.device.type, "precision": machine.precision, "compiled layers": layers, "attention": attention, "base": base}


def of_base(folder: str, revision: str | None) -> str:
    """Base weights by their commit, or by their configuration and the names and sizes of their files."""
    if revision is not None:
        return f"commit {revision}"
    files = sorted(f for f in Path(folder).glob("*") if f.suffix == ".safetensors" or f.name == "config.json")
    facts = [(f.name, f.stat().st_size if f.suffix == ".safetensors" else sha256(f)) for f in files]
    return f"files {hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def versions() -> dict[str, str]:
    """Of all that can change a bit."""
    found = {"lorica": lorica.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`key (value then, value now)` of what was known then and is another now; keys that are new to this version are not compared."""
    return [f"{key} ({as_typed(then[key])} then, {as_typed(now.get(key))} now)" for key in then if key not in now or then[key] != now[key]]


def check_same(folder: object, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with something else.

    Raises:
        ConfigError: with each difference.
    """
    if differing := differences(then, now):
        raise ConfigError(
            "resume",
            folder,
            f"the run can't go on to the same weights: {'; '.join(differing)}",
            f"{pasted('resume', str(folder))} with nothing else, or a new run",
        )

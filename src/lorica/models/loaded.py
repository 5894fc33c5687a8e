"""The model of a run, made ready to train: tokenizer and encoded data first, then weights and adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorica.config import ConfigError, TrainConfig
from lorica.data import token_contract
from lorica.data.encoding import build_encoder
from lorica.data.module import LoricaDataModule
from lorica.hardware import Machine
from lorica.hub import TINY
from lorica.kernels import attention, dropout
from lorica.kernels.layers import Layers
from lorica.launch import wait_for_all
from lorica.models import adapters, base, freezing, weights


@dataclass
class Loaded:
    """The model with its adapters, its tokenizer, and where it came from.

    attention: transformers' name of what computes it, or the package that variable-length attention is by. padded: batches must be
    padded, for there is no variable-length attention. layers: how its layers run in training.
    """

    model: Any
    tokenizer: Any
    base: base.Base
    attention: str
    padded: bool
    layers: Layers


@dataclass
class Prepared:
    """What is known of a model before its weights are read: where they are, its architecture and its tokenizer."""

    base: base.Base
    architecture: Any
    tokenizer: Any


def prepare(
    config: TrainConfig,
    data: LoricaDataModule,
    folder: Path,
    main: bool,
    goes_on: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """The tokenizer, `data` encoded by it, and the run's token contract, which is compared where the run goes on.

    Args:
        folder: the run's; a tiny Mistral is built there, by the main rank. goes_on: the run was begun before.
        progress: told (examples encoded, examples in all) every so often.
    Raises:
        ConfigError: a base that can't be had, or that can't do what is asked; other tokens than those that the run began with.
    """
    settings = config.model
    name = settings.base
    if name == TINY:
        name = str(base.build_tiny_mistral(folder / "base", config.seed) if main else folder / "base")
        wait_for_all()
    found = base.find_base(name, settings.revision)
    architecture = base.load_config(found, settings)
    tokenizer = base.load_tokenizer(found)
    task = weights.asked(config, data)
    if goes_on:
        token_contract.check(folder, task, tokenizer, key="resume")
    elif main:
        token_contract.write(folder, token_contract.made(task, tokenizer))
    data.encode(build_encoder(task, tokenizer), progress)
    return Prepared(found, architecture, tokenizer)


def load(config: TrainConfig, data: LoricaDataModule, machine: Machine, prepared: Prepared) -> Loaded:
    """Weights and adapters on the machine's device.

    Raises:
        ConfigError: a base that can't do what is asked.
    """
    settings = config.model
    found, architecture, tokenizer = prepared.base, prepared.architecture, prepared.tokenizer
    attn = base.attention_name(settings.attn_implementation, architecture, settings.task, machine.device, machine.compute_dtype)
    package = settings.attn_implementation if settings.attn_implementation in attention.INSTALLED else None
    if package is not None:
        try:
            attention.use_installed(package, machine.device)
        except (ImportError, RuntimeError) as e:
            why, fix = f"torch can't use it here ({e})", "that package, in a version for this torch, or model.attn_implementation=auto"
            raise ConfigError("model.attn_implementation", package, why, fix) from None
    torch.manual_seed(config.seed)  # a classifier's head and the adapters start from here
    model = base.load_model(
        found,
        settings,
        architecture,
        tokenizer,
        device=machine.device,
        dtype=machine.compute_dtype if settings.lora is not None else torch.float32,
        labels=data.labels,
        attn=attn,
        quantization=settings.quantization if settings.quantization and settings.quantization.load_in_4bit else None,
    )
    if settings.lora is not None:
        last = freezing.Last(model, settings) if settings.train_layers is not None else None
        model = adapters.attach(model, settings.lora, settings.task, found.revision, last)
        model.get_base_model().name_or_path = found.name
        for active in model.peft_config.values():
            active.base_model_name_or_path = found.name
    elif settings.train_layers is not None:
        freezing.freeze(model, settings)
    if machine.device.type == "cpu":
        dropout.install(model)
        if attn == "sdpa" and settings.attn_implementation == "auto":
            attn = attention.make_dense(model.get_base_model() if settings.lora is not None else model)
    layers = Layers(model)
    if machine.device.type == "cuda":
        layers.seed_dropout(model, machine.device)
    return Loaded(model, tokenizer, found, package or attn, padded=attn != attention.VARLEN, layers=layers)

"""Under `trainer.precision=16-mixed` whatever is trained is in fp32, so that the gradient scaler never meets fp16 gradients: torch's CPU
scaler refuses them as the GPU's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.composition import compose
from lorica.config import TrainConfig
from lorica.data.module import Batching, LoricaDataModule
from lorica.data.registry import build_data
from lorica.hardware import Machine
from lorica.models.loaded import Loaded, load, prepare
from lorica.models.module import CausalLMModule, LoricaModule, SequenceClassifierModule
from lorica.models.optimizers import build_optimizer

MACHINE = Machine("cpu", 1, torch.device("cpu"), 0, 1, "16-mixed")
MISTRAL, PLAIN = ["model=tiny_mistral_qlora", "data=sentiment"], "model.quantization=null"
WHAT = {
    "4-bit": MISTRAL,
    "fp16 base": [*MISTRAL, PLAIN],
    "DoRA in 4 bits": [*MISTRAL, "model.lora.use_dora=true"],
    "DoRA": [*MISTRAL, PLAIN, "model.lora.use_dora=true"],
    "head with an adapter": [*MISTRAL, "model.lora.target_modules=[q_proj,lm_head]"],
    "trained head and norm": [*MISTRAL, "model.lora.modules_to_save=[lm_head,norm]"],
    "trained layers": [*MISTRAL, PLAIN, "model.lora.modules_to_save=[down_proj]"],
    "last layers": [*MISTRAL, "model.train_layers=last_2"],
    "whole": [*MISTRAL, PLAIN, "model.lora=null"],
    "last layers whole": [*MISTRAL, PLAIN, "model.lora=null", "model.train_layers=last_1"],
    "classifier on a causal base": [*MISTRAL, "model.task=sequence_classification"],
    "encoder": ["model=minilm_lora"],
    "encoder in 4 bits": ["model=minilm_qlora"],
    "encoder's adapted biases": ["model=minilm_lora", "model.lora.bias=lora_only"],
    "encoder's biases": ["model=minilm_lora", "model.lora.bias=all"],
    "whole encoder": ["model=minilm_full"],
}


def _loaded(settings: list[str], base: Path, folder: Path) -> tuple[TrainConfig, LoricaDataModule, Loaded]:
    settings = [*settings, f"model.base={base}"] if "model=tiny_mistral_qlora" in settings else settings
    config = compose("train", [*settings, "debug=fast"])
    data = build_data(config.data, 0)
    data.load()
    prepared = prepare(config, data, folder, True, False)
    return config, data, load(config, data, MACHINE, prepared)


def _module(config: TrainConfig, data: LoricaDataModule, loaded: Loaded) -> LoricaModule:
    plan = {"batch_size": 4, "tokens_per_batch": None, "accumulate": 1, "group_by_length": True, "max_epochs": 1, "max_steps": 2}
    data.connect(Batching(loaded.tokenizer.pad_token_id, loaded.padded, 1024, 1, 0, plan))
    cls = CausalLMModule if config.model.task == "causal_lm" else SequenceClassifierModule
    return cls(loaded.model, config.optimizer, 2, fused=False).train()


def _step(module: LoricaModule, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A scaled step; the gradients that it took."""
    optimizer = build_optimizer(module, module.optimizer_config, "adamw", fused=False, joined=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with torch.autocast("cpu", torch.float16):
        loss = module.loss_sum(batch) * batch["weight"]
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    scaler.step(optimizer)
    return gradients


@pytest.mark.parametrize("what", WHAT)
def test_a_scaled_step_is_taken(what: str, tiny_mistral: Path, tmp_path: Path) -> None:
    config, data, loaded = _loaded(WHAT[what], tiny_mistral, tmp_path)
    trained = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    if config.model.lora is not None:
        frozen = [p.dtype for p in loaded.model.parameters() if not p.requires_grad and p.is_floating_point()]
        assert torch.float16 in frozen and torch.bfloat16 not in frozen
    module = _module(config, data, loaded)
    gradients = _step(module, data.training_batch(0, 0))
    assert gradients and {g.dtype for g in gradients.values()} == {torch.float32}
    assert all(bool(g.isfinite().all()) for g in gradients.values()) and any(bool(g.any()) for g in gradients.values())


def test_fp16_adapters_would_be_refused(tiny_mistral: Path, tmp_path: Path) -> None:
    config, data, loaded = _loaded(WHAT["4-bit"], tiny_mistral, tmp_path)
    for p in loaded.model.parameters():
        if p.requires_grad:
            p.data = p.data.half()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        _step(_module(config, data, loaded), data.training_batch(0, 0))

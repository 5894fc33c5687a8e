"""The fast path as a whole (flat batches filled up, layers computed again, our LoRA forward, the head at supervised places in tiles)
gives the losses and gradients of transformers, PEFT and bitsandbytes as they come."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lorica.config import OptimizerConfig
from lorica.data.collate import collate_causal, fill, pad
from lorica.data.encoding import IGNORE, Encoded
from lorica.data.shapes import Shape
from lorica.kernels import attention, frozen, lora_linear
from lorica.kernels.layers import Layers
from lorica.models.module import CausalLMModule

PAD = 3
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    path = tmp_path_factory.mktemp("mistral")
    MistralForCausalLM(config).save_pretrained(path)
    return path


def _model(folder: Path, bits: int, **lora: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    more = {"quantization_config": nf4, "device_map": {"": "cpu"}} if bits == 4 else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM", init_lora_weights=False, **lora)
    return get_peft_model(model, config).train()


def _rows() -> list[Encoded]:
    generator = torch.Generator().manual_seed(2)
    rows = []
    for n in (5, 33, 20, 11):
        ids = torch.randint(4, 512, (n,), generator=generator).tolist()
        rows.append(Encoded(ids, [IGNORE] * (n // 2) + ids[n // 2 :]))
    return rows


def _plain(model: Any, rows: list[Encoded]) -> torch.Tensor:
    """transformers' own loss, summed over what is learnt."""
    ids, mask = pad([r.ids for r in rows], PAD)
    labels, _ = pad([r.labels for r in rows], IGNORE)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


def _gradients(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("bits", "resident", "recomputed", "offload"), [(4, False, 0, False), (4, True, 2, False), (32, False, 3, True)])
@pytest.mark.usefixtures("varlen_on_cpu")
def test_loss_and_gradients(
    folder: Path, bits: int, resident: bool, recomputed: int, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorica.kernels import loss

    monkeypatch.setattr(loss, "TILE_ELEMENTS", 512 * 8)  # several tiles
    rows = _rows()
    plain = _model(folder, bits)
    expected_loss = _plain(plain, rows)
    expected = _gradients(expected_loss, plain)

    fast = _model(folder, bits)
    assert lora_linear.install(fast) == 3 * len(LINEAR)
    frozen.prepare_layers(fast, torch.float32, fp8=False, resident=resident)
    layers = Layers(fast)
    layers.recomputed, layers.offload = recomputed, offload
    fast.get_base_model().set_attn_implementation(attention.VARLEN)
    module = CausalLMModule(fast, OptimizerConfig(), 1)
    batch = fill(collate_causal(rows, PAD, padded=False), Shape(96, 8, 48, 33), PAD)
    assert batch["input_ids"].shape == (1, 96) and len(batch["cu_seqlens"]) == 9 and len(batch["targets"]) == 48
    ours = module.loss_sum(batch)
    torch.testing.assert_close(ours, expected_loss, rtol=1e-6, atol=0.0)
    for name, gradient in _gradients(ours, fast).items():
        reference = expected[name]
        assert (gradient - reference).norm() <= 1e-5 * reference.norm(), name


@pytest.mark.parametrize("bits", [4, 32])
def test_fp8_is_near(folder: Path, bits: int) -> None:
    rows, model = _rows(), _model(folder, bits)
    exact = _gradients(_plain(model, rows), model)
    model.zero_grad()
    lora_linear.install(model)
    frozen.prepare_layers(model, torch.float32, fp8=True, resident=False)
    rough = _gradients(_plain(model, rows), model)
    errors = [float((rough[name] - g).norm() / g.norm()) for name, g in exact.items()]
    assert 1e-3 < max(errors) < 0.25 and sum(errors) / len(errors) < 0.12

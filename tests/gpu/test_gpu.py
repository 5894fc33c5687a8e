"""On an NVIDIA GPU: padding-free batches equal padded ones, NF4 adapters train, and what was trained is what is predicted."""

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.cli import main
from lorica.data.collate import collate_causal
from lorica.data.encoding import IGNORE, Encoded
from lorica.kernels import attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def _mistral(attn: str, window: int | None = None) -> torch.nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    attention.register()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=window,
    )
    model = MistralForCausalLM(config).to("cuda", torch.bfloat16)
    model.set_attn_implementation(attn)
    return model


def _bert(folder: Path, tiny_mistral: Path, spread: float = 0.02) -> Path:
    """A small encoder of random weights, whose standard deviation is `spread`."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_mistral)
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id or 0, initializer_range=spread, **shape)
    BertModel(config).save_pretrained(folder)
    return folder


def _rows() -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for n in (5, 33, 64, 17):
        ids = torch.randint(4, 512, (n,), generator=generator).tolist()
        rows.append(Encoded(ids, [IGNORE] * (n // 2) + ids[n // 2 :]))
    return rows


@pytest.mark.parametrize("window", [None, 16])
def test_flat_logits_equal_padded_logits(window: int | None) -> None:
    from lorica.config import OptimizerConfig
    from lorica.models.module import CausalLMModule

    logits = {}
    for attn, padded in (("sdpa", True), (attention.VARLEN, False)):
        module = CausalLMModule(_mistral(attn, window), OptimizerConfig(), 1).eval()
        batch = collate_causal(_rows(), 3, padded)
        batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with torch.no_grad():
            logits[attn] = module.logits_at(batch).float()
    a, b = logits["sdpa"], logits[attention.VARLEN]
    assert (a - b).norm() / a.norm() < 2e-2


@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (33, 192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantised_weights_are_bitsandbytes_own(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from lorica.kernels import nf4

    weight = torch.randn(*shape, device="cuda", dtype=dtype) * 0.02
    for kind in ("nf4", "fp4"):
        codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=kind)
        assert nf4.covers(codes, state)
        assert torch.equal(nf4.dequantize(codes, state), dequantize_4bit(codes, state))


@pytest.mark.parametrize(("heads", "kv_heads", "size", "causal"), [(4, 4, 64, False), (8, 2, 128, True)])
def test_our_attention_is_torchs_and_has_the_same_bits_each_time(heads: int, kv_heads: int, size: int, causal: bool) -> None:
    from lorica.kernels import varlen

    torch.manual_seed(0)
    lengths = [5, 70, 0, 64, 1, 130, 700]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    q, k, v = (
        torch.randn(sum(lengths), n, size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (heads, kv_heads, kv_heads)
    )
    g = torch.randn_like(q)

    def with_gradients(own: bool) -> tuple[torch.Tensor, ...]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(varlen, "LONGEST", 1000 if own else 0)
            out = attention._varlen(q, k, v, ends, 700, causal, None, size**-0.5)
        return out, *torch.autograd.grad(out, (q, k, v), g)

    assert varlen.covers(q, 700, None)
    ours = with_gradients(True)
    assert all(map(torch.equal, ours, with_gradients(True)))
    for x, y in zip(ours, with_gradients(False), strict=True):
        assert (x - y).float().norm() < 5e-3 * y.float().norm()


def test_a_mask_that_follows_from_a_seed_is_the_same_on_every_way() -> None:
    from lorica.kernels import dropout

    seed = torch.empty(2, dtype=torch.int32).random_()
    x = torch.randn(100, 333, dtype=torch.bfloat16)
    compiled = torch.compile(dropout.seeded, dynamic=False)
    for start in (0, 777):
        wanted = dropout.seeded(x, seed, 0.1, start)
        assert torch.equal(wanted != 0, dropout.kept(x, seed, 0.1, start) & (x != 0))
        assert torch.equal(dropout.kept(x.cuda(), seed.cuda(), 0.1, start).cpu(), dropout.kept(x, seed, 0.1, start))
        assert torch.equal(dropout.seeded(x.cuda(), seed.cuda(), 0.1, start).cpu(), wanted)
        assert torch.equal(compiled(x.cuda(), seed.cuda(), 0.1, start).cpu(), wanted)


@pytest.mark.parametrize("resident", [False, True])
def test_products_in_fp8_are_near_those_in_bf16(resident: bool) -> None:
    from bitsandbytes.nn import Linear4bit

    from lorica.kernels import frozen

    torch.manual_seed(0)
    base = Linear4bit(192, 320, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cuda")
    x, g = (torch.randn(70, n, device="cuda", dtype=torch.bfloat16) for n in (192, 320))
    down, up, back = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((70, 8), (8, 320), (8, 192)))

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        kept = frozen.tensors(base)
        return frozen.product(x, base, *kept, down, up).float(), frozen.back_product(g, base, *kept, down, back).float()

    exact = both()
    frozen.prepare(base, torch.bfloat16, fp8=True, resident=resident)
    rough = both()
    for a, b in zip(exact, rough, strict=True):
        assert 1e-4 < (a - b).norm() / a.norm() < 0.06


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_flat_encoders_equal_padded_ones(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from lorica.config import OptimizerConfig
    from lorica.data.collate import collate_classifier
    from lorica.models.module import SequenceClassifierModule

    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, num_hidden_layers=3, hidden_size=256, num_attention_heads=4, intermediate_size=512, pad_token_id=1)
    model = AutoModelForSequenceClassification.from_config(config).to("cuda", torch.bfloat16).eval()
    logits = []
    for attn, padded in (("sdpa", True), (attention.VARLEN, False)):
        model.set_attn_implementation(attn)
        batch = collate_classifier(_rows(), 1, padded)
        batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with torch.no_grad():
            logits.append(SequenceClassifierModule(model, OptimizerConfig(), 1).logits(batch))
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < 2e-2


TINY = ["model=tiny_mistral_qlora", "data=sentiment", "trainer.tokens_per_batch=1024", "trainer.max_steps=70", "trainer.max_epochs=-1"]
WAYS = {
    "plain": ["trainer.compile=false"],
    "compiled": ["trainer.cuda_graphs=false"],
    "captured": [],
    "recomputed": ["trainer.gradient_checkpointing=2"],
    "offloaded": ["trainer.gradient_checkpointing=offload", "trainer.offload_embeddings=true"],
    "dequantised for each use": ["trainer.resident_weights=false"],
    "fp8": ["trainer.fp8=true"],
    "dropout": ["model.lora.lora_dropout=0.1", "trainer.cuda_graphs=false"],
    "dropout captured": ["model.lora.lora_dropout=0.1"],
    "dropout recomputed": ["model.lora.lora_dropout=0.1", "trainer.gradient_checkpointing=true"],
}


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_gradient_that_is_no_number_reaches_no_weight(name: str) -> None:
    """And nobody waits for the device to tell."""
    from lorica.config import OptimizerConfig
    from lorica.models.optimizers import build_optimizer
    from lorica.models.skipping import SkipSteps

    net = torch.nn.Linear(128, 128, bias=False).cuda()
    optimizer = build_optimizer(net, OptimizerConfig(name=name, lr=0.1), name, fused=True, joined=True)
    skipping, before = SkipSteps(), net.weight.detach().clone()
    for step, value in enumerate((1.0, float("nan"), 1.0), 1):
        assert net.weight.grad is not None
        net.weight.grad.fill_(value)
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        norm = torch.nn.utils.get_total_norm([p.grad for g in optimizer.param_groups for p in g["params"]])
        skipping.before_update(optimizer, norm, step, scaled=False)
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        skipping.after_update()
    assert skipping.read() == [2] and skipping.skipped == 1
    assert net.weight.isfinite().all() and not torch.equal(net.weight, before)


def test_all_ways_to_run_learn_the_same(tmp_path: Path) -> None:
    """Each as a process of its own, all at once."""
    from transformers import AutoModelForCausalLM

    from lorica.models.base import build_tiny_mistral

    base = build_tiny_mistral(tmp_path / "base", 0)
    tied = AutoModelForCausalLM.from_pretrained(base)
    tied.config.tie_word_embeddings = False
    head = tied.get_input_embeddings().weight.detach().clone()
    tied.lm_head.weight = torch.nn.Parameter(head)
    tied.save_pretrained(base)
    running = {}
    for name, settings in WAYS.items():
        arguments = [*TINY, f"model.base={base}", f"run_dir={tmp_path / name}", *settings]
        command = [sys.executable, "-m", "lorica", "train", *arguments]
        running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = {name: process.communicate(timeout=400)[0] for name, process in running.items()}
    assert not [name for name, process in running.items() if process.returncode], printed
    losses = {name: json.loads((tmp_path / name / "metrics.json").read_text())["test/loss"] for name in WAYS}
    for name, loss in losses.items():
        same = losses["dropout" if name.startswith("dropout") else "plain"]
        assert abs(loss - same) < (0.03 if name == "fp8" else 0.01) * same, losses
    assert losses["plain"] < 6, losses  # 7.3 before training; a run on a CPU ends at 4.7
    assert all("captured as CUDA graphs" in printed[name] for name in ("captured", "dropout captured", "dropout recomputed")), printed
    assert "could not be captured" not in "".join(printed.values())
    assert "2 of 4 computed again" in printed["recomputed"]


def test_steps_do_not_wait_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two records of the loss nothing asks the device for a value."""
    from lorica.callbacks import SeedSteps

    plain = SeedSteps.on_train_batch_start

    def watched(self: SeedSteps, trainer: Any, module: Any, batch: Any, k: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if 30 <= k < 50 else "default")
        plain(self, trainer, module, batch, k)

    monkeypatch.setattr(SeedSteps, "on_train_batch_start", watched)
    more = ["optimizer.name=paged_adamw_8bit", "trainer.log_every_n_steps=60", "trainer.val_check_interval=60"]
    with pytest.raises(SystemExit) as end:
        main("train", [*TINY, *more, f"run_dir={tmp_path / 'run'}"])
    torch.cuda.set_sync_debug_mode("default")
    assert end.value.code == 0, (tmp_path / "run" / "train.log").read_text()[-3000:]


@pytest.mark.parametrize("data", ["sentiment", "healthcare_qa"])
def test_a_4bit_model_trains_and_is_found_again(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    steps = ["trainer.max_epochs=4", "trainer.tokens_per_batch=1024", "trainer.compile=false", "trainer.gradient_checkpointing=true"]
    steps += ["data.max_generated_examples=4", "data.max_new_tokens=16"] if data == "healthcare_qa" else []
    with pytest.raises(SystemExit) as end:
        main("train", ["model=tiny_mistral_qlora", f"data={data}", f"run_dir={run}", *steps])
    assert end.value.code == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test/loss"] < 8.0 and metrics["memory/peak_gib"] > 0
    assert "varlen" in (run / "train.log").read_text()
    capsys.readouterr()
    row = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])
    with pytest.raises(SystemExit) as end:
        main("predict", [f"run={run}", 'text="hello there"'])
    assert end.value.code == 0 and capsys.readouterr().out.strip()
    assert row["text"]


def test_captured_forwards_score_as_launched_ones_and_alike_each_time(
    tmp_path: Path, tiny_mistral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorica import scoring
    from lorica.answering import Predictor
    from lorica.data.examples import Example
    from lorica.models.trained import load_trained

    run, bert = tmp_path / "run", _bert(tmp_path / "bert", tiny_mistral, spread=0.1)
    learnt = [f"model.base={bert}", "data=ag_news", "data.max_train_examples=64", "trainer.max_epochs=2", "trainer.precision=bf16-mixed"]
    with pytest.raises(SystemExit) as end:
        main("train", ["model=minilm_lora", *learnt, f"run_dir={run}"])
    assert end.value.code == 0
    with (run / "predictions.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line in file]
    examples = [Example("", text=f"{text} {i}") for i in range(5) for text in texts[: 20 * (i + 1)]]
    predictor = Predictor(load_trained(run, torch.device("cuda", 0)))
    launched, place = predictor.scorer.score(examples)
    monkeypatch.setattr(scoring, "CAPTURED_TOKENS", 4096)
    assert predictor.scorer.can_capture
    predictor.scorer.capture(examples[:20])
    captured, order = predictor.scorer.score(examples)
    assert predictor.scorer._captured is not None and order.tolist() == list(range(len(examples)))
    torch.testing.assert_close(captured, launched[torch.from_numpy(place)], rtol=0, atol=0.02)
    assert captured.std(0).min() > 0.05
    assert torch.equal(predictor.scorer.score(examples)[0], captured)


FLAT = ["model.attn_implementation=varlen", "trainer.compile=true"]
# random weights learn a few rows only
BY_HEART = ["model.base={bert}", "data=ag_news", "data.max_train_examples=64", "trainer.max_epochs=20"]
HALF = {
    "4-bit": ["model=tiny_mistral_qlora", "optimizer.name=paged_adamw_8bit"],
    "trained head": ["model=tiny_mistral_qlora", "model.lora.modules_to_save=[lm_head,norm]"],
    "head with an adapter": ["model=tiny_mistral_qlora", "model.lora.target_modules=[q_proj,lm_head]", "model.lora.lora_dropout=0.1"],
    "DoRA": ["model=tiny_mistral_qlora", "model.lora.use_dora=true"],
    "last layers": ["model=tiny_mistral_qlora", "model.train_layers=last_2", "trainer.gradient_checkpointing=true"],
    "last layers, flat and compiled": ["model=tiny_mistral_qlora", "model.train_layers=last_2", *FLAT],
    "last layers, computed again": ["model=tiny_mistral_qlora", "model.train_layers=last_3", *FLAT, "trainer.gradient_checkpointing=2"],
    "whole": ["model=tiny_mistral_qlora", "model.lora=null", "model.quantization=null", "optimizer.lr=5e-4"],
    "encoder with biases": ["model=minilm_lora", "model.lora.bias=all", *BY_HEART],
    "whole encoder": ["model=minilm_full", "optimizer.lr=3e-4", *BY_HEART],
}


@pytest.mark.parametrize("what", HALF)
def test_whatever_is_trained_trains_in_fp16_with_a_scaler(what: str, tmp_path: Path, tiny_mistral: Path) -> None:
    """As on a T4: padded, not compiled, gradients unscaled before they are clipped."""
    padded = [] if set(FLAT) <= set(HALF[what]) else ["model.attn_implementation=sdpa"]
    steps = [
        "trainer=gpu_16gb_t4",
        "trainer.accumulate_grad_batches=1",
        "trainer.log_every_n_steps=1",
        "data.max_test_examples=32",
        *padded,
    ]
    run = tmp_path / "run"
    asked = HALF[what] if set(BY_HEART) <= set(HALF[what]) else [*HALF[what], "data=sentiment", "trainer.max_epochs=3"]
    asked = [setting.format(bert=_bert(tmp_path / "bert", tiny_mistral)) for setting in asked]
    with pytest.raises(SystemExit) as end:
        main("train", [*asked, *steps, f"run_dir={run}"])
    log = (run / "train.log").read_text()
    assert end.value.code == 0, log[-3000:]
    assert "precision 16-mixed" in log and ("varlen" in log) == (not padded)
    assert json.loads((run / "metrics.json").read_text())["train/skipped_steps"] <= 4  # while the scaler finds its scale
    with (run / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) > 8 and sum(losses[-4:]) < sum(losses[:4]), losses


def test_an_encoder_with_adapters_and_dropout_trains(tiny_mistral: Path, tmp_path: Path) -> None:
    """Its weights are loaded on the host and moved, other than 4-bit ones."""
    base, run = _bert(tmp_path / "bert", tiny_mistral), tmp_path / "run"
    steps = ["trainer.max_epochs=1", "trainer.tokens_per_batch=2048", "trainer.compile=true"]
    with pytest.raises(SystemExit) as end:
        main("train", ["model=roberta_lora", f"model.base={base}", "data=ag_news", f"run_dir={run}", *steps])
    assert end.value.code == 0, (run / "train.log").read_text()[-3000:]
    assert "captured as CUDA graphs" in (run / "train.log").read_text()


def test_the_doctor_finds_the_gpu_sound(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorica", "doctor", "--json", "timeout=120"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    for name in ("torch", "gpu", "compiler", "triton", "bitsandbytes", "attention"):
        assert checks[name]["verdict"] == "ok", checks[name]
    assert "took a step" in checks["bitsandbytes"]["found"] and "compiled a kernel" in checks["triton"]["found"]


def test_a_run_takes_its_micro_batches_in_parts_where_the_card_is_small(tmp_path: Path, tiny_mistral: Path) -> None:
    words = ["river", "stone", "music", "paper", "winter", "garden", "engine", "letter"]
    rows = [" ".join(words[(i * k) % 8] for k in range(1, 60)) for i in range(4000)]
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"{row},{i % 2}\n" for i, row in enumerate(rows)))
    program = """
import sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]) * 2**30 / torch.cuda.get_device_properties(0).total_memory)
from lorica.cli import main
main("train", sys.argv[2:])
"""
    settings = ["model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "data=classification", "data.source=files"]
    settings += [f"data.path={tmp_path / 'train.csv'}", "data.max_leakage=1", "data.near_duplicate_similarity=null"]
    settings += ["data.max_validation_examples=8", "data.max_test_examples=8", "trainer.tokens_per_batch=65536"]
    settings += ["trainer.max_steps=3", "trainer.log_every_n_steps=1", "trainer.compile=false"]
    losses, peaks, printed = {}, {}, {}
    for gib in (16, 0.7):
        folder = tmp_path / str(gib)
        done = subprocess.run(
            [sys.executable, "-c", program, str(gib), *settings, f"run_dir={folder}"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        table = (folder / "metrics.csv").read_text().splitlines()
        column = table[0].split(",").index("train/loss")
        losses[gib] = [float(line.split(",")[column]) for line in table[1:] if line.split(",")[column]]
        peaks[gib] = json.loads((folder / "metrics.json").read_text())
        printed[gib] = done.stdout
    assert "parts" in printed[0.7] and "parts, with the same rows" not in printed[16]
    assert peaks[0.7]["memory/peak_gib"] < 0.7 < peaks[16]["memory/peak_gib"]
    assert losses[0.7] == pytest.approx(losses[16], rel=1e-3)
    assert all("memory/predicted_gib" in figures and "GiB expected at the peak" in printed[gib] for gib, figures in peaks.items())


def test_weights_that_lie_end_to_end_are_saved_without_a_copy_on_the_gpu(tmp_path: Path) -> None:
    from lorica.models.optimizers import end_to_end
    from lorica.models.weights import in_host_memory

    model: Any = _mistral("eager").float()
    whole = end_to_end(list(model.parameters()))  # they share its memory
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.save_pretrained(tmp_path, state_dict=in_host_memory(model))
    assert torch.cuda.max_memory_allocated() - before < 1 << 16 < sum(p.nbytes for p in whole)
    own = model.state_dict()
    assert all(torch.equal(value, own[name].cpu()) for name, value in type(model).from_pretrained(tmp_path).state_dict().items())


@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_4bit_layer_gives_what_bitsandbytes_gives(bias: bool) -> None:
    from bitsandbytes.nn import Linear4bit

    from lorica.kernels import frozen

    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 512, bias=bias)
    ran = []
    for fast in (False, True):
        own = torch.nn.Sequential(Linear4bit(256, 512, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4"))
        own[0].load_state_dict(layer.state_dict())
        own = own.to("cuda").requires_grad_(False).train()
        assert not fast or frozen.install(own) == 1
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16).requires_grad_()
        y = own(x)
        y.float().square().sum().backward()
        ran.append((y.detach(), x.grad))
    for plain, ours in zip(*ran, strict=True):
        assert torch.allclose(plain, ours, rtol=2e-2, atol=2e-2 * float(plain.abs().max()))

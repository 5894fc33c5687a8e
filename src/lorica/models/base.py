"""Base models: where their files are, their tokenizer and pad token, 4-bit loading, dtype."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorica.beside_weights import check_shards, read_object, refuse_outside
from lorica.checks import check_layers, positions_of
from lorica.config import ConfigError, ModelConfig, QuantizationSettings
from lorica.durable import replaced_folder
from lorica.hub import PACKAGED, hub_errors, packaged, resolve_revision
from lorica.kernels import attention
from lorica.models.sequence_classifier import takes_flat
from lorica.screen import quiet_transformers

# Tokens that tokenizers keep for padding, or keep spare.
PAD_NAMES = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|finetune_right_pad_id|>",
    "<|padding|>",
    "<|reserved_special_token_0|>",
    "<|extra_0|>",
    "[control_8]",
)


@dataclass(frozen=True)
class Base:
    """A base model's files. name: what adapters record (a hub name or an absolute folder). path: what is loaded."""

    name: str
    path: str
    revision: str | None = None


def find_base(name: str, revision: str | None, key: str = "model.base") -> Base:
    """A local folder, the weights of an installed package, or the hub at a resolved commit.

    Raises:
        ConfigError: not found, gated, or unreachable (within 10 s).
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(key, name, "has no config.json", "a folder that from_pretrained can load")
        if revision is not None and key == "model.base":
            raise ConfigError("model.revision", revision, f"{name} is a folder, which has no revisions", "model.revision=null")
        check_shards(folder, key)
        return Base(str(folder.resolve()), str(folder.resolve()), None)
    if name in PACKAGED and revision is None:
        package, _, digest = PACKAGED[name]
        if (home := packaged(name)) is not None:
            if _sha256(home / "model.safetensors") != digest:
                raise ConfigError(
                    key, name, f"the package {package} does not carry the published weights (sha256 differs)", "install it again"
                )
            return Base(name, str(home), None)
    return Base(name, name, resolve_revision(name, revision, "model", key))


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def _reading(base: Base, key: str, what: str) -> Iterator[None]:
    """Turn whatever a loader makes of files from anywhere into one line: their values reach its code as they are.

    Raises:
        ConfigError: for all but a lack of memory.
    """
    with hub_errors(key, base.name):
        try:
            yield
        except (ConfigError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as e:
            if isinstance(e, OSError) and not Path(base.path).is_dir():
                raise  # the hub's
            raise ConfigError(key, base.name, f"{what}: {' '.join(str(e).split())[:300] or type(e).__name__}") from None


def load_config(base: Base, model: ModelConfig) -> Any:
    """The architecture's configuration.

    Raises:
        ConfigError: unknown architecture, `model.max_length` above its positions, or `model.train_layers` above its layers.
    """
    from transformers import AutoConfig

    if Path(base.path).is_dir():
        read_object(Path(base.path) / "config.json", "model.base")
    with _reading(base, "model.base", "transformers can't read its configuration"):
        config = AutoConfig.from_pretrained(base.path, revision=base.revision, trust_remote_code=False)
    positions = positions_of(config.to_dict())
    if positions is not None and model.max_length > positions:
        raise ConfigError("model.max_length", model.max_length, f"{base.name} has {positions} positions", f"model.max_length={positions}")
    if isinstance(layers := getattr(config.get_text_config(), "num_hidden_layers", None), int):
        check_layers(model, layers)
    return config


def load_tokenizer(base: Base, key: str = "model.base") -> Any:
    """The tokenizer with a pad token that is not eos, right-padded."""
    from transformers import AutoTokenizer

    with _reading(base, key, "its tokenizer can't be read"):
        tokenizer = AutoTokenizer.from_pretrained(base.path, revision=base.revision, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ConfigError(
            key, base.name, "its tokenizer has no fast version (tokenizer.json), which is needed to tell prompts from answers"
        )
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = 10**9  # lengths are ours to watch
    choose_pad_token(tokenizer)
    return tokenizer


def choose_pad_token(tokenizer: Any) -> None:
    """The tokenizer's own pad token; else a spare or unknown token of its vocabulary; else a new one. Never eos: a model
    trained with pad = eos does not learn to stop (unslothai/unsloth#416)."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    spare = [name for name in PAD_NAMES if name in vocabulary]
    unknown = [tokenizer.unk_token] if tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id else []
    if spare or unknown:
        tokenizer.pad_token = (spare or unknown)[0]
    else:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})


def quantization_config(settings: QuantizationSettings, compute: torch.dtype, keep: list[str]) -> Any:
    """bitsandbytes' configuration. keep: modules left unquantised (those that are trained whole)."""
    from transformers import BitsAndBytesConfig

    named = settings.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute if named == "auto" else getattr(torch, named),
        llm_int8_skip_modules=keep or None,
    )


def attention_name(requested: str, architecture: Any, task: str, device: torch.device, dtype: torch.dtype) -> str:
    """transformers' name of the attention to use; varlen only where batches can be laid end to end.

    Args:
        dtype: of the arithmetic: variable-length kernels take bf16 and fp16.
    Raises:
        ConfigError: varlen was asked for where it can't be.
    """
    flat = dtype != torch.float32 and takes_flat(architecture, task)
    available = attention.varlen_available(device)
    asked = requested == "varlen" or requested in attention.INSTALLED
    if asked and not (available and flat):
        reason = "needs bf16 or fp16, and an architecture whose head is known" if available else "needs an NVIDIA GPU from Ampere on"
        raise ConfigError("model.attn_implementation", requested, reason, "model.attn_implementation=auto")
    majors = attention.INSTALLED.get(requested, ("", ()))[1]
    if majors and torch.cuda.get_device_capability(device)[0] not in majors:
        reason = f"is for GPUs of compute capability {' and '.join(f'{major}.x' for major in majors)}"
        raise ConfigError("model.attn_implementation", requested, reason, "model.attn_implementation=auto")
    if asked or (requested == "auto" and available and flat):
        return attention.VARLEN
    if requested != "auto":
        return requested
    cls = loader(task)._model_mapping.get(type(architecture), None)
    return "sdpa" if getattr(cls, "_supports_sdpa", True) else "eager"


def loader(task: str) -> Any:
    """transformers' class that loads models for a task."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification


def unquantized(model: ModelConfig) -> list[str]:
    """Modules that stay as they are where the others are quantised: heads, and what is trained whole."""
    heads = ["classifier", "score"] if model.task == "sequence_classification" else ["lm_head", "embed_out"]
    return [*((model.lora.modules_to_save or []) if model.lora else []), *heads]


def _fit_config(config: Any, task: str, tokenizer: Any, labels: list[str] | None) -> None:
    """Tell the architecture's configuration the classes and the pad token."""
    if task == "sequence_classification":
        assert labels is not None
        config.num_labels, config.id2label, config.label2id = (
            len(labels),
            dict(enumerate(labels)),
            {name: i for i, name in enumerate(labels)},
        )
        config.problem_type = "single_label_classification"
    if tokenizer.pad_token_id < config.get_text_config().vocab_size:  # a new one gets its row after loading
        config.pad_token_id = tokenizer.pad_token_id


def empty_model(model: ModelConfig, config: Any, tokenizer: Any, labels: list[str] | None) -> Any:
    """The modules of `load_model`'s model without weights: all tensors are on the meta device."""
    _fit_config(config, model.task, tokenizer, labels)
    with torch.device("meta"):
        return loader(model.task).from_config(config)


def quantized_linears(model: ModelConfig, empty: Any, settings: QuantizationSettings) -> set[str]:
    """The linear layers that loading in 4 bits replaces, by name. empty: of `empty_model`; it is changed."""
    _import_bitsandbytes()
    from bitsandbytes.nn import Linear4bit
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization_config(settings, torch.float32, unquantized(model)), pre_quantized=False)
    quantizer.preprocess_model(model=empty, device_map=None)
    return {name for name, module in empty.named_modules() if isinstance(module, Linear4bit)}


def weight_files(base: Base, key: str = "base") -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, as `from_pretrained` chooses files.

    Raises:
        ConfigError: no safetensors, or a list of files that names others.
    """
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    def file(name: str) -> Path | None:
        found = cached_file(base.path, name, revision=base.revision, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found is not None else None

    with _reading(base, key, "its weights can't be read"):
        files = [file("model.safetensors")]
        if files == [None] and (index := file("model.safetensors.index.json")) is not None:
            names = read_object(index, key).get("weight_map")
            if not isinstance(names, dict):
                raise ConfigError(key, index, "is damaged: it has no weight_map")
            refuse_outside(names.values(), index, key)
            files = [file(name) for name in sorted(set(names.values()))]
        if None in files:
            raise ConfigError(key, base.name, "lacks files of weights in safetensors")
        found: dict[str, Path] = {}
        for one in files:
            assert one is not None
            with safe_open(one, "pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), one)
        return found


def load_model(
    base: Base,
    model: ModelConfig,
    config: Any,
    tokenizer: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    labels: list[str] | None,
    attn: str,
    quantization: QuantizationSettings | None = None,
) -> Any:
    """The base model for its task, on the device, with embeddings for every token of the tokenizer.

    Args:
        dtype: type of the weights that are not in 4 bits; with 4 bits also the type they are multiplied in.
        labels: class names of a classifier, whose head is new.
    """
    attention.register()
    quiet_transformers()
    _import_bitsandbytes()
    arguments: dict[str, Any] = {"config": config, "revision": base.revision, "dtype": dtype, "attn_implementation": attn}
    _fit_config(config, model.task, tokenizer, labels)
    if quantization is not None and quantization.load_in_4bit:
        arguments["quantization_config"] = quantization_config(quantization, dtype, unquantized(model))
        arguments["device_map"] = {"": device}
    auto = loader(model.task)
    with _reading(base, "model.base", f"can't be loaded for {model.task}"):
        loaded, info = auto.from_pretrained(base.path, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **arguments)
    _keep_packed_as_stored(loaded)
    loaded.lorica_new_modules = _new_modules(base, model.task, info["missing_keys"])
    if len(tokenizer) > loaded.get_input_embeddings().weight.shape[0]:
        loaded.resize_token_embeddings(len(tokenizer))
        loaded.config.lorica_resized = True
    loaded.config.pad_token_id = tokenizer.pad_token_id
    if getattr(loaded, "generation_config", None) is not None:
        loaded.generation_config.pad_token_id = tokenizer.pad_token_id
    return loaded


def _keep_packed_as_stored(model: torch.nn.Module) -> None:
    """4-bit layers multiply in the type they were asked to, on every processor.

    On one with avx512_bf16, bitsandbytes (0.50, nn.modules.Linear4bit.forward) packs the weights anew at the first forward without
    gradients and from then on rounds to bf16, whatever the type.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _import_bitsandbytes() -> None:
    """Import it before PEFT does, with torch's compiler off: its decorators load all of Inductor, which takes seconds.

    What they compile stands in for its kernels, and a CPU and a CUDA device have these; on other devices nothing is changed.
    """
    if "bitsandbytes" in sys.modules or torch.backends.mps.is_available() or torch.xpu.is_available():
        return
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        with contextlib.suppress(ImportError):
            import bitsandbytes  # noqa: F401
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def _new_modules(base: Base, task: str, missing: Iterable[str]) -> list[str]:
    """Modules of a classifier's head that the base's files don't hold, besides those that PEFT knows as heads.

    Raises:
        ConfigError: what is missing is no head: weights would be random.
    """
    modules = sorted({key.rpartition(".")[0] for key in missing})
    lost = [m for m in modules if task == "causal_lm" or any(part.isdigit() for part in m.split("."))]
    if lost:
        raise ConfigError("model.base", base.name, f"its files lack weights of {', '.join(lost[:3])}" + (" and more" if lost[3:] else ""))
    return [m for m in modules if not {"classifier", "score"} & set(m.split("."))]


def build_tiny_mistral(folder: Path, seed: int) -> Path:
    """Write a Mistral of 3.4 million random weights, and a tokenizer trained on the packaged samples, into `folder`.

    The architecture and the files are a real Mistral's; nothing was learnt. The same seed gives the same bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    from lorica.data.readers import SAMPLES

    if (folder / "model.safetensors").is_file():
        return folder
    texts = sorted(SAMPLES.glob("*/*"))
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    raw.train_from_iterator(
        (line for file in texts for line in file.read_text("utf-8").splitlines()),
        trainers.BpeTrainer(
            vocab_size=4096, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = MistralConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MistralForCausalLM(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(folder) as new:
        tokenizer.save_pretrained(new)
        model.save_pretrained(new)
    return folder


def trained_labels(folder: Path) -> list[str]:
    """Class names of a classifier's folder, in order; transformers' own (LABEL_0 ...) where its config.json has none."""
    from transformers import AutoConfig

    names = AutoConfig.from_pretrained(folder, trust_remote_code=False).id2label
    return [names[k] for k in sorted(names)]

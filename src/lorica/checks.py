"""Rules that a configuration must keep beyond its types: ranges, choices, and keys that have to agree with each other. No torch."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorica import elsewhere
from lorica.config import (
    DATA_SCHEMAS,
    EXPORTS,
    LOGGER_SCHEMAS,
    ClassificationDataConfig,
    ConfigError,
    DataConfig,
    DistillationConfig,
    ExportConfig,
    InstructionDataConfig,
    LoggerConfig,
    MergeConfig,
    ModelConfig,
    NotApplicable,
    OptimizerConfig,
    PredictConfig,
    PushConfig,
    TrainConfig,
    TrainerConfig,
)
from lorica.proposals import nearest, sibling

CAUSAL = ("mistral", "tiny_mistral")  # what models begin with that write texts, unless they are made classifiers
DATA_ENDINGS = (".csv", ".jsonl", ".json", ".parquet")
# Packages that a format of `export` imports: those of the extra of the same name.
EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torchao": ("torchao",),
    "gguf": ("llama_cpp", "sentencepiece"),
    "gptq": ("gptqmodel", "optimum"),
}
ANSWERED_ENDINGS = (".csv", ".jsonl", ".parquet")  # of files that are read and written row by row

REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # on the hub

# What to type for keys that a recipe leaves to the user.
HOW_TO_GIVE = {
    "distillation.teacher": "python train.py model=mistral_qlora data=sentiment run_dir=outputs/teacher\n"
    "  then: python train.py experiment=distill_sentiment distillation.teacher=outputs/teacher"
}


def walk(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every leaf of a configuration dataclass as (dotted key, value, the field's metadata)."""
    for f in dataclasses.fields(node):
        value, name = getattr(node, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            yield from walk(value, name + ".")
        else:
            yield name, value, dict(f.metadata)


def check_ranges(config: Any) -> None:
    """Every value against the range and the choices of its field.

    Raises:
        ConfigError: names the first key that is outside.
    """
    for name, value, meta in walk(config):
        choices = meta.get("choices") or ()
        if choices and value is not None and value not in choices:
            meant = elsewhere.VALUES.get(name, {}).get(str(value).lower()) or nearest(str(value), choices) or choices[0]
            raise ConfigError(name, value, f"must be one of {', '.join(choices)}", f"{name}={meant}")
        if value == "":
            raise ConfigError(name, "''", "is empty: give a value or leave it out")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        low, high, above = meta.get("low"), meta.get("high"), meta.get("above")
        if value != value or value in (float("inf"), float("-inf")):
            raise ConfigError(name, value, "must be a finite number")
        if low is not None and value < low:
            raise ConfigError(name, value, f"must be at least {low:.12g}", f"{name}={low:.12g}")
        if above is not None and value <= above:
            raise ConfigError(name, value, f"must be above {above:.12g}")
        if high is not None and value > high:
            raise ConfigError(name, value, f"must be at most {high:.12g}", f"{name}={high:.12g}")


def check(config: Any) -> None:
    """All rules for one verb's configuration.

    Raises:
        ConfigError: the first rule broken, with the key, the value, the rule and what to type instead.
    """
    check_ranges(config)
    if isinstance(config, TrainConfig):
        for name, value in (("model.name", config.model.name), ("data.name", config.data.name)):
            if not re.fullmatch(r"[\w-][\w.-]{0,99}", value):
                raise ConfigError(name, repr(value), "is part of the run folder's name: letters, digits, _, - and . only", f"{name}=mine")
        _check_model(config.model)
        _check_data(config.data)
        _check_logger(config.logger)
        _check_pair(config)
        _check_batch(config)
        _check_trainer(config)
        _check_distillation(config)
    elif isinstance(config, PredictConfig):
        _check_predict(config)
    elif isinstance(config, MergeConfig):
        _check_merge(config)
    elif isinstance(config, PushConfig):
        _check_folder("run", config.run)
        if not re.fullmatch(REPOSITORY, config.repo):
            raise ConfigError("repo", repr(config.repo), "must be owner/name, of letters, digits, _, - and .", "repo=me/my-adapter")
    elif isinstance(config, ExportConfig):
        _check_export(config)


def _check_model(model: ModelConfig) -> None:
    lora = model.lora
    if model.quantization is not None and model.quantization.load_in_4bit and lora is None:
        raise ConfigError(
            "model.quantization",
            "4-bit",
            "4-bit weights can't be trained themselves; they need an adapter (model.lora is null)",
            "model.quantization=null",
        )
    if lora is not None:
        targets = lora.target_modules
        if isinstance(targets, str):
            if targets != "all-linear":
                raise ConfigError(
                    "model.lora.target_modules",
                    targets,
                    "must be a list of layer names or all-linear",
                    f"model.lora.target_modules=[{targets}]",
                )
        elif targets is not None and not (isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)):
            raise ConfigError(
                "model.lora.target_modules",
                targets,
                "must be a list of layer names or all-linear",
                "model.lora.target_modules=[q_proj,v_proj]",
            )
    if model.train_layers is not None:
        if not re.fullmatch(r"last_[1-9]\d{0,5}", model.train_layers):
            raise ConfigError(
                "model.train_layers",
                model.train_layers,
                "must be last_ and a number of layers from 1 on, or null for all",
                "model.train_layers=last_8",
            )
        if lora is not None and lora.bias == "all":
            raise NotApplicable(
                "model.lora.bias",
                "all",
                f"trains biases of layers that model.train_layers={model.train_layers} freezes",
                "model.lora.bias=lora_only",
            )
    own = _of_folder(model.base)
    if own is not None and isinstance(layers := own.get("num_hidden_layers"), int):
        check_layers(model, layers)
    try:
        positions = positions_of(own) if own is not None else None
    except (ValueError, TypeError) as e:
        raise ConfigError("model.base", model.base, f"its config.json can't be read: {e}") from None
    if positions is not None and positions < 1:
        raise ConfigError("model.base", model.base, f"its config.json leaves {positions} positions: max_position_embeddings is wrong")
    if positions is not None and model.max_length > positions:
        raise ConfigError("model.max_length", model.max_length, f"{model.base} has {positions} positions", f"model.max_length={positions}")
    if model.base.startswith((".", "/", "~")) and not Path(model.base).expanduser().is_dir():
        raise ConfigError("model.base", model.base, "there is no such folder", "a folder with config.json and *.safetensors, or a hub name")


def positions_of(config: dict[str, Any]) -> int | None:
    """Longest sequence by a model's `config.json`: RoBERTa's kin count positions from pad_token_id + 1."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        pad = config.get("pad_token_id")
        positions -= (1 if pad is None else int(pad)) + 1
    return positions


def _of_folder(base: str) -> dict[str, Any] | None:
    """The config.json of a base that is a folder."""
    file = Path(base).expanduser() / "config.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError, OSError) as e:
        raise ConfigError("model.base", base, f"its config.json can't be read: {e}") from None
    if not isinstance(found, dict):
        raise ConfigError("model.base", base, f"its config.json can't be read: it holds a {type(found).__name__}, not an object")
    return found


def trained_layers(model: ModelConfig, layers: int) -> int:
    """How many of a model's layers learn, counted from its end: `model.train_layers`."""
    return layers if model.train_layers is None else min(layers, int(model.train_layers.removeprefix("last_")))


def check_layers(model: ModelConfig, layers: int) -> None:
    """Refuse more layers than there are.

    Raises:
        ConfigError: `model.train_layers` is more than `layers`.
    """
    if model.train_layers is not None and int(model.train_layers.removeprefix("last_")) > layers:
        raise ConfigError(
            "model.train_layers", model.train_layers, f"{model.base} has {layers} layers", f"model.train_layers=last_{max(1, layers // 4)}"
        )


def _check_data(data: DataConfig) -> None:
    schema = DATA_SCHEMAS.get(data.module)
    if schema is None or not isinstance(data, schema):
        rule = f"must be one of {', '.join(DATA_SCHEMAS)}" if schema is None else f"has other keys than data={data.name}; choose the group"
        raise ConfigError("data.module", data.module, rule, f"data={nearest(data.module, DATA_SCHEMAS) or data.name}")
    if data.path is not None and data.source != "files":
        raise ConfigError("data.path", data.path, f"is read only with data.source=files (it is {data.source})", "data.source=files")
    if data.revision is not None and data.source != "hub":
        raise ConfigError("data.revision", data.revision, f"is of a hub data set; data.source={data.source}", "data.revision=null")
    if data.source == "files":
        if data.path is None:
            raise ConfigError("data.path", None, "data.source=files needs the file or folder to read", "data.path=my_data/train.csv")
        path = Path(data.path).expanduser()
        if not path.exists():
            raise ConfigError("data.path", data.path, "there is no such file or folder" + sibling(path))
        if path.is_file() and path.suffix.lower() not in DATA_ENDINGS:
            raise ConfigError("data.path", data.path, f"must end in {', '.join(DATA_ENDINGS)}")
    if data.source == "hub" and data.hub_id is None:
        raise ConfigError("data.hub_id", None, "data.source=hub needs the data set's name", "data.hub_id=owner/name")
    if data.validation_fraction + data.test_fraction >= 1.0 and data.validation_from == "train":
        raise ConfigError(
            "data.validation_fraction",
            data.validation_fraction,
            f"with data.test_fraction={data.test_fraction:g} nothing is left to train on",
        )
    if isinstance(data, ClassificationDataConfig):
        if "{text}" not in data.prompt_template:
            raise ConfigError("data.prompt_template", repr(data.prompt_template), "must contain {text}")
        if data.labels is not None and (len(data.labels) < 2 or len(set(data.labels)) != len(data.labels)):
            raise ConfigError("data.labels", data.labels, "needs two or more different names")
        if data.label_values is not None and (data.labels is None or len(data.label_values) != len(data.labels)):
            raise ConfigError(
                "data.label_values", data.label_values, f"needs one value for each of data.labels={data.labels}", "data.label_values=null"
            )
    if isinstance(data, InstructionDataConfig):
        for name, needed in (("prompt_template", ("{prompt}",)), ("prompt_template_with_input", ("{prompt}", "{input}"))):
            for part in needed:
                if part not in getattr(data, name):
                    raise ConfigError(f"data.{name}", repr(getattr(data, name)), f"must contain {part}")


def _check_logger(logger: LoggerConfig) -> None:
    if type(logger) is not LOGGER_SCHEMAS[logger.name]:
        raise ConfigError("logger.name", logger.name, "has other keys than the logger that was chosen", f"logger={logger.name}")


def _check_pair(config: TrainConfig) -> None:
    if config.model.task == "sequence_classification" and not isinstance(config.data, ClassificationDataConfig):
        why = f"is a classifier, and data={config.data.name} has no labels"
        if config.model.name.startswith(CAUSAL):
            raise ConfigError("model.task", config.model.task, why, "model.task=causal_lm")
        raise ConfigError("model", config.model.name, why, "data=sentiment, or model=mistral_qlora")
    if config.model.task == "sequence_classification" and isinstance(config.data, ClassificationDataConfig) and config.data.shots:
        raise NotApplicable("data.shots", config.data.shots, "is for causal models; a classifier reads the text alone", "data.shots=0")


def _check_batch(config: TrainConfig) -> None:
    t = config.trainer
    if (t.tokens_per_batch is None) == (t.batch_size is None):
        both = t.batch_size is not None
        raise ConfigError(
            "trainer.batch_size" if both else "trainer.tokens_per_batch",
            t.batch_size,
            f"and trainer.tokens_per_batch={t.tokens_per_batch} both size a micro-batch: give one"
            if both
            else "give this or trainer.batch_size",
            "trainer.tokens_per_batch=null" if both else "trainer.batch_size=8",
        )
    if t.tokens_per_batch is not None and t.tokens_per_batch < config.model.max_length:
        raise ConfigError(
            "trainer.tokens_per_batch",
            t.tokens_per_batch,
            f"is less than one example may have (model.max_length={config.model.max_length})",
            f"trainer.tokens_per_batch={config.model.max_length}",
        )
    limit = config.data.max_train_examples
    if t.batch_size is not None and limit is not None and t.batch_size * t.accumulate_grad_batches > limit:
        raise ConfigError(
            "trainer.accumulate_grad_batches" if t.batch_size <= limit else "trainer.batch_size",
            t.accumulate_grad_batches if t.batch_size <= limit else t.batch_size,
            f"a step would take {t.batch_size} x {t.accumulate_grad_batches} = {t.batch_size * t.accumulate_grad_batches} examples, "
            f"more than data.max_train_examples={limit}",
            f"trainer.batch_size={min(t.batch_size, limit)} trainer.accumulate_grad_batches={max(1, limit // t.batch_size)}",
        )


def _check_trainer(config: TrainConfig) -> None:
    t = config.trainer
    if t.max_epochs == -1 and t.max_steps == -1:
        raise ConfigError("trainer.max_epochs", -1, "with trainer.max_steps=-1 the run would never end", "trainer.max_epochs=3")
    if t.max_epochs == 0:
        raise ConfigError(
            "trainer.max_epochs", 0, "nothing would be trained", "trainer.max_epochs=1, or trainer.max_steps=0 to test the base"
        )
    interval = t.val_check_interval
    whole = isinstance(interval, int) and not isinstance(interval, bool) and interval >= 1
    share = isinstance(interval, float) and 0.0 < interval <= 1.0
    if not (whole or share):
        raise ConfigError(
            "trainer.val_check_interval", interval, "must be a whole number of micro-batches or a share of an epoch in (0.0, 1.0]"
        )
    _check_devices(t.devices)
    recomputed = t.gradient_checkpointing
    if not (recomputed in (None, "offload") or (isinstance(recomputed, int) and recomputed >= 0)):
        raise ConfigError(
            "trainer.gradient_checkpointing",
            recomputed,
            "must be null, true, false, a number of layers or offload",
            "trainer.gradient_checkpointing=null",
        )
    if t.fp8 and config.model.lora is None:
        raise NotApplicable("trainer.fp8", True, "multiplies by weights under adapters; model.lora is null", "trainer.fp8=false")
    lora = config.model.lora
    if lora is not None and (t.fp8 or t.resident_weights) and (lora.use_dora or lora.bias != "none"):
        key = "trainer.fp8" if t.fp8 else "trainer.resident_weights"
        raise NotApplicable(key, True, "has no effect with DoRA or trained biases (model.lora.use_dora, model.lora.bias)", f"{key}=false")
    quantized = config.model.quantization is not None and config.model.quantization.load_in_4bit
    if t.resident_weights and not (quantized or t.fp8):
        raise NotApplicable(
            "trainer.resident_weights", True, "the weights are plain as they are (no model.quantization)", "trainer.resident_weights=false"
        )
    if t.precision == "16-mixed" and t.accelerator == "cpu":
        raise ConfigError("trainer.precision", t.precision, "half precision has no CPU kernels for training", "trainer.precision=auto")
    if len(config.optimizer.betas) != 2 or not all(0.0 <= b < 1.0 for b in config.optimizer.betas):
        raise ConfigError("optimizer.betas", config.optimizer.betas, "needs two numbers from 0 to below 1", "optimizer.betas=[0.9,0.999]")
    if config.optimizer.name == "sgd" and config.optimizer.betas != OptimizerConfig().betas:
        raise NotApplicable("optimizer.betas", config.optimizer.betas, "sgd has none", "optimizer.name=adamw")
    if config.resume not in (None, "auto", "required") and not (Path(config.resume) / "config.yaml").is_file():
        near = nearest(config.resume, ("auto", "required"))
        rule = "must be auto, required or a run folder (with its config.yaml)" + (
            sibling(Path(config.resume)) if "/" in config.resume else ""
        )
        raise ConfigError("resume", config.resume, rule, f"resume={near or 'auto'}")


def _check_distillation(config: TrainConfig) -> None:
    asked, default = config.distillation, DistillationConfig()
    if asked.teacher is None:
        for name in ("temperature", "weight"):
            if (value := getattr(asked, name)) != getattr(default, name):
                raise NotApplicable(
                    f"distillation.{name}",
                    value,
                    "there is no teacher (distillation.teacher is null)",
                    "distillation.teacher=<its run folder>",
                )
        return
    if config.model.task != "sequence_classification":
        raise NotApplicable(
            "distillation.teacher",
            asked.teacher,
            f"teaches a classifier its label probabilities; model={config.model.name} learns the labels' words",
            "model=minilm_lora, or distillation.teacher=null",
        )
    first = f"python train.py model=mistral_qlora data={config.data.name} run_dir={asked.teacher}"
    _check_folder("distillation.teacher", asked.teacher, f"{first}\n  then: the same command again")


def check_step(trainer: TrainerConfig, rows: int, devices: int = 1) -> None:
    """Refuse more examples a step than there are training rows.

    Raises:
        ConfigError: there are fewer.
    """
    t = trainer
    if t.batch_size is not None and (window := t.batch_size * t.accumulate_grad_batches * devices) > rows:
        raise ConfigError(
            "trainer.batch_size",
            t.batch_size,
            f"a step would take {t.batch_size} x {t.accumulate_grad_batches} x {devices} devices = {window} examples; there are {rows}",
            f"trainer.batch_size={max(1, rows // (t.accumulate_grad_batches * devices))}",
        )


def _check_devices(devices: Any, name: str = "trainer.devices") -> None:
    numbers = isinstance(devices, list) and devices and all(isinstance(d, int) and d >= 0 for d in devices)
    count = isinstance(devices, int) and not isinstance(devices, bool) and (devices == -1 or devices >= 1)
    if not (numbers or count or devices == "auto"):
        raise ConfigError(name, devices, "must be auto, a number of devices, -1 for all, or a list of their numbers", f"{name}=1")


def _check_predict(config: PredictConfig) -> None:
    _check_folder("run", config.run)
    _check_devices(config.devices, "devices")
    if (config.text is None) == (config.input is None):
        raise ConfigError("text", config.text, "give one text or one input file", 'text="..." or input=reviews.csv')
    if config.input is not None:
        path = Path(config.input).expanduser()
        if not path.is_file():
            raise ConfigError("input", config.input, "there is no such file" + sibling(path))
        for name, file in (("input", config.input), ("output", config.output)):
            if file is not None and Path(file).suffix.lower() not in ANSWERED_ENDINGS:
                raise ConfigError(name, file, f"must end in {', '.join(ANSWERED_ENDINGS)}")
        if config.output is not None and Path(config.output).resolve() == path.resolve():
            raise ConfigError("output", config.output, "is the input itself")
    elif config.output is not None:
        raise ConfigError("output", config.output, "is written only for an input file", "input=reviews.csv")
    elif config.devices not in ("auto", 1) and not (isinstance(config.devices, list) and len(config.devices) == 1):
        raise ConfigError("devices", config.devices, "share an input file; one text is answered by one", "leave it out")


def _check_merge(config: MergeConfig) -> None:
    _check_folder("run", config.run)
    _check_sample(config.sample)
    if config.sample is not None and config.certify_rows == 0:
        raise ConfigError("sample", config.sample, "is read only where rows are compared", "certify_rows=64")
    if config.requantize and config.onto != "auto":
        raise ConfigError("requantize", True, "is for onto=auto", "onto=requantised, to write that")
    if config.requantize and config.certify_rows == 0:
        raise ConfigError("requantize", True, "is chosen by comparison, which certify_rows=0 leaves out", "onto=requantised, to write that")


def _check_sample(sample: str | None) -> None:
    if sample is None:
        return
    path = Path(sample).expanduser()
    if not path.is_file():
        raise ConfigError("sample", sample, "there is no such file" + sibling(path))
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise ConfigError("sample", sample, "must end in .csv or .jsonl")


def _check_export(config: ExportConfig) -> None:
    _check_folder("run", config.run)
    _check_sample(config.sample)
    formats = export_formats(config)
    for name in EXPORTS:
        chosen = getattr(config, name)
        if name not in formats and chosen != getattr(ExportConfig(), name):
            raise NotApplicable(name, chosen, f"is a key of format={name}", f"format={config.format},{name}")
        if not chosen or len(set(chosen)) != len(chosen):
            rule = f"needs one or more different ones of {', '.join(EXPORTS[name])}"
            raise ConfigError(name, chosen, rule, f"{name}=[{EXPORTS[name][0]}]")
        for variant in chosen:
            if variant not in EXPORTS[name]:
                near = nearest(variant, EXPORTS[name]) or EXPORTS[name][0]
                raise ConfigError(name, variant, f"must be one of {', '.join(EXPORTS[name])}", f"{name}=[{near}]")
    if config.llama_cpp is not None:
        if "gguf" not in formats:
            raise NotApplicable("llama_cpp", config.llama_cpp, "is a key of format=gguf", f"format={config.format},gguf")
        _check_folder("llama_cpp", config.llama_cpp)
        if not (Path(config.llama_cpp).expanduser() / "convert_hf_to_gguf.py").is_file():
            raise ConfigError("llama_cpp", config.llama_cpp, "has no convert_hf_to_gguf.py", "llama_cpp=<a clone of llama.cpp>")
    if "gptq" not in formats and config.calibration_rows != ExportConfig().calibration_rows:
        raise NotApplicable("calibration_rows", config.calibration_rows, "is a key of format=gptq", f"format={config.format},gptq")
    for name in formats:
        if missing := [package for package in EXTRAS.get(name, ()) if find_spec(package) is None]:
            raise ConfigError("format", name, f"needs {', '.join(missing)}, which this environment lacks", f"pip install 'lorica[{name}]'")


def export_formats(config: ExportConfig) -> list[str]:
    """The formats that were asked for, in order.

    Raises:
        ConfigError: one is unknown or named twice.
    """
    formats = [part.strip() for part in config.format.split(",")]
    for name in formats:
        if name not in EXPORTS:
            near = nearest(name, EXPORTS) or next(iter(EXPORTS))
            raise ConfigError("format", name or "''", f"must be one or more of {', '.join(EXPORTS)}, with commas between", f"format={near}")
        if formats.count(name) > 1:
            raise ConfigError("format", config.format, f"names {name} twice", f"format={','.join(dict.fromkeys(formats))}")
    return formats


def _check_folder(name: str, value: str, fix: str = "") -> None:
    if not Path(value).expanduser().is_dir():
        usual = "outputs/latest"  # which there is once a run was written under outputs/
        fix = fix or (f"{name}={usual}" if value != usual else f"{name}=<the folder of a run>")
        raise ConfigError(name, value, "there is no such folder" + sibling(Path(value)), fix)

"""The schema of everything a user can set, and the one error a user can cause. No torch in here.

Dataclasses carry names, types, units, ranges and meanings (`key`); the YAML under `conf/` carries values. `docs/configuration.md`
is generated from this file. Rules that span several keys stand in `checks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any


class ConfigError(Exception):
    """Something the user wrote, or a file the user named, that can't be used.

    Args:
        where: the dotted key, the flag or the file.
        value: what was found there (printed as it is typed; secrets are redacted when shown); None: nothing.
        rule: what holds for it.
        fix: what to type or do instead.
    """

    def __init__(self, where: str, value: object, rule: str, fix: str = "") -> None:
        self.where, self.value, self.rule, self.fix = where, value, rule, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        head = self.where if self.value is None else f"{self.where}={as_typed(self.value)}"
        return f"{head}: {self.rule}" + (f"\n  try: {self.fix}" if self.fix else "")


def as_typed(value: Any) -> str:
    """A value as it is typed, but for the quotes that a shell or Hydra's grammar may want."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{as_typed(k)}:{as_typed(v)}' for k, v in value.items())}}}"
    return str(value)


class NotApplicable(ConfigError):
    """A key of the schema that the chosen model, data or logger has no use for, as `model.lora.r` under full fine-tuning."""


def key(
    default: Any = MISSING,
    meaning: str = "",
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its documentation and range.

    Args:
        default: value, or a `list`/`dict`/dataclass type to call for a fresh one.
        unit: tokens, examples, steps, seconds ...
        choices: the only strings allowed.
        low, high: inclusive bounds; above: an exclusive lower bound.
    """
    metadata = {"meaning": meaning, "unit": unit, "choices": choices, "low": low, "high": high, "above": above}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def limits(metadata: Mapping[str, Any]) -> str:
    """Unit and range of a field, in words: `tokens, at least 8`."""
    unit, low, high, above = (metadata.get(k) for k in ("unit", "low", "high", "above"))
    parts = [unit, f"at least {low:.12g}" if low is not None else "", f"above {above:.12g}" if above is not None else ""]
    return ", ".join(filter(None, [*parts, f"at most {high:.12g}" if high is not None else ""]))


# ---------------------------------------------------------------------------------------------------------------- model

TASKS = ("causal_lm", "sequence_classification")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "sgd")


@dataclass
class LoraSettings:
    """LoRA by PEFT's own names (`peft.LoraConfig`)."""

    r: int = key(16, "rank of the update", low=1)
    lora_alpha: int = key(32, "the update is scaled by lora_alpha / r", low=1)
    lora_dropout: float = key(0.0, "dropout on the adapter's input", low=0.0, high=0.999)
    target_modules: Any = key(
        None, "names of the linear layers that get an adapter, as a list, or `all-linear`; null: PEFT's choice for the architecture"
    )
    modules_to_save: list[str] | None = key(None, "layers trained whole and saved with the adapter (a classifier's head always is)")
    use_rslora: bool = key(False, "scale by lora_alpha / sqrt(r) (rsLoRA)")
    use_dora: bool = key(False, "weight-decomposed LoRA (DoRA)")
    bias: str = key("none", "which biases train", choices=("none", "all", "lora_only"))


@dataclass
class QuantizationSettings:
    """4-bit weights by bitsandbytes' own names (`transformers.BitsAndBytesConfig`)."""

    load_in_4bit: bool = key(True, "keep the frozen linear weights in 4 bits; false: as if no quantization were given")
    bnb_4bit_quant_type: str = key("nf4", "the 4-bit code", choices=("nf4", "fp4"))
    bnb_4bit_use_double_quant: bool = key(True, "quantise the block scales too (saves 0.4 bit a weight)")
    bnb_4bit_compute_dtype: str = key(
        "auto",
        "type that 4-bit weights are multiplied in; auto: that of trainer.precision",
        choices=("auto", "bfloat16", "float16", "float32"),
    )


@dataclass
class RecommendedSettings:
    """What a model is usually trained with; used where `optimizer` and `trainer` leave the value null."""

    optimizer: str = key("adamw", "for optimizer.name", choices=OPTIMIZERS)
    lr: float = key(2e-4, "for optimizer.lr", above=0.0, high=10.0)
    warmup_ratio: float = key(0.06, "for optimizer.warmup_ratio", low=0.0, high=1.0)
    batch_size: int | None = key(None, "for trainer.batch_size", unit="examples", low=1)
    tokens_per_batch: int | None = key(None, "for trainer.tokens_per_batch", unit="tokens", low=8)


@dataclass
class ModelConfig:
    """What is trained."""

    name: str = key("???", "short name, used in the run folder's name")
    task: str = key("???", "what the model answers with", choices=TASKS)
    base: str = key("???", "base model: a local folder, or a repository on the Hugging Face hub")
    revision: str | None = key(None, "commit, tag or branch of the hub repository; what it resolves to is recorded")
    license: str | None = key(None, "of the base, for the model card, as the hub names it; null: not stated")
    max_length: int = key(512, "longest sequence; what is longer is truncated, counted and reported", unit="tokens", low=8)
    lora: LoraSettings | None = key(None, "adapter settings; null trains every weight")
    quantization: QuantizationSettings | None = key(None, "4-bit settings; null keeps the weights in 16 or 32 bits")
    train_layers: str | None = key(
        None,
        "layers that learn: last_N, as last_8, for the last N and what comes after them; the others are frozen, have no adapters, keep no "
        "activations and no gradient flows through them; null: all",
    )
    attn_implementation: str = key(
        "auto",
        "attention kernel; auto: varlen (sequences end to end, no padding) where the GPU and torch have it, else sdpa; on CPUs shown as dense: the same, with dropout drawn faster; flash_attention_3 and _4: varlen by that package, which must be installed",
        choices=("auto", "varlen", "flash_attention_3", "flash_attention_4", "sdpa", "eager", "flash_attention_2"),
    )
    recommended: RecommendedSettings = key(RecommendedSettings)
    use_chat_template: bool = key(True, "write prompts with the tokenizer's chat template where it has one (causal models)")


# ----------------------------------------------------------------------------------------------------------------- data

SOURCES = ("sample", "hub", "files")


@dataclass
class DataConfig:
    """What every data set has in common."""

    name: str = key("???", "short name, used in the run folder's name")
    module: str = key("???", "the registered data module that reads the rows")
    source: str = key("sample", "where rows come from: the package's sample, the Hugging Face hub, or data.path", choices=SOURCES)
    path: str | None = key(None, "file (csv, jsonl, json, parquet) or folder with train/validation/test files; needs data.source=files")
    hub_id: str | None = key(None, "data set repository on the hub, or a local folder in its layout; needs data.source=hub")
    hub_config: str | None = key(None, "configuration of the hub data set")
    revision: str | None = key(None, "commit of the hub data set; what it resolves to is recorded")
    train_split: str = key("train", "name of the training split on the hub")
    validation_split: str | None = key(None, "name of the validation split on the hub; null: cut from another split")
    test_split: str | None = key("test", "name of the test split on the hub; null: cut from training")
    license: str | None = key(None, "of the rows, for the model card; null: not stated")
    csv_columns: list[str] | None = key(None, "column names of a csv file that has no header line")
    max_examples: int | None = key(None, "keep a fixed sample of this many rows before any is held out", unit="examples", low=4)
    max_train_examples: int | None = key(None, "train on a seeded sample of this many", unit="examples", low=1)
    max_validation_examples: int | None = key(None, "validate on a fixed sample of this many", unit="examples", low=1)
    max_test_examples: int | None = key(None, "test on a fixed sample of this many", unit="examples", low=1)
    validation_fraction: float = key(0.1, "share held out for validation where no validation split is given", low=0.0, high=0.9)
    validation_from: str = key("train", "the split that validation rows are cut from", choices=("train", "test"))
    test_fraction: float = key(0.1, "share of training rows held out as test where there is no test split", low=0.0, high=0.9)
    on_bad_rows: str = key(
        "refuse", "what to do with rows that can't be used: stop and list them, or drop and count them", choices=("refuse", "skip")
    )
    token_cache: bool = key(
        True,
        "keep the token ids of sets of 2,000 examples or more on disk, where the next run of the same data and tokenizer finds them",
    )
    report_only: bool = key(False, "stop after the data report: the tokenizer is read, no weights are")
    near_duplicate_similarity: float | None = key(
        0.7,
        "two texts are near duplicates from this Jaccard similarity of their five-character runs on (case, punctuation, links and @names aside); null: the data report does not look for them",
        low=0.6,
        high=1.0,
    )
    max_leakage: float = key(
        0.2, "refuse to train where more than this share of the test rows have a near duplicate in training", low=0.0, high=1.0
    )
    max_unsupervised: float = key(
        0.0,
        "refuse to train where more than this share of the training rows have no token to learn; up to it they are left out",
        low=0.0,
        high=1.0,
    )
    min_eos_share: float = key(
        0.01,
        "refuse to train where less than this share of the training rows teach the end-of-sequence token (causal models); 0: never",
        low=0.0,
        high=1.0,
    )
    min_label_examples: int = key(
        1, "refuse to train where a label has fewer training rows (labelled sets); 0: never", unit="examples", low=0
    )
    num_workers: int = key(0, "loader processes; 0 builds batches in the training process", low=0, high=256)


@dataclass
class ClassificationDataConfig(DataConfig):
    """Texts with one label each."""

    text_column: str = key("text", "column with the text")
    label_column: str = key("label", "column with the label: its name, or its number")
    labels: list[str] | None = key(None, "label names in the order of their numbers; null: the distinct values found in training, sorted")
    label_values: list[str] | None = key(
        None, "how each of data.labels is written in the file; null: as in data.labels, or its number from 0"
    )
    prompt_template: str = key("Text: {text}\nLabel:", "what a causal model is asked; must contain {text}, and may contain {labels}")
    shots: int = key(
        0,
        "training rows shown with their labels before each question to a causal model, of all labels in turn; they stand in lorica.json then",
        unit="examples",
        low=0,
        high=64,
    )


@dataclass
class InstructionDataConfig(DataConfig):
    """Prompts with one written answer each."""

    prompt_column: str = key("instruction", "column with the instruction")
    input_column: str | None = key("input", "column with the case it is applied to; null: none. Empty cells are fine")
    completion_column: str = key("output", "column with the answer to learn")
    prompt_template: str = key("### Instruction:\n{prompt}\n\n### Response:\n", "wording without an input; must contain {prompt}")
    prompt_template_with_input: str = key(
        "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n", "wording with an input; must contain {prompt} and {input}"
    )
    max_new_tokens: int = key(256, "longest generated answer", unit="tokens", low=1)
    max_generated_examples: int | None = key(
        64, "test rows that are answered by generation and scored by ROUGE-L; null: all", unit="examples", low=0
    )


@dataclass
class ChatDataConfig(DataConfig):
    """Conversations of several turns; every assistant turn is learnt."""

    messages_column: str = key("messages", "column with the list of {role, content}")
    max_new_tokens: int = key(256, "longest generated answer", unit="tokens", low=1)
    max_generated_examples: int | None = key(
        32, "test conversations whose last turn is generated and scored by ROUGE-L; null: all", unit="examples", low=0
    )


# -------------------------------------------------------------------------------------------------------------- training

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


@dataclass
class TrainerConfig:
    """Lightning's `Trainer` flags under Lightning's names, and the batch plan's sizes."""

    accelerator: str = key("auto", "Lightning: where to run", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    devices: Any = key("auto", "Lightning: how many devices, a list of their numbers, or auto (one on a GPU machine, one process on a CPU)")
    num_nodes: int = key(1, "Lightning: machines", low=1)
    strategy: str = key("auto", "Lightning: how devices share the work", choices=("auto", "ddp", "ddp_find_unused_parameters_true"))
    precision: str = key(
        "auto",
        "Lightning: arithmetic; auto: bf16-mixed on GPUs that have it, 16-mixed on older ones, on CPUs what a short measurement finds faster",
        choices=PRECISIONS,
    )
    max_epochs: int = key(1, "Lightning: passes over the training rows; -1: until max_steps", low=-1)
    max_steps: int = key(
        -1, "Lightning: optimiser steps; -1: until max_epochs; 0: nothing is trained, the base as it is is tested", unit="steps", low=-1
    )
    tokens_per_batch: int | None = key(
        None,
        "micro-batch size in tokens, padding included where there is any; give this or batch_size, else the model's own is taken",
        unit="tokens",
        low=8,
    )
    batch_size: int | None = key(
        None, "micro-batch size in examples; give this or tokens_per_batch, else the model's own is taken", unit="examples", low=1
    )
    accumulate_grad_batches: int = key(1, "Lightning: micro-batches a step; the loss is that of one large batch, exactly", low=1)
    group_by_length: bool = key(
        True,
        "choose a micro-batch's examples by length: alike where they are padded, filling trainer.tokens_per_batch where they lie end to end; the order stays random",
    )
    gradient_clip_val: float | None = key(1.0, "Lightning: largest gradient norm; null: no clipping", above=0.0)
    gradient_checkpointing: Any = key(
        None,
        "layers that keep only their input and are computed again in backward (less memory, up to 40 % more time): true, false, how many of those that learn, "
        "or offload (all, and their inputs wait in host memory); null: as few as fit into the GPU, or some more where micro-steps can be captured for it and are faster; none on other devices",
    )
    fit: bool = key(
        True,
        "cut micro-batches into as many parts as are fastest on the GPU's memory, and move frozen embeddings off it, by what `lorica plan` "
        "figures and real batches confirm: the same rows and the same loss a step; false: they run as they are, or not at all",
    )
    compile: bool | None = key(
        None,
        "compile the model's layers at a few fixed batch sizes; null: on NVIDIA GPUs with variable-length attention, "
        "where there are enough steps to be worth it",
    )
    fp8: bool = key(
        False,
        "multiply by the frozen weights under adapters in FP8 (e4m3, a scale for each row), forward and backward: faster, a little less exact; "
        "for GPUs of the Hopper, Ada and Blackwell kinds",
    )
    resident_weights: bool | None = key(
        None,
        "keep 4-bit weights also as the plain (or FP8) ones that they are multiplied as: the same numbers, faster, four times the memory; "
        "null: on a GPU where no activations have to go for it",
    )
    offload_embeddings: bool = key(
        False, "keep the frozen input embeddings in host memory, from which the GPU reads the rows it needs (0.25 GiB less for Mistral-7B)"
    )
    cuda_graphs: bool | None = key(
        None,
        "capture whole micro-steps of compiled layers, so that they don't wait for the host (one GPU); null: not those of half a second and more in which the host keeps ahead",
    )
    val_check_interval: Any = key(
        1.0,
        "Lightning: validate every so many micro-batches (whole number) or this share of an epoch (0.0 to 1.0); rounded up to whole steps",
    )
    checkpoint_every_n_steps: int | None = key(
        None, "save the resumable state every so many optimiser steps; null: after every validation", unit="steps", low=1
    )
    keep_checkpoints: int = key(2, "resumable states that stay: the newest, and those to fall back on should it be damaged", low=1)
    max_skipped_steps: int = key(
        10, "steps whose gradient is NaN or infinite are skipped and counted; stop after so many in a row", unit="steps", low=1
    )
    on_oom: str = key(
        "stop",
        "when a micro-batch does not fit into the GPU's memory: stop and say what to set, or halve it and go on with the same loss (one device, not in 16-mixed)",
        choices=("stop", "halve"),
    )
    early_stopping_patience: int | None = key(None, "stop after so many validations without a better result; null: never", low=1)
    log_every_n_steps: int = key(10, "Lightning: steps between two records of the training loss", unit="steps", low=1)
    deterministic: bool = key(False, "Lightning: only kernels that give the same bits each time")
    detect_anomaly: bool = key(False, "Lightning: name the operation that made a NaN (slow)")
    enable_progress_bar: bool = key(True, "Lightning: show progress")


SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


@dataclass
class OptimizerConfig:
    """The optimiser and its learning-rate schedule."""

    name: str | None = key(
        None,
        "adamw (fused), or bitsandbytes' 8-bit states, paged to host memory when the GPU's is short; null: the model's own",
        choices=OPTIMIZERS,
    )
    lr: float | None = key(None, "peak learning rate; null: the model's own", above=0.0, high=10.0)
    weight_decay: float = key(0.0, "decoupled weight decay; not on biases and norms", low=0.0, high=10.0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"meaning": "Adam's moment decays"})
    eps: float = key(1e-8, "Adam's epsilon", above=0.0, high=1.0)
    lr_scheduler_type: str = key("cosine", "shape of the learning rate after warm-up", choices=SCHEDULES)
    warmup_steps: int | None = key(None, "steps from 0 to the peak; null: by warmup_ratio", unit="steps", low=0)
    warmup_ratio: float | None = key(None, "share of all steps from 0 to the peak; null: the model's own", low=0.0, high=1.0)


# --------------------------------------------------------------------------------------------------------------- logging


@dataclass
class LoggerConfig:
    """`csv` and `none`: nothing to set."""

    name: str = key("???", "where metrics go besides the run folder", choices=("csv", "wandb", "none"))


@dataclass
class WandbLoggerConfig(LoggerConfig):
    """Weights & Biases. The key comes from WANDB_API_KEY or `wandb login`, never from a configuration."""

    project: str = key("lorica", "W&B project")
    mode: str = key("auto", "auto: online with a key and a network, else offline (and says so)", choices=("auto", "online", "offline"))
    entity: str | None = key(None, "W&B team or user")
    group: str | None = key(None, "W&B group; a grid sets its own")
    run_name: str | None = key(None, "W&B display name; null: the run folder's name")
    tags: list[str] | None = key(None, "W&B tags")
    log_model: bool = key(True, "upload the adapter as an artifact")


# ------------------------------------------------------------------------------------------------------------- the verbs


@dataclass
class DistillationConfig:
    """A classifier learns a teacher's label probabilities beside the true labels (Hinton et al. 2015, arXiv:1503.02531)."""

    teacher: str | None = key(
        None,
        "run folder, adapter folder or merged model that scores the same labels; it is asked about every training row before training, "
        "and what it says is kept on disk for the next run; null: none",
    )
    temperature: float = key(
        2.0, "teacher's and student's log-probabilities are divided by it before they are compared", above=0.0, high=100.0
    )
    weight: float = key(
        0.5,
        "share of the loss that is temperature^2 x KL(teacher || student); the rest is cross-entropy with the true labels; 0: the teacher is not asked",
        low=0.0,
        high=1.0,
    )


@dataclass
class TrainConfig:
    """`lorica train`."""

    seed: int = key(0, "every random draw follows from it", low=0, high=2**32 - 1)
    run_dir: str | None = key(
        None, "where the run is written: a new or empty folder, or that of a run that did not finish; null: outputs/<data>-<model>/<time>"
    )
    resume: str | None = key(
        None, "auto: go on from the newest unfinished run, or start fresh; required: refuse without one; or the folder of an unfinished run"
    )
    drill: str | None = key(
        None,
        "measure something of this configuration instead of training: accumulation (debug=accumulation) or resume (debug=resume_drill)",
        choices=("accumulation", "resume"),
    )
    model: ModelConfig = key(ModelConfig)
    data: DataConfig = key(DataConfig)
    trainer: TrainerConfig = key(TrainerConfig)
    optimizer: OptimizerConfig = key(OptimizerConfig)
    distillation: DistillationConfig = key(DistillationConfig)
    logger: LoggerConfig = key(LoggerConfig)


@dataclass
class PredictConfig:
    """`lorica predict`."""

    run: str = key("???", "run folder, adapter folder or merged model folder")
    text: str | None = key(None, "one text to answer; give this or input")
    input: str | None = key(
        None,
        "csv, jsonl or parquet file to answer, row by row, without a column prediction, probability, probabilities or error; give this or text",
    )
    output: str | None = key(None, "file to write (csv, jsonl or parquet by its ending); null: beside the input, as <name>.scored.<ending>")
    text_column: str | None = key(None, "column of the input file with the text; null: that of the training data, else `text`")
    base: str | None = key(None, "load the base model from here instead of where it was at training time")
    batch_size: int | None = key(
        None,
        "texts answered at once; null: 32, or where labels are scored on a GPU as many as the width allows (16,384 tokens of Mistral-7B)",
        unit="examples",
        low=1,
    )
    max_new_tokens: int | None = key(
        None, "longest generated answer; null: data.max_new_tokens of the training run, else 256", unit="tokens", low=1
    )
    target_risk: float | None = key(
        None,
        "leave rows unanswered that are less sure than the model's validation rows ask for, so that at most this share of the answers is "
        "wrong, with 95 % confidence; null: every row is answered",
        above=0.0,
        high=0.999,
    )
    accelerator: str = key("auto", "where to run", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    devices: Any = key(
        "auto", "how many devices share the input file, a process on each; -1 for all, a list of their numbers, or auto for one"
    )


@dataclass
class MergeConfig:
    """`lorica merge`."""

    run: str = key("???", "run folder or adapter folder")
    output: str | None = key(None, "folder to write; null: <run>/merged")
    base: str | None = key(None, "load the base model from here instead of where it was at training time")
    onto: str = key(
        "auto",
        "what a 4-bit base's adapter is merged into: dequantised, the values that its 4-bit codes stand for; original, the weights before "
        "they were quantised; requantised, dequantised and rounded to 4 bits again; auto: the nearest to the adapter of the first two",
        choices=("auto", "dequantised", "original", "requantised"),
    )
    requantize: bool = key(False, "onto=auto tries requantised too")
    sample: str | None = key(
        None,
        "csv or jsonl file to compare merged model and adapter on, with the columns of the training data; null: the run's own test rows",
    )
    certify_rows: int = key(
        64, "rows that merged model and adapter are compared on; 0: they are not compared", unit="examples", low=0, high=100_000
    )
    max_kl: float = key(
        1e-3, "nothing is written where the merged model's mean KL divergence from the adapter is above this", unit="nats a position", low=0
    )
    min_agreement: float = key(
        0.98,
        "nor where a smaller share of the positions has the adapter's most likely token or class; one may always differ",
        low=0,
        high=1,
    )
    accelerator: str = key("auto", "where to merge and to compare", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    dtype: str = key(
        "auto",
        "type of the merged weights; auto: the one that the weights had in training, those in 4 bits when they were multiplied",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


# Formats of `export`, each with the variants that its key of the same name may list.
EXPORTS: dict[str, tuple[str, ...]] = {
    "safetensors": ("bfloat16", "float16", "float32"),
    "onnx": ("float32", "int8"),
    "torchao": ("int8", "int4"),
    "gguf": ("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0", "Q4_0", "F16", "BF16", "F32"),
    "gptq": ("int4", "int8"),
}


def variants(default: tuple[str, ...], meaning: str) -> Any:
    """A field that lists variants of a format."""
    return field(default_factory=lambda: list(default), metadata={"meaning": meaning})


@dataclass
class ExportConfig:
    """`lorica export`."""

    run: str = key("???", "run folder, adapter folder or merged model folder")
    format: str = key(
        "???",
        "what to write, one or several with commas: safetensors, onnx (classifiers), torchao, gguf and gptq (causal models); each goes to "
        "<run>/exports/<format>/<variant>/",
    )
    base: str | None = key(None, "load the base model from here instead of where it was at training time")
    safetensors: list[str] = variants(("bfloat16",), "types of the weights: bfloat16, float16, float32")
    onnx: list[str] = variants(("float32", "int8"), "float32, and int8: its matrices in 8 bits, activations quantised as they come")
    torchao: list[str] = variants(("int8", "int4"), "bits of the weights: int8, and int4 (in groups of 32, for CPUs)")
    gguf: list[str] = variants(("Q4_K_M",), "llama.cpp's names of quantisations: Q4_K_M, Q5_K_M, Q6_K, Q8_0, F16 ...")
    gptq: list[str] = variants(("int4",), "bits of the weights: int4, int8")
    sample: str | None = key(None, "csv or jsonl file to score on, with the columns of the training data; null: the run's own test rows")
    certify_rows: int = key(64, "held-out rows that the original and every export read", unit="examples", low=1, high=100_000)
    min_agreement: float = key(
        0.8,
        "an export is refused where a smaller share of the positions has the original's most likely token or class, or of the rows its "
        "label; one may always differ",
        low=0,
        high=1,
    )
    calibration_rows: int = key(128, "training rows that gptq is calibrated on", unit="examples", low=8, high=100_000)
    llama_cpp: str | None = key(
        None,
        "folder of llama.cpp with convert_hf_to_gguf.py; null: that of the pinned llama-cpp-python source package, fetched by pip once",
    )
    again: bool = key(False, "write formats again that are there already, made of the same weights with the same settings")


@dataclass
class PushConfig:
    """`lorica push`."""

    run: str = key("???", "run folder, adapter folder or merged folder, whose weights and card are uploaded")
    repo: str = key("???", "repository on the Hugging Face hub, owner/name; made where there is none")
    private: bool = key(True, "a new repository is readable by you alone; one that is there stays as it is")
    confirm: bool = key(False, "upload; else only what would be uploaded is shown")


@dataclass
class GpuSettings:
    """The card that a plan is for."""

    name: str | None = key(None, "a known card, as rtx3070_8gb, colab_t4 or h200_141gb (`gpu=NAME` says the same); null: the one at hand")
    memory_gib: float | None = key(
        None, "memory of a card that is not known, or another amount than the known one's", unit="GiB", above=0.0, high=10_000.0
    )


@dataclass
class PlanConfig:
    """`lorica plan`. Every other key and group is one of train's."""

    gpu: GpuSettings = key(GpuSettings)
    rows: int = key(2000, "training rows that are looked at for their lengths", unit="examples", low=1)
    price_per_kwh: float | None = key(None, "of electricity in your currency; null: its cost is not said", low=0)
    price_per_hour: float | None = key(None, "of a rented GPU in your currency; null: its cost is not said", low=0)


@dataclass
class CompareConfig:
    """`lorica compare`. Every other key and group is one of train's, and holds for all models."""

    models: list[str] = key(
        list,
        "options of the group model, each trained; NAME_untuned: NAME's base with nothing trained; NAME_fewshot: shown `shots` examples besides",
    )
    runs: list[str] = key(list, "finished run folders, put beside them")
    output: str | None = key(None, "folder for the report; null: that of the comparison's runs, under outputs/compare")
    shots: int = key(4, "data.shots of the models that are named NAME_fewshot", unit="examples", low=1, high=64)
    latency_rows: int = key(
        30, "test rows that each model answers one by one, so that an answer is timed; 0: none is", unit="examples", low=0, high=10_000
    )
    max_disagreements: int = key(100, "rows shown of those that models answer differently", unit="examples", low=0, high=10_000)
    price_per_kwh: float | None = key(None, "of electricity in your currency, for what training costs; null: costs are not said", low=0)


@dataclass
class DoctorConfig:
    """`lorica doctor`. `--json` prints a list of objects instead of lines."""

    model: str | None = key(
        None, "option of the group model whose base must be had; null: mistral_qlora's is looked for, and only warned about"
    )
    base: str | None = key(None, "look for this base instead: a local folder, or a repository on the Hugging Face hub")
    outputs: str = key("outputs", "folder that runs are written to; what is not there is made, and taken away again")
    timeout: float = key(8.0, "what has not come to an end by then is given up", unit="seconds", low=1.0, high=600.0)


VERBS: dict[str, type] = {
    "train": TrainConfig,
    "predict": PredictConfig,
    "merge": MergeConfig,
    "export": ExportConfig,
    "compare": CompareConfig,
    "push": PushConfig,
    "plan": PlanConfig,
    "doctor": DoctorConfig,
}

# The dataclass of each registered data module and of each logger. Packages add their data modules by the entry point
# `lorica.data_config` (see docs/data.md).
DATA_SCHEMAS: dict[str, type[DataConfig]] = {
    "classification": ClassificationDataConfig,
    "ag_news": ClassificationDataConfig,
    "sentiment": ClassificationDataConfig,
    "instruction": InstructionDataConfig,
    "healthcare_qa": InstructionDataConfig,
    "chat": ChatDataConfig,
}
LOGGER_SCHEMAS: dict[str, type[LoggerConfig]] = {"csv": LoggerConfig, "none": LoggerConfig, "wandb": WandbLoggerConfig}


def fill_recommended(config: TrainConfig) -> None:
    """Put the model's own optimiser, learning rate and batch size where the user left them null."""
    own, opt, trainer = config.model.recommended, config.optimizer, config.trainer
    opt.name = own.optimizer if opt.name is None else opt.name
    opt.lr = own.lr if opt.lr is None else opt.lr
    opt.warmup_ratio = own.warmup_ratio if opt.warmup_ratio is None else opt.warmup_ratio
    if trainer.batch_size is None and trainer.tokens_per_batch is None:
        trainer.batch_size, trainer.tokens_per_batch = own.batch_size, own.tokens_per_batch

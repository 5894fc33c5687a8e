"""A Mistral-7B of random weights (the real architecture, bf16, 14.5 GB) with a tokenizer trained on text files: for speed and
memory, where the published weights can't be had. `python -m benchmarks.random_mistral FOLDER [TEXT_FILE ...]`; without a file the
tokenizer is trained on the packaged samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

from lorica.data.readers import SAMPLES


def build(folder: Path, texts: list[Path], **smaller: Any) -> None:
    """Write config, weights and tokenizer; the tokenizer has 32,000 entries or what the text yields.

    Args:
        smaller: other sizes than Mistral-7B's.
    """
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32000, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    raw.train([str(t) for t in texts], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128}
    sizes |= {"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": 4096}
    config = MistralConfig(**(sizes | smaller), bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")


if __name__ == "__main__":
    build(Path(sys.argv[1]), [Path(t) for t in sys.argv[2:]] or sorted(SAMPLES.glob("*/*")))

"""A RoBERTa-base of random weights (the real architecture, vocabulary size and positions) with a tokenizer trained on text files: for
speed and memory, where the published weights can't be had. `python -m benchmarks.random_roberta FOLDER [TEXT_FILE ...]`; without a
file the tokenizer is trained on the packaged samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast, RobertaConfig

from lorica.data.readers import SAMPLES

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # 0 to 3 as RoBERTa numbers them


def build(folder: Path, texts: list[Path], **smaller: Any) -> None:
    """Write config, weights and tokenizer; the tokenizer has as many entries as the text yields, the embedding 50,265.

    Args:
        smaller: other sizes than RoBERTa-base's, to try things out.
    """
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=50265, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    raw.train([str(t) for t in texts], trainer)
    raw.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", mask_token="<mask>", **names).save_pretrained(folder)
    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    config = RobertaConfig(**(sizes | smaller), bos_token_id=0, pad_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]), [Path(t) for t in sys.argv[2:]] or sorted(SAMPLES.glob("*/*")))

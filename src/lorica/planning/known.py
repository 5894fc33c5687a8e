"""Configurations of common bases, so that nothing has to be asked of the hub. Facts of their published config.json files."""

from __future__ import annotations

from typing import Any

from lorica.hub import TINY


def _decoder(
    kind: str, hidden: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int, positions: int, **more: Any
) -> dict[str, Any]:
    own = {"num_key_value_heads": keys, "tie_word_embeddings": False}
    return {**_common(kind, hidden, inner, layers, heads, vocabulary, positions), **own, **more}


def _encoder(kind: str, hidden: int, inner: int, layers: int, heads: int, vocabulary: int, positions: int, types: int) -> dict[str, Any]:
    own = {"type_vocab_size": types, "pad_token_id": 0 if kind == "bert" else 1}
    return {**_common(kind, hidden, inner, layers, heads, vocabulary, positions), **own}


def _common(kind: str, hidden: int, inner: int, layers: int, heads: int, vocabulary: int, positions: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
    }


_MISTRAL = (4096, 14336, 32, 32, 8)
KNOWN: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": _decoder("mistral", *_MISTRAL, 32000, 32768),
    "mistralai/Mistral-7B-Instruct-v0.1": _decoder("mistral", *_MISTRAL, 32000, 32768),
    "mistralai/Mistral-7B-Instruct-v0.2": _decoder("mistral", *_MISTRAL, 32000, 32768),
    "mistralai/Mistral-7B-v0.3": _decoder("mistral", *_MISTRAL, 32768, 32768),
    "mistralai/Mistral-7B-Instruct-v0.3": _decoder("mistral", *_MISTRAL, 32768, 32768),
    "meta-llama/Llama-2-7b-hf": _decoder("llama", 4096, 11008, 32, 32, 32, 32000, 4096),
    "meta-llama/Llama-2-13b-hf": _decoder("llama", 5120, 13824, 40, 40, 40, 32000, 4096),
    "meta-llama/Meta-Llama-3-8B": _decoder("llama", *_MISTRAL, 128256, 8192),
    "meta-llama/Llama-3.1-8B": _decoder("llama", *_MISTRAL, 128256, 131072),
    "meta-llama/Llama-3.1-8B-Instruct": _decoder("llama", *_MISTRAL, 128256, 131072),
    "meta-llama/Llama-3.2-1B": _decoder("llama", 2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B": _decoder("llama", 3072, 8192, 28, 24, 8, 128256, 131072, head_dim=128, tie_word_embeddings=True),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _decoder("llama", 2048, 5632, 22, 32, 4, 32000, 2048),
    "Qwen/Qwen2.5-0.5B": _decoder("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B": _decoder("qwen2", 1536, 8960, 28, 12, 2, 151936, 131072, tie_word_embeddings=True),
    "Qwen/Qwen2.5-3B": _decoder("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B": _decoder("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072),
    "Qwen/Qwen2.5-14B": _decoder("qwen2", 5120, 13824, 48, 40, 8, 152064, 131072),
    "FacebookAI/roberta-base": _encoder("roberta", 768, 3072, 12, 12, 50265, 514, 1),
    "FacebookAI/roberta-large": _encoder("roberta", 1024, 4096, 24, 16, 50265, 514, 1),
    "FacebookAI/xlm-roberta-base": _encoder("xlm-roberta", 768, 3072, 12, 12, 250002, 514, 1),
    "google-bert/bert-base-uncased": _encoder("bert", 768, 3072, 12, 12, 30522, 512, 2),
    "google-bert/bert-large-uncased": _encoder("bert", 1024, 4096, 24, 16, 30522, 512, 2),
    "sentence-transformers/all-MiniLM-L6-v2": _encoder("bert", 384, 1536, 6, 12, 30522, 512, 2),
    # models.base.build_tiny_mistral's
    TINY: _decoder("mistral", 256, 512, 4, 4, 2, 4096, 1024, head_dim=64, tie_word_embeddings=True),
}

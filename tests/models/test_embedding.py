"""Input embeddings in host memory give what they gave, stay where they are, and are refused where they are trained or tied."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.kernels.embedding import HostEmbedding, keep_on_host
from lorica.models.generation import greedy


def _mistral(tied: bool = False) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return MistralForCausalLM(config).eval().requires_grad_(False)


def test_hosted_embeddings_are_the_same(tmp_path: Path) -> None:
    model = _mistral()
    ids = torch.randint(4, 64, (2, 9))
    logits = model(ids).logits
    answers = greedy(model, [[5, 6, 7], [8]], 0, [2], 5)
    assert keep_on_host(model)
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    model.to(torch.float32).to("cpu")
    assert isinstance(embedding, HostEmbedding) and embedding.weight is weight
    assert torch.equal(model(ids).logits, logits)
    assert greedy(model, [[5, 6, 7], [8]], 0, [2], 5) == answers
    assert embedding.to("meta").weight.device.type == "cpu", "wherever the model is moved to"
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).get_input_embeddings().weight, weight)


@pytest.mark.parametrize("why", ["trained", "tied"])
def test_what_is_trained_or_tied_stays(why: str) -> None:
    model = _mistral(tied=why == "tied")
    if why == "trained":
        model.get_input_embeddings().weight.requires_grad_(True)
    assert not keep_on_host(model) and type(model.get_input_embeddings()) is torch.nn.Embedding

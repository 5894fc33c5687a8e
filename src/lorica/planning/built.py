"""The shape of any architecture that transformers knows, by its modules without weights. Imports torch and transformers: seconds."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lorica.config import ConfigError, ModelConfig
from lorica.planning.shapes import MOST_LAYERS, Linear, Shape


def build(config: dict[str, Any], model: ModelConfig, labels: int) -> Shape:
    """As `shapes.shape_of`; what linears read is told by their sizes, so that what layers keep is near, not exact.

    Raises:
        ConfigError: transformers does not know it, or it has no repeated layers.
    """
    import torch
    from torch import nn
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.pytorch_utils import Conv1D

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ConfigError("model.base", model.base, f"transformers does not know its architecture, model_type={kind}")
    causal = model.task == "causal_lm"
    try:
        read = CONFIG_MAPPING[kind].from_dict({k: v for k, v in config.items() if k != "model_type"})
        if (layers := read.get_text_config().num_hidden_layers) > MOST_LAYERS:
            raise ValueError(f"of {layers:,} layers")
        if not causal:
            read.num_labels = max(labels, 2)
        with torch.device("meta"):
            built: Any = (AutoModelForCausalLM if causal else AutoModelForSequenceClassification).from_config(read)
    except Exception as e:  # a configuration from anywhere: each architecture has errors of its own
        why = " ".join(str(e).split())[:200] or type(e).__name__
        raise ConfigError("model.base", model.base, f"transformers can't build its architecture ({why})") from None
    layers = [m for m in built.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError("model.base", model.base, f"has no repeated layers that transformers marks (model_type={kind})")
    likeness = Counter(sum(p.numel() for p in m.parameters()) for m in layers)
    layer = next(m for m in layers if sum(p.numel() for p in m.parameters()) == likeness.most_common(1)[0][0])
    text = read.get_text_config()
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    found = [(name, *_sizes(m), m.bias is not None) for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    named = (getattr(text, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim"))
    inner = next((n for n in named if isinstance(n, int)), max((max(rows, columns) for _, rows, columns, _ in found), default=hidden))
    linears = tuple(
        Linear(name.rpartition(".")[2] if causal else name, _role(name, rows, columns, hidden, inner), rows, columns, bias)
        for name, rows, columns, bias in found
    )
    queries = next((one.columns for one in linears if one.role == "mixed"), hidden)
    keys = int(getattr(text, "num_key_value_heads", None) or heads) * queries // heads
    in_layers = sum(p.numel() for m in layers for p in m.parameters())
    own = sum(p.numel() for p in layer.parameters())
    embeddings = built.get_input_embeddings().weight
    head = built.get_output_embeddings() if causal else None
    separate = head.weight.numel() if head is not None and head.weight is not embeddings else 0
    weights = sum(p.numel() for p in built.parameters())
    positions = getattr(text, "max_position_embeddings", None)
    return Shape(
        decoder=causal,
        model_type=kind,
        layers=round(in_layers / own),
        hidden=hidden,
        heads=heads,
        queries=queries,
        keys=keys,
        inner=inner,
        gated=sum(one.role == "widening" for one in linears) > 1,
        linears=linears,
        small=own - sum(one.weights for one in linears),
        vocabulary=int(text.vocab_size),
        embeddings=embeddings.numel(),
        rest=weights - round(in_layers / own) * own - embeddings.numel() - separate,
        head=separate,
        positions=positions if isinstance(positions, int) else None,
        dropout=any(isinstance(m, nn.Dropout) and m.p > 0 for m in layer.modules()),
        exact=False,
    )


def _sizes(linear: Any) -> tuple[int, int]:
    """(rows, columns) of a linear layer's matrix; GPT-2's Conv1D has it transposed."""
    rows, columns = linear.weight.shape
    return (rows, columns) if hasattr(linear, "in_features") else (columns, rows)


def _role(name: str, rows: int, columns: int, hidden: int, inner: int) -> str:
    last = name.rpartition(".")[2].lower()
    if any(word in last for word in ("qkv", "query", "key", "value", "c_attn")) or last[:2] in ("q_", "k_", "v_"):
        return "queries"
    if columns == inner and (rows == hidden or rows < columns):
        return "narrowing"
    return "widening" if rows >= inner else "mixed"

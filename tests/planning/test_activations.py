"""What `planning.activations` says that a layer keeps, beside what torch keeps of real layers: traced without memory, as on a GPU."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, min_cut_rematerialization_partition
from peft import LoraConfig, get_peft_model
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import MistralConfig, MistralForCausalLM, RobertaConfig, RobertaForSequenceClassification

from lorica.config import ModelConfig
from lorica.kernels import attention, frozen, lora_linear, varlen
from lorica.kernels.layers import repeated_layers
from lorica.planning.activations import Way, backward, kept, residual
from lorica.planning.shapes import Shape, shape_of, targets

TOKENS, RANK = 1000, 8  # no size of a model is 1,000
MISTRAL = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
ROBERTA = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_hidden_layers": 2}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations that a GPU runs, which tell their results' sizes anywhere."""
    attention.register()
    monkeypatch.setattr(varlen, "covers", lambda *_: True)
    native = torch.ops.aten.native_dropout  # whose mask has a byte for each number
    plain = torch.nn.functional.layer_norm  # autocast's for CUDA computes norms in fp32, that for CPUs does not
    as_fp32 = lambda x, shape, weight, bias, eps: plain(x.float(), shape, weight.float(), bias.float(), eps)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "layer_norm", as_fp32)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, training=True, inplace=False: native(x, p, training)[0])
    monkeypatch.setattr(frozen, "_product", lambda x, w, down, up: x @ w if down is None else frozen._product_on(x, w, down, up))


def build(kind: str, adapted: list[str] | None) -> tuple[Any, Shape]:
    """A model without weights, fp32 where all of it is trained, else bf16 with adapters; and its shape."""
    causal = kind == "mistral"
    config = MistralConfig(**MISTRAL, vocab_size=64, head_dim=64) if causal else RobertaConfig(**ROBERTA, vocab_size=64, type_vocab_size=1)
    config._attn_implementation = attention.VARLEN
    with torch.device("meta"):
        model: Any = (MistralForCausalLM if causal else RobertaForSequenceClassification)(config)
        if adapted is not None:
            model = get_peft_model(model.to(torch.bfloat16), LoraConfig(r=RANK, target_modules=adapted))
            lora_linear.install(model)
    task = "causal_lm" if causal else "sequence_classification"
    return model.train(), shape_of(config.to_dict(), ModelConfig(name="m", task=task, base="m"), 2)


def calls(kind: str, model: Any, hidden: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    """(a layer as a function of its parameters, its arguments)."""
    layer = repeated_layers(model)[1]
    ends = torch.zeros(4, dtype=torch.int32)
    more = {"max_length_q": 300, "max_length_k": 300}
    tables = [torch.empty(1, TOKENS, 64, dtype=torch.bfloat16) for _ in range(2)] if kind == "mistral" else []

    def run(params: dict[str, torch.Tensor], x: torch.Tensor, ends: torch.Tensor, *tables: torch.Tensor) -> Any:
        arguments = {**more, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        if tables:
            arguments |= {"position_embeddings": tables, "attention_mask": None, "position_ids": None, "past_key_values": None}
        return torch.func.functional_call(layer, params, (x,), arguments)

    return run, (dict(layer.named_parameters()), hidden, ends, *tables)


def of_storages(tensors: Iterator[torch.Tensor], without: set[int]) -> int:
    """Bytes of the distinct storages that have the batch's tokens in them."""
    sizes = {}
    for x in tensors:
        if TOKENS in x.shape and id(x.untyped_storage()) not in without:
            sizes[id(x.untyped_storage())] = (x.untyped_storage().nbytes(), x.untyped_storage())
    return sum(size for size, _ in sizes.values())


def ready(kind: str, model: Any, adapted: list[str] | None, shape: Shape) -> tuple[Any, tuple[Any, ...]]:
    """`calls`, of what is trained and with what the layer before hands on."""
    model = model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        p.requires_grad_(adapted is None or "lora_" in name)
    dtype = torch.float32 if adapted is None or kind == "roberta" else torch.bfloat16
    hidden = torch.empty(1, TOKENS, shape.hidden, dtype=dtype, requires_grad=True) * 1  # no leaf, of which autocast would keep one copy
    return calls(kind, model, hidden)


def traced(kind: str, adapted: list[str] | None, compiled: bool) -> tuple[float, Shape]:
    """(bytes a token that a layer keeps for backward; the shape)."""
    model, shape = build(kind, adapted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        run, arguments = ready(kind, model, adapted, shape)
        with torch.autocast("cpu", torch.bfloat16):
            if not compiled:
                return _eager(run, arguments) / TOKENS, shape
            graphs: dict[str, Any] = {}
            partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
            keep = lambda graph, _: graphs.setdefault("forward", graph)  # noqa: E731
            aot_function(run, fw_compiler=keep, bw_compiler=lambda g, _: g, partition_fn=partition, decompositions=select_decomp_table())(
                *arguments
            )
    return _saved(graphs["forward"], arguments[1]) / TOKENS, shape


def _eager(run: Any, arguments: tuple[Any, ...]) -> int:
    params, tables = arguments[0], arguments[3:]
    without = {id(p.untyped_storage()) for p in (*params.values(), *tables)}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        run(*arguments)
    return of_storages(iter(saved), without)


def _saved(graph: Any, hidden: torch.Tensor) -> int:
    """Bytes of what a compiled forward hands to backward: its outputs but the first, each storage once."""
    views = ("view", "alias", "permute", "aten.t.default", "reshape", "squeeze", "slice", "expand", "transpose")
    outputs = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    found: dict[Any, int] = {}
    for node in outputs[1:]:
        value = getattr(node, "meta", {}).get("val")
        if not isinstance(value, torch.Tensor) or TOKENS not in value.shape:
            continue
        source = node
        while source.op == "call_function" and any(word in str(source.target) for word in views):
            source = source.args[0]
        if source.op == "placeholder" and source.meta["val"].shape != hidden.shape:
            continue  # the tables of positions, which all layers share
        found[source] = (
            source.meta["val"].numel() * source.meta["val"].element_size()
            if source.op == "placeholder"
            else value.numel() * value.element_size()
        )
    return sum(found.values())


CASES = {
    "mistral, all linears": ("mistral", LINEARS),
    "mistral, two linears": ("mistral", ["q_proj", "v_proj"]),
    "mistral, every weight": ("mistral", None),
    "roberta, two linears": ("roberta", ["query", "value"]),
    "roberta, every weight": ("roberta", None),
}


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "not compiled"])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_keeps_what_the_formula_says(case: str, compiled: bool) -> None:
    kind, adapted = CASES[case]
    found, shape = traced(kind, adapted, compiled)
    chosen = targets(shape, adapted) if adapted is not None else ()
    way = Way(chosen, adapted is None, RANK, 2, compiled, True)
    assert kept(shape, way).a_token == pytest.approx(found, rel=0.02)


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, of what is made while it is on and has the batch's tokens in it.

    Attributes:
        most: the largest sum since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def _ended(self, key: int) -> None:
        self.sizes.pop(key)

    def _begun(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        if (key := storage._cdata) not in self.sizes:
            self.sizes[key] = storage.nbytes() if TOKENS in x.shape else 0
            weakref.finalize(storage, self._ended, key)
            self.most = max(self.most, sum(self.sizes.values()))

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = call(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._begun, out)
        return out


@pytest.mark.parametrize("again", [True, False], ids=["computed again", "kept"])
@pytest.mark.parametrize("case", CASES)
def test_backward_takes_what_the_formula_says(case: str, again: bool) -> None:
    kind, adapted = CASES[case]
    model, shape = build(kind, adapted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        run, arguments = ready(kind, model, adapted, shape)
        live = Live()
        live.sizes[arguments[1].untyped_storage()._cdata] = 0
        with live:
            with torch.autocast("cpu", torch.bfloat16):
                out = checkpoint(run, *arguments, use_reentrant=False) if again else run(*arguments)
            out = out[0] if isinstance(out, tuple) else out
            live.most = 0
            torch.autograd.backward(out, torch.empty_like(out))
    way = Way(targets(shape, adapted) if adapted is not None else (), adapted is None, RANK, 2, False, True)
    ends = 2 * residual(shape, way) * shape.hidden  # the layer's result, and its gradient
    beside = 0.0 if again else kept(shape, way).a_token
    assert ends + beside + backward(shape, way, again).a_token == pytest.approx(live.most / TOKENS, rel=0.05)

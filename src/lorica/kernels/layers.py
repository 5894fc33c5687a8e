"""How a model's repeated layers run in training: compiled, and with their activations kept, computed again in backward, or sent to host
memory meanwhile. Evaluation always takes the plain forward.

A layer's forward is replaced on the layer itself, outside of what is compiled; all layers share one compiled code for each size.
"""

from __future__ import annotations

import atexit
import functools
import subprocess
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import psutil
import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorica.kernels.dropout import seed_adapters
from lorica.kernels.loss import draws
from lorica.signals import none_for_children


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers, in order; empty for architectures that don't mark theirs (transformers' GradientCheckpointingLayer)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def start_compilers() -> None:
    """Start the compiler's processes before it does, with signals blocked: torch waits forever for one that was ended by a signal to its
    process group (pytorch#189290), while the state of a run that is asked to stop is to be saved after the step under way."""
    try:
        from torch._inductor.async_compile import AsyncCompile, get_compile_threads
    except ImportError:  # they are no public names
        return
    if get_compile_threads() > 1 and not AsyncCompile.process_pool.cache_info().currsize:
        with none_for_children():
            pool = AsyncCompile.process_pool()
        if (helper := getattr(pool, "process", None)) is not None:
            atexit.register(_end, helper)


def _end(helper: subprocess.Popen[bytes]) -> None:
    """The compiler's processes, before torch does at the exit: they would finish what nobody wants any more, for SIGTERM is blocked."""
    with suppress(psutil.Error):
        for process in [*psutil.Process(helper.pid).children(recursive=True), helper]:
            process.kill()


class Layers:
    """The layers of one model, and how they run.

    Those below the first one that is trained keep nothing for backward and are never computed again: they are counted nowhere here.

    Attributes:
        layers: from the first trained one on; all where none is.
        recomputed: how many layers, from the first on, keep only their input and are computed again in backward. The last ones keep
            theirs, which are gone by the time that the first are computed again.
        offload: the inputs that recomputed layers keep wait in pinned host memory.
        random: whether a layer draws random numbers (dropout), by its modules or as seen while `watching`.
        kept: bytes of activations that a layer kept in its latest forward in training, by layer; recorded while `measuring`, for which
            nothing is compiled that may not be needed.
    """

    def __init__(self, model: nn.Module) -> None:
        repeated = repeated_layers(model)
        first = next((i for i, layer in enumerate(repeated) if any(p.requires_grad for p in layer.parameters())), 0)
        self.layers = repeated[first:]
        self.recomputed = 0
        self.offload = False
        self.measuring = self.watching = False
        self.kept: dict[int, int] = {}
        self._host: dict[Any, torch.Tensor] = {}
        self._compiled: Callable[..., Any] | None = None
        self._compiled_recomputed: Callable[..., Any] | None = None
        self.random = draws(model)
        self._seeds: torch.Tensor | None = None
        self._plain = [layer.forward for layer in self.layers]
        for i, layer in enumerate(self.layers):
            layer.forward = functools.partial(self._run, i)
        for layer in repeated[:first]:
            layer.forward = functools.partial(self._run_below, layer, layer.forward)

    def __len__(self) -> int:
        return len(self.layers)

    def seed_dropout(self, model: nn.Module, device: torch.device) -> None:
        """Let the masks of adapters' dropout follow from seeds that each micro-step draws, so that these layers draw nothing."""
        if self.layers:
            self._seeds = seed_adapters(model, device)
            self.random = draws(model)

    def compile(self, on: bool = True) -> None:
        """Let training use compiled layers. Each size that they meet is compiled when it is first met."""
        self._compiled = torch.compile(_forward, dynamic=False) if on else None
        self._compiled_recomputed = torch.compile(_forward_recomputed, dynamic=False) if on else None
        if on:
            start_compilers()
            # two kinds of layers (the first has an input without gradient), some sizes: more than dynamo's default limit of 8 may come
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)

    def _run_below(self, layer: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._compiled and layer.training and torch.is_grad_enabled():
            return self._compiled(layer, *args, **kwargs)
        return plain(*args, **kwargs)

    def _run(self, i: int, *args: Any, **kwargs: Any) -> Any:
        if not (self.layers[i].training and torch.is_grad_enabled()):
            return self._plain[i](*args, **kwargs)
        if i == 0 and self._seeds is not None:
            self._seeds.random_()
        if not (self.measuring or self.watching):
            return self._trained(i, args, kwargs)
        before, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
        out = self._trained(i, args, kwargs)
        self.kept[i] = torch.cuda.memory_allocated() - before
        self.random |= self.watching and not torch.equal(state, torch.cuda.get_rng_state())
        return out

    def _trained(self, i: int, args: Any, kwargs: Any) -> Any:
        run = functools.partial(self._compiled, self.layers[i]) if self._compiled else self._plain[i]
        if i >= self.recomputed:
            return run(*args, **kwargs)
        of_input = (args[0] if args else kwargs["hidden_states"]).data_ptr()
        hooks = torch.autograd.graph.saved_tensors_hooks(functools.partial(self._to_host, i, of_input), _to_device)
        with hooks if self.offload else nullcontext():
            if self._compiled_recomputed and not (self.random or self.measuring):
                with torch._functorch.config.patch(activation_memory_budget=0.0):
                    return self._compiled_recomputed(self.layers[i], *args, **kwargs)
            keep = self.random or not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing()
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=keep, **kwargs)

    def _to_host(self, i: int, of_input: int, x: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        """A layer's input, into host memory that is its own: nothing is allocated after the first time. What else it keeps stays."""
        if x.data_ptr() != of_input:
            return x.device, x
        key = (i, x.shape, x.dtype)
        if key not in self._host:
            self._host[key] = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        return x.device, self._host[key].copy_(x, non_blocking=x.is_cuda)


def _to_device(kept: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, x = kept
    return x.to(device, non_blocking=True)


def _forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _forward_recomputed(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """`_forward` as a code of its own, which is compiled with no memory for activations: backward computes again what it needs of them,
    but not the layer's last product, as a checkpoint around compiled code would. Dropout's masks would not be drawn alike."""
    return type(layer).forward(layer, *args, **kwargs)

"""`model.train_layers`: the last layers learn, and what comes after them. Nothing flows back below, so that nothing is kept there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lorica.checks import check_layers, trained_layers
from lorica.config import ConfigError, ModelConfig


class Last:
    """The last layers of a model, as `model.train_layers` names them.

    Attributes:
        names: of its trained layers. numbers: theirs, as PEFT's `layers_to_transform` has them. stack: the name of what holds all layers.
    Raises:
        ConfigError: the architecture's layers are not known, or they are fewer.
    """

    def __init__(self, model: nn.Module, settings: ModelConfig) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [name for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
        stacks = {name.rpartition(".")[0] for name in layers}
        if len(stacks) != 1 or not all(name.rpartition(".")[2].isdigit() for name in layers):
            raise ConfigError(
                "model.train_layers", settings.train_layers, "this architecture's layers are not known", "model.train_layers=null"
            )
        check_layers(settings, len(layers))
        (self.stack,) = stacks
        self.names = layers[-trained_layers(settings, len(layers)) :]
        self.numbers = [int(name.rpartition(".")[2]) for name in self.names]
        order = [name for name, _ in model.named_modules()]
        self._after = {name for name in order[order.index(layers[-1]) :] if not self.within(name)}

    def within(self, name: str) -> bool:
        """Whether a module is one of the layers, trained or not, or a part of one."""
        return name.startswith(f"{self.stack}.")

    def after(self, name: str) -> bool:
        """Whether a module comes after all layers, as modules are declared: final norms, poolers, heads."""
        return name in self._after

    def learns(self, name: str) -> bool:
        """Whether a module is a part of a trained layer, or comes after them."""
        return self.after(name) or any(name == layer or name.startswith(f"{layer}.") for layer in self.names)

    def targets(self, asked: Any, linear: Iterable[str]) -> Any:
        """`model.lora.target_modules` for PEFT, which adds `layers_to_transform` to all but full names: those of layers that come after
        the stack are full. all-linear: the kinds that the trained layers have.

        Args:
            linear: names of all linear layers.
        """
        if asked == "all-linear":
            return sorted({name.rpartition(".")[2] for name in linear if self.within(name)})
        if asked is None:
            return None
        ends = tuple(f".{target}" for target in asked)
        return [*asked, *(name for name in linear if self.after(name) and f".{name}".endswith(ends) and name not in asked)]

    def check_whole(self, model: nn.Module, asked: Iterable[str]) -> None:
        """Refuse modules that are to be trained whole where nothing is.

        Args:
            asked: `model.lora.modules_to_save`.
        Raises:
            ConfigError: one lies below the trained layers, or in each layer.
        """
        for module in asked:
            for name, _ in model.named_modules():
                if f".{name}".endswith(f".{module}") and not self.after(name):
                    raise ConfigError(
                        "model.lora.modules_to_save",
                        module,
                        f"{name} does not come after the layers; model.train_layers trains nothing else whole",
                        "model.lora.modules_to_save=null",
                    )


def freeze(model: nn.Module, settings: ModelConfig) -> None:
    """Train the last layers of a whole model and what comes after them, but no embeddings: nor a head that is the embeddings too.

    What is frozen stays in its type: the model that is saved has the base's own bits there.

    Raises:
        ConfigError: the architecture's layers are not known, or they are fewer.
    """
    last = Last(model, settings)
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for name, p in model.named_parameters():
        p.requires_grad_(last.learns(name.rpartition(".")[0]) and id(p) not in tables)

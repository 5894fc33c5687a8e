"""GPUs by name: their memory as torch reports it, what they can do, how fast they multiply, what they draw."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from lorica.config import ConfigError, GpuSettings
from lorica.proposals import nearest

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """One GPU.

    Attributes:
        memory: bytes, of all processes. capability: of CUDA, as 8.9. teraflops: dense bf16 (fp16 on older cards) with fp32 sums, by the
            maker's data sheet. watts: its limit. bandwidth: of its memory, GB/s. context: bytes that CUDA takes for itself. busy: bytes
            that other processes hold. count: of them in this machine; None where that is not known.
        like: the card whose speed is taken for this one's, which is known by its memory alone.
    """

    name: str
    memory: int
    capability: float
    teraflops: float
    watts: float
    bandwidth: float
    context: int = 480 << 20
    busy: int = 0
    count: int | None = None
    like: str = ""

    @property
    def usable(self) -> int:
        """Bytes that torch can have."""
        return self.memory - self.context - self.busy

    @property
    def bf16(self) -> bool:
        """Whether it multiplies in bf16: also what variable-length attention and compiled layers need here."""
        return self.capability >= 8.0

    def products(self, size: int) -> float:
        """Teraflops in numbers of so many bytes. Of four: half by TF32, which came with bf16; else fp32 outside the tensor cores, an
        eighth (T4 8.1 of 65, V100 15.7 of 125: the maker's data sheets)."""
        if size < 4:
            return self.teraflops
        return self.teraflops / (2 if self.bf16 else 8)

    @property
    def workspace(self) -> int:
        """Bytes of cuBLAS's workspaces (torch's defaults: 32 MiB from Hopper on, else 8 MiB; one more of cublasLt)."""
        return (64 << 20) if self.capability >= 9.0 else (17 << 20)


def _card(title: str, gib: float, capability: float, teraflops: float, watts: float, bandwidth: float) -> Card:
    return Card(title, int(gib * GIB), capability, teraflops, watts, bandwidth)


# Memory: torch.cuda.get_device_properties(0).total_memory, which is some hundred MiB below the box's number.
CARDS = {
    "rtx3060_12gb": _card("RTX 3060 12 GB", 11.76, 8.6, 25, 170, 360),
    "rtx3070_8gb": _card("RTX 3070 8 GB", 7.66, 8.6, 41, 220, 448),
    "rtx3080_10gb": _card("RTX 3080 10 GB", 9.66, 8.6, 60, 320, 760),
    "rtx3090_24gb": _card("RTX 3090 24 GB", 23.57, 8.6, 71, 350, 936),
    "rtx4060_8gb": _card("RTX 4060 8 GB", 7.63, 8.9, 30, 115, 272),
    "rtx4060ti_16gb": _card("RTX 4060 Ti 16 GB", 15.57, 8.9, 44, 165, 288),
    "rtx4070_12gb": _card("RTX 4070 12 GB", 11.6, 8.9, 58, 200, 504),
    "rtx4080_16gb": _card("RTX 4080 16 GB", 15.57, 8.9, 97, 320, 717),
    "rtx4090_24gb": _card("RTX 4090 24 GB", 23.5, 8.9, 165, 450, 1008),
    "rtx5060ti_16gb": _card("RTX 5060 Ti 16 GB", 15.47, 12.0, 47, 180, 448),
    "rtx5070_12gb": _card("RTX 5070 12 GB", 11.5, 12.0, 62, 250, 672),
    "rtx5080_16gb": _card("RTX 5080 16 GB", 15.47, 12.0, 113, 360, 960),
    "rtx5090_32gb": _card("RTX 5090 32 GB", 31.36, 12.0, 209, 575, 1792),
    "t4_16gb": _card("T4 16 GB", 14.56, 7.5, 65, 70, 300),
    "colab_t4": _card("Colab's T4", 14.74, 7.5, 65, 70, 300),
    "kaggle_t4": _card("one of Kaggle's two T4", 14.74, 7.5, 65, 70, 300),
    "l4_24gb": _card("L4 24 GB", 22.03, 8.9, 121, 72, 300),
    "a10_24gb": _card("A10 24 GB", 21.98, 8.6, 125, 150, 600),
    "a10g_24gb": _card("A10G 24 GB", 21.99, 8.6, 70, 300, 600),
    "l40s_48gb": _card("L40S 48 GB", 44.4, 8.9, 362, 350, 864),
    "a100_40gb": _card("A100 40 GB", 39.39, 8.0, 312, 400, 1555),
    "a100_80gb": _card("A100 80 GB", 79.15, 8.0, 312, 400, 2039),
    "h100_80gb": _card("H100 80 GB", 79.11, 9.0, 989, 700, 3350),
    "h200_141gb": _card("H200 141 GB", 139.8, 9.0, 989, 700, 4800),
    "b200_180gb": _card("B200 180 GB", 178.3, 10.0, 2250, 1000, 8000),
}


def choose(asked: GpuSettings) -> Card:
    """The card that is asked for, or the one at hand.

    Raises:
        ConfigError: no such card; none at hand; no memory left.
    """
    if asked.name is not None:
        card = _named(asked.name)
    elif asked.memory_gib is not None:
        like = _like(asked.memory_gib)
        card = replace(like, name=f"a card of {asked.memory_gib:g} GiB", like=like.name)
    else:
        card = at_hand()
    if asked.memory_gib is not None:
        card = replace(card, memory=int(asked.memory_gib * GIB), busy=0)
    if card.usable < GIB // 4:
        raise ConfigError("gpu.memory_gib", f"{card.memory / GIB:.3g}", "leaves nothing beside CUDA's own memory", "gpu.memory_gib=8")
    return card


def _named(name: str) -> Card:
    plain = re.sub("^(nvidia|geforce|tesla)+", "", _plain(name))
    plain = f"rtx{plain}" if plain[:1].isdigit() else plain
    for known, card in CARDS.items():
        if plain == _plain(known):
            return card
    starts = [known for known in CARDS if _plain(re.sub(r"_\d+gb$", "", known)) == plain]
    if len(starts) == 1:
        return CARDS[starts[0]]
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b)?", name.strip().lower()):
        raise ConfigError("gpu", name, "is no card's name", f"gpu.memory_gib={size[1]}")
    near = starts[0] if starts else nearest(plain, CARDS) or "rtx4090_24gb"
    raise ConfigError("gpu", name, f"must be one of {', '.join(CARDS)}", f"gpu={near}, or gpu.memory_gib=24")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _like(gib: float) -> Card:
    """The known card with Ampere's abilities or better that is nearest in memory."""
    return min((card for card in CARDS.values() if card.bf16), key=lambda card: abs(card.memory / GIB - gib))


def at_hand() -> Card:
    """This machine's first GPU, asked of its driver.

    Raises:
        ConfigError: there is none.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        title = pynvml.nvmlDeviceGetName(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        capability = float("{}.{}".format(*pynvml.nvmlDeviceGetCudaComputeCapability(handle)))
        watts = pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) / 1000
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = int(pynvml.nvmlDeviceGetCount()) if visible is None else len([one for one in visible.split(",") if one.strip()])
    except Exception:  # no package, no driver, no GPU: each with an error of its own
        raise ConfigError(
            "gpu", None, "this machine has no NVIDIA GPU: name one", "gpu=rtx3070_8gb, gpu=colab_t4, gpu=h200_141gb, or gpu.memory_gib=12"
        ) from None
    name = title if isinstance(title, str) else title.decode()
    known = _by_title(name)
    like = known or _like(memory.total / GIB)
    return Card(
        name,
        int(memory.total),
        capability,
        like.teraflops,
        float(watts),
        like.bandwidth,
        busy=int(memory.used),
        count=count,
        like="" if known else like.name,
    )


def of_device(title: str, usable: int, capability: float) -> Card:
    """A GPU that torch has begun to use. usable: bytes that it may still take, and has."""
    like = _by_title(title) or _like(usable / GIB)
    return Card(title, usable, capability, like.teraflops, like.watts, like.bandwidth, context=0)


def _by_title(title: str) -> Card | None:
    """The known card of a driver's name, as `NVIDIA GeForce RTX 4060 Ti`."""
    words = set(re.sub(r"[^a-z0-9]+", " ", title.lower()).split())
    fits = [
        card for card in CARDS.values() if {w for w in card.name.lower().split() if (w != "gb" and not w.isdigit()) or len(w) == 4} <= words
    ]
    return max(fits, key=lambda card: len(card.name), default=None)

"""The token contract: what a few texts become, kept beside the weights and asked of the tokenizer wherever they are used again.

A second bos, another chat template, a tokenizer that was saved anew: none of them fails by itself, all make a worse model of a good one.
So training writes down the exact ids of some texts, asked as a user would ask them (wording, template, labels, truncation), the special
tokens and a digest of the whole vocabulary. Resuming, predicting, merging and exporting compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorica.beside_weights import read_object
from lorica.config import ConfigError
from lorica.data.asking import ask_text
from lorica.data.encoding import CausalEncoder, ClassifierEncoder, Truncation, build_encoder
from lorica.data.examples import Example
from lorica.durable import write_json

FILE = "token_contract.json"
SHOWN = 512  # ids that are kept one by one; of more, their number and a digest
SPECIAL = ("bos", "eos", "pad", "unk", "sep", "cls")
TEXTS = (
    "Is this right? It's 3.14159 + 2 = $1,234.50, i.e. x_1 != y^2.",
    "TWO  spaces,\ttab\nand a second line ",
    "Übergröße, naïve café, 東京, 🙂 und привет",
    "marks as text: <s> </s> [INST] <|im_start|> [SEP] <pad>",
)


def made(task: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The contract of a tokenizer and of how a model is asked.

    Args:
        task: as in lorica.json.
    """
    encoder = build_encoder(task, tokenizer)
    texts = [*TEXTS, "word " * (encoder.max_length + 8)]  # the last is too long: how it is cut belongs to the contract
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "texts": {text if len(text) < 200 else "a text that is too long": _ids(_read(encoder, task, text)) for text in texts},
        "with_special_tokens": _ids(tokenizer(TEXTS[0])["input_ids"]),
        "special_tokens": {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL},
        "vocabulary": {"tokens": len(vocabulary), "sha256": hashlib.sha256(repr(vocabulary).encode("utf-8", "replace")).hexdigest()},
    }


def _read(encoder: ClassifierEncoder | CausalEncoder, task: dict[str, Any], text: str) -> list[int]:
    """All ids that a model meets for a text: its prompt, and what it would learn or be compared by."""
    example = ask_text(task, text)
    if isinstance(encoder, ClassifierEncoder):
        return list(encoder.encode([example], Truncation())[0].ids)
    if encoder.label_names:
        scored = encoder.candidates([example])[0]
        return [*(i for ids in scored.sequences for i in ids), *(token for picks in scored.picks for *_, token in picks)]
    turns = (*example.messages[:-1], type(example.messages[-1])("assistant", "Yes.")) if example.messages else ()
    learnt = encoder.encode([Example("", prompt=example.prompt, completion="Yes.", messages=turns)], Truncation())[0]
    return [*encoder.prompt_ids(example), *learnt.ids, *learnt.labels]


def _ids(ids: Sequence[int]) -> list[int] | dict[str, Any]:
    if len(ids) <= SHOWN:
        return list(ids)
    return {"ids": len(ids), "sha256": hashlib.sha256(repr(list(ids)).encode()).hexdigest()}


def write(folder: Path, contract: dict[str, Any]) -> None:
    """Keep a contract in a folder."""
    write_json(folder / FILE, contract)


def check(folder: Path, task: dict[str, Any], tokenizer: Any, key: str) -> None:
    """Compare a tokenizer, and how a model is asked, with the contract that a folder holds; one that holds none has nothing to be broken.

    Args:
        key: of the configuration, for the message.
    Raises:
        ConfigError: they differ; the first difference is said.
    """
    file = folder / FILE
    if not file.is_file():
        return
    kept = read_object(file)
    if broken := difference(kept, made(task, tokenizer)):
        raise ConfigError(
            key,
            folder,
            f"breaks its token contract ({FILE}): {broken}",
            f"the tokenizer files, template and wording that it was trained with; without its {FILE}, if you changed them on purpose",
        )


def difference(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first difference of two contracts, in words; None where there is none."""
    for name in ("special_tokens", "vocabulary", "texts"):
        kept = then.get(name)
        if not isinstance(kept, dict):
            return f"it is damaged, it has no {name}"
    for name, token in then["special_tokens"].items():
        if token != now["special_tokens"].get(name):
            return f"the {name} token was {token}, it is {now['special_tokens'].get(name)}"
    if then["vocabulary"] != now["vocabulary"]:
        sizes = then["vocabulary"].get("tokens"), now["vocabulary"]["tokens"]
        return (
            f"the vocabulary had {sizes[0]} tokens, it has {sizes[1]}"
            if sizes[0] != sizes[1]
            else "tokens of the vocabulary have other ids"
        )
    bare = ({TEXTS[0]: contract.get("with_special_tokens")} for contract in (then, now))
    for before, after in ((then["texts"], now["texts"]), tuple(bare)):
        for text, ids in after.items():
            if before.get(text) != ids:
                return f"{text!r} was read as {_said(before.get(text))}, it is read as {_said(ids)}"
    return None


def _said(ids: Any) -> str:
    if isinstance(ids, list):
        return f"{len(ids)} ids ({' '.join(map(str, ids[:12]))}{' ...' if len(ids) > 12 else ''})"
    return f"{ids.get('ids')} ids (sha256 {str(ids.get('sha256'))[:8]})" if isinstance(ids, dict) else "nothing"

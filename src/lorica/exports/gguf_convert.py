"""Runs llama.cpp's convert_hf_to_gguf.py, with a rule for tokenizers that it does not know by their hash.

`python -m lorica.exports.gguf_convert FOLDER RULE ...`: FOLDER has the script, the rest are its own arguments. RULE is used where it
would end with "pre-tokenizer was not recognized"; "" lets it end so.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any


def main(arguments: list[str]) -> None:
    """Run the script in this process."""
    folder, rule, *rest = arguments
    sys.path.insert(0, folder)
    from conversion import base  # type: ignore[import-not-found]

    known = base.TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            if not rule:
                raise
            return rule

    base.TextModel.get_vocab_base_pre = get_vocab_base_pre
    sys.argv = [f"{folder}/convert_hf_to_gguf.py", *rest]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

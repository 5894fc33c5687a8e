"""Chat templates come with tokenizers and are programs: transformers runs them in jinja's sandbox, and this file bounds what they take.

The sandbox keeps a template from files, modules and Python's insides. It does not keep it from looping for hours or from filling the
memory, so each template is first tried on small conversations in a child process with limits of its own.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from lorica.config import ConfigError

SECONDS = 5.0  # for all trials of a template together; they take a millisecond each
BYTES = 1 << 30  # that the trials may add to the memory
TRIALS: tuple[tuple[str, ...], ...] = (("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 3)


def check(tokenizer: Any) -> None:
    """Refuse a chat template that does not come to an end, or needs a lot of memory, on small conversations.

    One that raises is left to the conversation it raises for: many refuse a system turn.

    Raises:
        ConfigError: names `model.use_chat_template`.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str) and (why := _trouble(template)):
        raise ConfigError("model.use_chat_template", True, f"the tokenizer's chat template {why}", "model.use_chat_template=false")


@functools.lru_cache(32)
def _trouble(template: str) -> str:
    """What is wrong with a template, or "". Where processes can't be forked it is not tried."""
    if not sys.platform.startswith("linux"):
        return ""
    child = multiprocessing.get_context("fork").Process(target=_try, args=(template,), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child only renders
        child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        return f"does not end within {SECONDS:g} s on a conversation of two turns"
    return {0: "", MEMORY: f"takes more than {BYTES >> 20:,} MiB", SYNTAX: "is no template that jinja can read"}.get(
        child.exitcode or 0, f"kills the process that tries it (exit status {child.exitcode})"
    )


MEMORY, SYNTAX = 3, 4  # exit statuses


def _try(template: str) -> None:
    """In the child: render every trial, and leave without running what the parent has registered for its own end."""
    import resource

    os.setsid()  # out of the terminal's reach: the parent ends it
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = 0
    try:
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        for roles in TRIALS:
            turns = [{"role": role, "content": "A few words."} for role in roles]
            for generate in (False, True):
                try:
                    render_jinja_template(
                        conversations=[turns[:-1] if generate else turns], chat_template=template, add_generation_prompt=generate
                    )
                except MemoryError:
                    status = MEMORY
                except TemplateSyntaxError:
                    status = SYNTAX
                except Exception:  # it refuses this conversation
                    continue
    finally:
        os._exit(status)

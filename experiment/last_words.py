"""What a process that fails has to say: of many with the same failure, one says it."""

from __future__ import annotations

import os
from datetime import timedelta

from experiment.errors import LostError, one_line


def last_words(error: Exception) -> str | int:
    """What to end the process with: the error in one line, or the exit code 1 if it was said.

    That another process is gone is only worth saying if that one could not say why.
    """
    text = f"error: {one_line(error)}"
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    heard = "any" if isinstance(error, LostError) else text
    return text if alone or _first_to_say(text, heard) else 1


def _first_to_say(text: str, heard: str) -> bool:
    """Whether no process of torchrun has said ``heard`` yet; True where one cannot know."""
    import torch.distributed as dist

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        store = dist.PrefixStore(f"last words {attempt}", store)
        before = store.add(heard, 1) - 1
        for key in {text, "any"} - {heard}:
            store.add(key, 1)
    except (KeyError, ValueError, RuntimeError):  # the keeper of the store is gone
        return True
    return before == 0

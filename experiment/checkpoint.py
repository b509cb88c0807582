"""Checkpoints: written in one step, checked by digest, loaded without running what they hold."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiment.errors import RunError
from experiment.progress import say

FORMAT, VERSION = "score-sde checkpoint", 1
NAME = re.compile(r"step-(\d{8})\.pt")
PARTIAL = re.compile(r"step-\d{8}\.pt(\.sha256)?\.partial")


class CheckpointError(RunError):
    """A checkpoint that cannot be used: which file, why, and what to do."""

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"checkpoint {path}: {reason}; {remedy}")


def save_checkpoint(
    folder: Path, iteration: int, state: Mapping[str, Any], keep: int | None = 2
) -> Path:
    """Write ``step-<iteration>.pt`` and its digest beside it, then drop all but the newest
    ``keep`` up to this one.

    Each file is written under another name, flushed to disk and renamed, the digest first: a crash
    at any moment leaves the previous checkpoint whole. ``sha256sum -c`` checks the digest too.

    Args:
        folder: Made if it is not there.
        iteration: Iterations done.
        state: Tensors, numbers, strings, and dicts or lists of them.
        keep: How many to keep, >= 1; None for all.

    Raises:
        OSError: If the disk refuses; no partial file stays behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{iteration:08d}.pt"
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, "iteration": iteration, **state}, buffer)
    content = buffer.getbuffer()
    write_atomically(
        _digest_path(path), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode()
    )
    try:
        write_atomically(path, content)
    except OSError:
        _remove_stray_digests(folder)
        raise
    # later ones were passed over as damaged when the run went on: no reason to drop good ones
    earlier = [old for old in list_checkpoints(folder) if old.name <= path.name]
    for old in earlier[:-keep] if keep else ():
        remove_checkpoint(old)
    return path


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, and then its digest."""
    path.unlink(missing_ok=True)
    _digest_path(path).unlink(missing_ok=True)


class Saver:
    """Saves the checkpoints of a run; a full disk costs a checkpoint and not the run at once.

    Args:
        folder: Where they go.
        patience: How many saves in a row may fail; one more ends the run.
    """

    def __init__(self, folder: Path, patience: int = 3) -> None:
        self.folder, self.patience, self.failed = folder, patience, 0

    def __call__(self, iteration: int, state: Mapping[str, Any], *, last: bool = False) -> bool:
        """Save; with a warning instead if the disk refuses and an earlier checkpoint is there.

        Args:
            iteration: Iterations done.
            state: See :func:`save_checkpoint`.
            last: Whether no later one comes, so that this one has to be written.

        Returns:
            Whether it was written.

        Raises:
            RunError: If the run cannot go on like that.
        """
        try:
            save_checkpoint(self.folder, iteration, state)
        except OSError as error:
            self.failed += 1
            said = f"checkpoint at iteration {iteration} not written ({error})"
            whole = list_checkpoints(self.folder)
            if last or not whole or self.failed > self.patience:
                raise RunError(
                    f"{said}, the last of {self.failed} in a row; make room on the disk, and the "
                    f"same command goes on from {whole[-1] if whole else 'the beginning'}."
                ) from error
            say(f"warning: {said}; the one before it stays")
            return False
        self.failed = 0
        return True


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace ``path`` by ``content`` so that a reader, or a crash, sees the old file or the new
    one.

    Raises:
        OSError: If the disk refuses; the old file is still there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.filename is None:  # writing, as opposed to opening, does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove_partial_files(folder: Path) -> None:
    """Delete what a killed writer left behind; call it only while holding the run's lock."""
    for path in folder.glob("*.partial"):
        if PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)
    _remove_stray_digests(folder)


def _remove_stray_digests(folder: Path) -> None:
    for path in folder.glob("step-*.pt.sha256"):
        if NAME.fullmatch(path.stem) and not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in ``folder`` by iteration, the newest last; found by scanning."""
    return sorted(path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name))


def iteration_of(path: Path) -> int:
    """The iteration that the name of a checkpoint says."""
    return int(NAME.fullmatch(path.name)[1])


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours.

    Only tensors and plain data are accepted (``weights_only``): a file that would run code is
    refused.

    Raises:
        CheckpointError: If the file is missing, damaged, not one of ours or from a newer version.
    """
    content = _read(path)
    remedy = "use an older checkpoint of the run (checkpoint=PATH), or train again"
    digest = _digest_path(path)
    if digest.is_file():
        if digest.read_bytes().split()[:1] != [hashlib.sha256(content).hexdigest().encode()]:
            raise CheckpointError(
                path, "its SHA-256 differs from the one beside it, so the file is damaged", remedy
            )
    else:
        _check_archive(path, content, remedy)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            path,
            "it holds more than tensors and plain data, so reading it could run code; refused",
            "pass a file written by mode=train",
        ) from error
    except Exception as error:  # several types for damage
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            path, f"it cannot be read ({type(error).__name__}: {reason})", remedy
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            path, "it is a torch file but none of ours", "pass a file written by mode=train"
        )
    if state.get("version") != VERSION:
        raise CheckpointError(
            path,
            f"it has format version {state.get('version')}, this program reads {VERSION}",
            "use the version of score-sde that wrote it",
        )
    if not isinstance(state.get("iteration"), int) or state["iteration"] < 0:
        raise CheckpointError(
            path, f"its iteration is {state.get('iteration')!r}, no whole number >= 0", remedy
        )
    return state


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, with a warning for each damaged one passed over; None
    if there is none at all.

    Raises:
        CheckpointError: If there are some and all are damaged.
    """
    import logging

    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            then = "; trying the one before it" if path != found[0] else ""
            logging.getLogger(__name__).warning("%s%s", error, then)
    if found:
        raise CheckpointError(
            found[-1],
            f"it cannot be used, nor can any other of the {len(found)} in its directory",
            "look at the warnings above, or start over with run.fresh=true, which keeps the files",
        )
    return None


def stored_config(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that a checkpoint was trained with, as plain dicts."""
    try:
        return json.loads(state["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            path, "its configuration is missing or damaged", "train again"
        ) from error


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor] | None, path: Path) -> None:
    """Put ``weights`` into ``model``.

    Raises:
        CheckpointError: If they do not fit, see :func:`check_weights`.
    """
    model.load_state_dict(check_weights(model, weights, path))


def check_weights(
    model: nn.Module, weights: Mapping[str, torch.Tensor] | None, path: Path
) -> Mapping[str, torch.Tensor]:
    """``weights``, if they fit ``model``.

    Raises:
        CheckpointError: If they do not fit, with every difference of name or shape (the first
            eight).
    """
    if not isinstance(weights, Mapping):
        raise CheckpointError(path, "it holds no weights", "pass a file written by mode=train")
    own = model.state_dict()
    wrong = [f"{name} missing" for name in own if name not in weights]
    wrong += [f"{name} unknown" for name in weights if name not in own]
    wrong += [
        f"{name} {_kind(weights[name])} where the model has {_kind(own[name])}"
        for name in own
        if name in weights and _kind(weights[name]) != _kind(own[name])
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            path,
            f"its weights do not fit the network: {'; '.join(wrong[:8])}{more}",
            "rebuild with the configuration it was trained with, or choose another run.name",
        )
    return weights


def _kind(value: object) -> str:
    """Shape of a tensor of real numbers; of others the type too, which loading would round to."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    numbers = "" if value.is_floating_point() else f" {value.dtype}"
    return f"{tuple(value.shape)}{numbers}"


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Within it the content of ``path`` is put to use; what is missing there or does not fit is
    told as damage of that file.

    Raises:
        CheckpointError: In place of whatever the content provoked.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            path,
            f"what it holds does not fit this run ({reason})",
            "use the version of score-sde that wrote it, an older checkpoint, or run.fresh=true",
        ) from error


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(path, "it is a directory", "pass the .pt file inside it")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            path, "no such file", "run `python run.py mode=train` first or check the path"
        ) from error
    except OSError as error:
        raise CheckpointError(
            path, f"it cannot be read ({error.strerror})", "check the path and its permissions"
        ) from error
    if not content:
        raise CheckpointError(
            path, "the file is empty", "use an older checkpoint of the run, or train again"
        )
    return content


def _check_archive(path: Path, content: bytes, remedy: str) -> None:
    """Without a digest, the archive's own CRC-32 of each member, which torch writes and does not
    check.

    The attributes of a member are outside its CRC; torch writes 0, and reads nothing from a member
    that they call a directory.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        marked = [member.filename for member in archive.infolist() if member.external_attr]
        damaged = marked[0] if marked else archive.testzip()
    except Exception as error:  # seven types, by the field that is damaged
        raise CheckpointError(
            path, f"it is no checkpoint or was cut short ({error})", remedy
        ) from error
    if damaged:
        raise CheckpointError(path, f"its part {damaged} is damaged", remedy)


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")

"""What the configuration keeps of the data: enough to use a model, and to notice another set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiment.config import differences
from experiment.data import Dataset, Samples
from experiment.data.samples import first_rows
from experiment.errors import RunError
from experiment.progress import say
from experiment.shards import rank
from likelihood import Standardization

SPREAD_ROWS = 4096  # of which the spread in model units is taken
SPREAD_BYTES = 2**28
DIGEST_ROWS = 64


@dataclass(frozen=True)
class Measured:
    """What the data decide.

    Attributes:
        std: Of a number of a sample in model units, six digits.
        shift: Mean of continuous data, by coordinate or channel; None for K-level data.
        scale: Their standard deviation, likewise.
        fingerprint: What tells this set from another, see :func:`fingerprint`.
    """

    std: float
    shift: list[Any] | None
    scale: list[Any] | None
    fingerprint: dict[str, Any]

    def as_node(self) -> dict[str, Any]:
        """For the configuration; the spread stands there under a name of its own."""
        node = asdict(self)
        del node["std"]
        return node


def measure(data: Dataset) -> Measured:
    """What a model needs to know of ``data``, and what tells them from others."""
    probe = torch.Generator().manual_seed(0)
    values = data.units.encode(first_rows(data.train, SPREAD_ROWS, SPREAD_BYTES), probe)
    shift, scale = (
        None if data.levels is not None else getattr(data.units, name).tolist()
        for name in ("shift", "scale")
    )
    std = float(f"{values.std(correction=0):.6g}")
    return Measured(std, shift, scale, fingerprint(data))


def fingerprint(data: Dataset) -> dict[str, Any]:
    """Kind and number of the samples, and a digest of some of either part, spread evenly."""
    kind = {
        "shape": list(data.shape),
        "dtype": str(data.train.dtype).removeprefix("torch."),
        "levels": data.levels,
        "cond": None if data.cond is None else repr(data.cond),
    }
    counts = {"train_samples": len(data.train), "test_samples": len(data.test)}
    digests = {
        "train_digest": _digest(data.train, data.train_cond),
        "test_digest": _digest(data.test, data.test_cond),
    }
    return kind | counts | digests


def _digest(samples: Samples, cond: Samples | None) -> str:
    last = len(samples) - 1
    rows = torch.linspace(0, last, min(DIGEST_ROWS, last + 1), dtype=torch.float64).long()
    found = hashlib.sha256()
    for part in (samples, cond):
        if part is not None:
            found.update(part[rows].contiguous().numpy())
    return found.hexdigest()[:16]


def conditioned(network: Mapping[str, Any], data: Dataset) -> dict[str, Any]:
    """The node of a network, told what ``data`` come with.

    Raises:
        RunError: If it takes no conditions and the data come with some.
    """
    if data.cond is None:
        return dict(network)
    if "cond" not in network:
        raise RunError(
            f"data.conditional=true gives each sample of {data.name} a condition, and "
            f"{network.get('_target_')} takes none (its file in conf/network has no cond). Leave "
            "conditional out, or choose a network that takes one."
        )
    kind = type(data.cond)
    node = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **asdict(data.cond)}
    return {**network, "cond": network["cond"] or node}


def as_trained(data: Dataset, config: Mapping[str, Any]) -> Dataset:
    """``data`` in the units of the training, whatever the files hold by now; says so where they
    have changed.

    Args:
        data: As they are now.
        config: With what was stored with a model, as ``Run.trained`` returns it.

    Raises:
        RunError: If they are of another kind: shape, dtype, levels or condition.
    """
    measured = config.get("measured")
    if measured is None:  # by a version that measured nothing
        return data
    changed = _changes(measured, fingerprint(data))
    if any(not change.startswith(("train_", "test_")) for change in changed):
        raise RunError(
            f"{data.name} are no longer of the kind that the model was trained on "
            f"({'; '.join(changed)}). Put the files of the training back."
        )
    if changed and rank() == 0:
        say(
            f"warning: {data.name} differ from what the model was trained on "
            f"({'; '.join(changed)}); what is measured now is of the files as they are, in the "
            "units of the training."
        )
    if measured["shift"] is None:
        return data
    shift, scale = (torch.tensor(measured[name]) for name in ("shift", "scale"))
    return data.in_units(Standardization(shift, scale))


def refuse_other_data(
    path: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> None:
    """Refuse to go on training with other data than a run began with.

    Raises:
        RunError: Listing what is different.
    """
    if before is None or now is None:
        return
    changed = _changes(before, now["fingerprint"])
    if changed:
        raise RunError(
            f"run directory {path} was trained on other data ({'; '.join(changed)}): the files "
            "have changed since. Put them back, choose another directory with run.name=NAME, or "
            "set the earlier run aside with run.fresh=true."
        )


def _changes(before: Mapping[str, Any], now: dict[str, Any]) -> list[str]:
    return differences(_flat(before["fingerprint"]), _flat(now))


def _flat(node: Mapping[str, Any]) -> dict[str, Any]:
    return {**node, "shape": str(list(node["shape"]))}

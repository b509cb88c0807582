"""Power averages on disk along the way, and the average of another width made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from experiment.averages import Power
from experiment.checkpoint import (
    CheckpointError,
    iteration_of,
    list_checkpoints,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)
from experiment.errors import RunError
from experiment.posthoc import Combination, Kept, combined

FOLDER, ROOMS = "snapshots", ("model", "objective")
LARGEST_ERROR = 0.1  # of a profile, relative; beyond it is another average than the one asked for
TRIED = [round(0.01 * n, 2) for n in range(1, 29)]  # widths that a refusal looks at

Weights = Mapping[str, Tensor]
Averages = Mapping[str, Mapping[str, Weights]]  # by name, of model and objective


def save_snapshot(folder: Path, iteration: int, averages: Averages) -> Path:
    """Write the power averages of an iteration as a checkpoint is written; none is ever dropped.

    Raises:
        OSError: If the disk refuses; no partial file stays behind.
    """
    return save_checkpoint(folder, iteration, {"averages": averages}, keep=None)


def cut_snapshots(folder: Path, iteration: int) -> int:
    """Delete those after ``iteration``, from where training goes on; how many there were.

    What follows may be another path: with other steps to go the learning rate is another one.
    """
    later = [path for path in list_checkpoints(folder) if iteration_of(path) > iteration]
    for path in later:
        remove_checkpoint(path)
    return len(later)


@dataclass(frozen=True)
class Source:
    """The power averages of one iteration, read when they are asked for."""

    iteration: int
    read: Callable[[], Averages]


def sources(checkpoint: Path, state: Mapping[str, Any], widths: Sequence[float]) -> list[Source]:
    """The snapshots of the run of a checkpoint up to there, and the checkpoint itself.

    Args:
        checkpoint: Its path; a file that lies elsewhere than in the directory of a run has none.
        state: What it holds.
        widths: Of the averages that are in each.
    """
    last = int(state["iteration"])
    own = Source(last, lambda: state.get("averages", {}))
    folder = checkpoint.absolute().parent
    found = list_checkpoints(folder.parent / FOLDER) if folder.name == "checkpoints" else []
    earlier = [path for path in found if iteration_of(path) < last]
    return [*(Source(iteration_of(path), partial(_read, path, widths)) for path in earlier), own]


def _read(path: Path, widths: Sequence[float]) -> Averages:
    try:
        averages = load_checkpoint(path)["averages"]
        return {name: averages[name] for name in (Power(width).name for width in widths)}
    except (CheckpointError, KeyError, TypeError) as error:
        raise CheckpointError(
            path,
            f"it is damaged, or no snapshot of averages of widths {_listed(widths)}",
            "move it away, and averages are put together without it",
        ) from error


@dataclass(frozen=True)
class Snapshots:
    """All power averages that a run has kept up to a checkpoint.

    Args:
        widths: Of those at each iteration.
        sources: One an iteration.
    """

    widths: Sequence[float]
    sources: Sequence[Source]

    @property
    def kept(self) -> list[Kept]:
        """All of them, an iteration after the other."""
        return [Kept(width, one.iteration) for one in self.sources for width in self.widths]

    def combination(self, width: float, iteration: int) -> Combination:
        """How the average of ``width`` at ``iteration`` is put together.

        Raises:
            RunError: If there is nothing to make it of, or nothing that comes near; with the
                widths and iterations that are possible.
        """
        wanted = Kept(width, iteration)
        if not self.widths:
            raise RunError(
                f"average=power:{width:g} is put together from averages that were kept along the "
                "way, and this run kept none; train with training.power_ema=[0.05,0.1] "
                "training.snapshot_every=N, N a sixteenth of training.steps or less."
            )
        found = combined(self.kept, wanted)
        if found.error <= LARGEST_ERROR:
            return found
        raise RunError(
            f"average=power:{width:g} of iteration {iteration} cannot be put together: the "
            f"nearest profile is off by {found.error:.1%}, more than {LARGEST_ERROR:.0%} would be "
            f"another average; {self._possible(width, iteration)}. More of them, by "
            "training.snapshot_every=N in training, reach further."
        )

    def _possible(self, width: float, iteration: int) -> str:
        """What can be had at this iteration, and when this width can."""
        widths = [w for w in [*self.widths, *TRIED] if self._near(w, iteration)]
        then = [s.iteration for s in self.sources if self._near(width, s.iteration)]
        here = f"widths {min(widths):g} to {max(widths):g}" if widths else "no width"
        there = f"iterations {_listed(then)}" if then else "no iteration"
        count = f"{len(self.sources)} iteration{'' if len(self.sources) == 1 else 's'}"
        return (
            f"widths {_listed(self.widths)} at {count} give {here} at this "
            f"iteration, and this width at {there}"
        )

    def _near(self, width: float, iteration: int) -> bool:
        return combined(self.kept, Kept(width, iteration)).error <= LARGEST_ERROR

    def put_together(self, combination: Combination) -> dict[str, Weights]:
        """Model and objective of a combination, summed in float64, a snapshot at a time.

        What is not a floating-point number is taken from the latest that has a part.

        Raises:
            CheckpointError: If a snapshot is damaged.
        """
        shares = combination.coefficients.reshape(len(self.sources), len(self.widths))
        sums: dict[tuple[str, str], Tensor] = {}
        last: dict[tuple[str, str], Tensor] = {}
        for source, row in zip(self.sources, shares.tolist(), strict=True):
            used = {w: share for w, share in zip(self.widths, row, strict=True) if share}
            averages = source.read() if used else {}
            for width, share in used.items():
                last = _flat(averages[Power(width).name])
                for key, value in last.items():
                    if value.is_floating_point():
                        sums[key] = sums.get(key, 0.0) + share * value.double()
        found: dict[str, dict[str, Tensor]] = {room: {} for room in ROOMS}
        for (room, name), value in last.items():
            found[room][name] = sums.get((room, name), value).to(value)
        return found


def _flat(parts: Mapping[str, Weights]) -> dict[tuple[str, str], Tensor]:
    return {(room, name): value for room in ROOMS for name, value in parts[room].items()}


def _listed(numbers: Sequence[float]) -> str:
    """Numbers with commas, of many the ends."""
    shown = [f"{number:.10g}" for number in numbers]
    return ", ".join(shown if len(shown) < 6 else [*shown[:3], "...", shown[-1]])

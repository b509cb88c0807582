"""mode=sample: samples of a trained model, as arrays and pictures."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiment import figures
from experiment.checkpoint import write_atomically
from experiment.conditions import Conditions, in_turn
from experiment.config import choices
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.fitted import fitted
from experiment.hints import tell_slow_precision
from experiment.measured import as_trained
from experiment.plane import draw_plane
from experiment.progress import progress, say
from experiment.report import renew_report
from experiment.run import Run
from experiment.seeds import sample_paths
from experiment.shards import first_alone, gathered, halving, rank, share
from experiment.trackers.first_process import in_first_process
from experiment.way import Frame, frames, labels
from score_models import ScoreModel, faster
from score_models.acceleration import PRECISIONS
from sde_lib import Counted, PerSample, validation
from sde_lib.samplers import Captured, Sampler, check_samples

STRIP = 8  # samples shown on their way from noise to data


def sample(
    run: Run,
    *,
    num_samples: int = 64,
    batch_size: int = 256,
    temperature: float = 1.0,
    precision: str = "float32",
    compile: bool = False,
    cuda_graph: bool = False,
    cond: Any = None,  # noqa: ANN401
    guidance: float = 1.0,
) -> None:
    """Draw samples from the newest checkpoint of the run, or from ``checkpoint=PATH``.

    Writes ``samples/samples-<iteration>-<sampler>-<evaluations>-<digest>.npz`` (samples in data
    units, their seeds, evaluations, wall time), where the digest tells other settings, seeds and
    numbers apart; for images also the grid and the strip from noise to data. Sample i depends on
    the seed and on i alone: not on the batch, which is halved where memory runs out, nor on how
    many processes of torchrun share the work. Only solvers that fit one step to a whole batch
    (``sampler=adaptive``, to its tolerance) and correctors with ``scale=batch`` see neighbours.

    Args:
        run: The composed configuration; model and process are those stored with the checkpoint.
        num_samples: How many.
        batch_size: How many at a time.
        temperature: Factor on the variance of all noise.
        precision: Of the network: float32, bfloat16 or float16; states stay in float32.
        compile: Whether ``torch.compile`` fuses the network.
        cuda_graph: Whether the whole trajectory is captured and replayed; needs a GPU and a
            sampler with steps known beforehand.
        cond: Of a conditional model: see :class:`experiment.conditions.Conditions`.
        guidance: Of a conditional model: scale of classifier-free guidance, 1 for none.
    """
    asked = Asked(num_samples, batch_size, temperature, precision, compile, cuda_graph)
    validation.installed("matplotlib")
    sampler: Sampler = run.build("sampler")
    if asked.cuda_graph:
        refuse_graph_on(run.device())
        Captured(sampler)  # refuses what it cannot capture
    data: Dataset = run.build("data")
    tracker = in_first_process(lambda: run.build("tracking"))
    run, model, path, iteration = run.trained()
    run.warn()
    data = as_trained(data, run.config)
    sampler.check(model.sde)
    dropout = run.config.get("training", {}).get("label_dropout", 0.0)
    conditions = Conditions(data, run.seed, cond, guidance, dropout)
    if asked.cuda_graph and not conditions.fixed:
        raise RunError(
            "mode.cuda_graph=true holds one condition for all samples, and these are asked for "
            f"{conditions}. Ask for one, such as mode.cond=0, or leave out cuda_graph."
        )
    tell_slow_precision(precision, run.device())
    quick = faster(model, precision=precision, compile=compile)
    like = torch.zeros(1, *data.shape, device=run.device())
    where = {"checkpoint": path, "folder": run.fitted, "objective": run.average.objective}
    where |= {"conditions": conditions, "drawn_by": quick}
    made = first_alone(lambda: fitted(sampler, model, like, **where))
    made = Captured(made) if asked.cuda_graph else made
    with tracker.watching(run.path, run.config, run.config["run"]["name"]):
        parts, seconds = _drawn(run, quick, made, conditions, asked)
        if rank() > 0:
            return  # the first process has all samples and writes them
        values = data.units.decode(torch.cat([part.samples for part in parts]))
        about = _about(run, sampler, asked, path) | conditions.about()
        about |= {
            **run.average.as_row(),
            "iteration": iteration,
            "nfe": max(part.nfe for part in parts),
            "seconds": seconds,
        }
        identity = asked.identity(sampler, run.seed, path) + str(conditions) + run.average.suffix
        digest = hashlib.sha256(identity.encode()).hexdigest()[:6]
        name = f"{iteration:08d}-{about['sampler']}-{about['nfe']}-{digest}"
        array = run.path / "samples" / f"samples-{name}.npz"
        keep(
            values,
            [seed for part in parts for seed in part.seeds],
            about,
            array,
            conditions.of(range(asked.num_samples)),
        )
        under = f" {conditions}" if str(conditions) else ""
        say(
            f"{asked.num_samples} samples{under} by {sampler}, {about['nfe']} evaluations each, "
            f"{seconds:.1f} s: {array}"
        )
        # of the model as it was loaded: a compiled network has no second derivatives
        picture = draw_pictures(run.path, name, model, conditions, values, parts[0].way)
        note = json.dumps(about | {"drawn": time.time()}, indent=1)
        write_atomically(array.with_suffix(".json"), note.encode())
        if picture is not None:
            tracker.image("samples/grid", picture, iteration)
    say(renew_report(run.path))


@dataclass(frozen=True)
class Asked:
    """What :func:`sample` was asked for, with whole numbers as such."""

    num_samples: int
    batch_size: int
    temperature: float
    precision: str
    compile: bool
    cuda_graph: bool

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size"):
            whole = validation.count("mode=sample", name, getattr(self, name))
            object.__setattr__(self, name, whole)
        heat = validation.real("mode=sample", "temperature", self.temperature, above=0)
        object.__setattr__(self, "temperature", heat)
        validation.choice("mode=sample", "precision", self.precision, PRECISIONS)
        validation.flag("mode=sample", "compile", self.compile)
        validation.flag("mode=sample", "cuda_graph", self.cuda_graph)

    def identity(self, sampler: Sampler, seed: int, checkpoint: Path) -> str:
        """All that the samples depend on."""
        about = f"{sampler!r} {seed} {self.num_samples} {checkpoint.absolute()}"
        if (self.temperature, self.precision) == (1.0, "float32"):
            return about
        return f"{about} {self.temperature} {self.precision}"


def _drawn(
    run: Run, model: ScoreModel, sampler: Sampler, conditions: Conditions, asked: Asked
) -> tuple[list[Drawn], float]:
    """The samples of all processes, in order, and the seconds that they took."""
    shared = conditions.score(model, range(1)) if conditions.fixed else None

    def drawn(rows: range) -> Drawn:
        score = Counted(shared or conditions.score(model, rows))
        heat = asked.temperature
        streams = sample_paths(run.seed, "samples", rows, run.device(), temperature=heat)
        way = draw(score, model, sampler, conditions.data.shape, streams)
        shown = [frame._replace(x=frame.x.cpu()) for frame in way] if rows.start == 0 else []
        return Drawn(way[-1].x.cpu(), streams.seeds, score.nfe, shown)

    began, mine = time.monotonic(), share(asked.num_samples)
    starts = range(mine.start, mine.stop, asked.batch_size)
    batches = [range(start, min(start + asked.batch_size, mine.stop)) for start in starts]
    parts = gathered([part for rows in batches for part in halving(drawn, rows)])
    return parts, time.monotonic() - began


def _about(run: Run, sampler: Sampler, asked: Asked, path: Path) -> dict[str, Any]:
    """What the samples are of, as far as it is known beforehand."""
    return {
        "sampler": called(run, sampler),
        "steps": getattr(sampler, "steps", None),
        "eta": getattr(sampler, "eta", None),
        "num_samples": asked.num_samples,
        "temperature": asked.temperature,
        "precision": asked.precision,
        "repr": repr(sampler),
        "checkpoint": str(path),
    }


def keep(
    values: Tensor,
    seeds: list[int],
    about: Mapping[str, Any],
    path: Path,
    cond: Tensor | None = None,
) -> None:
    """Write samples in data units with their seeds and what they are of as ``path``, an npz; with
    the condition of each, if there are any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = ("nfe", "seconds", "temperature", "precision", "checkpoint")
    np.savez(
        path,
        samples=values.numpy(),
        seeds=np.array(seeds, dtype=np.uint64),
        sampler=about["repr"],
        average=about.get("average", ""),
        **{key: about[key] for key in known},
        **({} if cond is None else {"cond": cond.numpy(), "guidance": about["guidance"]}),
    )


def called(run: Run, sampler: Sampler) -> str:
    """The choice of ``sampler=NAME`` if one was made, else the class in small letters."""
    known = choices(run.conf).get("sampler", [])
    given = [o.partition("=")[2] for o in run.overrides if o.startswith("sampler=")]
    return next((name for name in given[::-1] if name in known), type(sampler).__name__.lower())


def refuse_graph_on(device: torch.device) -> None:
    """A CUDA graph is for a GPU.

    Raises:
        RunError: On any other device.
    """
    if device.type != "cuda":
        raise RunError(
            f"mode.cuda_graph=true needs a GPU; this run is on device={device}. Leave it out."
        )


class Drawn(NamedTuple):
    """Some samples [B, ...] on the CPU, in model units; the way of the first of all."""

    samples: Tensor
    seeds: list[int]
    nfe: int
    way: list[Frame]


@torch.no_grad()
def draw(
    score: Counted,
    model: ScoreModel,
    sampler: Sampler,
    shape: tuple[int, ...],
    streams: PerSample,
) -> list[Frame]:
    """The way from the prior to the samples, see :func:`experiment.way.frames`.

    Raises:
        SamplingError: If the samples are not finite.
    """
    start = model.sde.prior_sample(
        (len(streams.seeds), *shape), generator=streams, device=streams.device
    )
    trajectory = sampler.trajectory(score, model.sde, start, generator=streams)
    way = frames(progress(trajectory, "samples"), model.sde)
    check_samples(sampler, score, model.sde, start, way[-1].x)
    return way


def draw_and_save(
    run: Run, model: ScoreModel, sampler: Sampler, data: Dataset, iteration: int, count: int
) -> Path | None:
    """Pictures of ``count`` samples, the same noise each time; None where nothing can be drawn."""
    if len(data.shape) != 3 and data.shape != (2,):
        return None
    pictures = len(data.shape) == 3
    count = count if pictures else max(count, 2000)
    dropout = run.config.get("training", {}).get("label_dropout", 0.0)
    asked = in_turn(data) if pictures else None
    conditions = Conditions(data, run.seed, asked, label_dropout=dropout)
    streams = sample_paths(run.seed, "samples", range(count), run.device())
    score = Counted(conditions.score(model, range(count)))
    way = draw(score, model, sampler, data.shape, streams)
    values = data.units.decode(way[-1].x.cpu())
    return draw_pictures(run.path, f"{iteration:08d}", model, conditions, values, way)


def draw_pictures(
    folder: Path,
    name: str,
    model: ScoreModel,
    conditions: Conditions,
    values: Tensor,
    way: list[Frame],
) -> Path | None:
    """Grid and strip of images, density and path of points in the plane; None for other data.

    Where conditions are taken in turn, the grid has a row for each.

    Args:
        folder: Of the run.
        name: What the names of the files end with.
        model: In evaluation mode, as it was loaded.
        conditions: Of the samples, and the data that the model was trained on.
        values: Samples in data units.
        way: Of some of them.
    """
    data = conditions.data
    if data.shape == (2,):
        return draw_plane(folder / "figures", name, model, conditions, way)
    if len(data.shape) != 3:
        return None
    folder = folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    grid = folder / f"grid-{name}.png"
    images, turns = to_bytes(values, data), conditions.turns()
    if turns is None or len(images) < turns:
        figures.save_grid(images, grid)
    else:
        each = len(images) // turns  # what is left over has no row
        rows = images[: each * turns].unflatten(0, (each, turns)).transpose(0, 1)
        figures.save_grid(rows.flatten(0, 1), grid, each, labels=conditions.labels())
    shown = [_visible(frame.x[:STRIP]) for frame in way[:-1]] + [way[-1].x[:STRIP]]
    steps = [to_bytes(data.units.decode(state.cpu()), data) for state in shown]
    figures.save_strip(steps, folder / f"strip-{name}.png", labels=labels(way))
    return grid


def _visible(state: Tensor) -> Tensor:
    """A noisy state shrunk into the range of the data; that of VE would be all black and white."""
    spread = state.flatten(1).abs().quantile(0.9, dim=1).clamp(min=1.0)
    return state / spread.reshape(-1, *(1,) * (state.ndim - 1))


def to_bytes(values: Tensor, data: Dataset) -> Tensor:
    """Images in data units as grey values 0..255, uint8."""
    if data.levels is not None:
        return (values.float() * (255 / (data.levels - 1))).round().to(torch.uint8)
    low, high = data.range
    return ((values - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)

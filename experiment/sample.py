"""mode=sample: samples of a trained model, as arrays and pictures."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiment import figures
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.fitted import fitted
from experiment.plane import draw_plane
from experiment.progress import progress, say
from experiment.report import write_report
from experiment.run import Run
from experiment.seeds import sample_paths
from experiment.shards import first_alone, gathered, halving, rank, share
from experiment.trackers import NoTracker, Safe
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
) -> None:
    """Draw samples from the newest checkpoint of the run, or from ``checkpoint=PATH``.

    Writes ``samples/samples-<iteration>-<sampler>-<evaluations>-<digest>.npz`` (samples in data
    units, their seeds, evaluations, wall time), where the digest tells other settings, seeds and
    numbers apart; for images also the grid and the strip from noise to data. Sample i depends on
    the seed and on i alone: not on the batch, which is halved where memory runs out, nor on how
    many processes of torchrun share the work.

    Args:
        run: The composed configuration; model and process are those stored with the checkpoint.
        num_samples: How many.
        batch_size: How many at a time; sample i does not depend on it.
        temperature: Factor on the variance of all noise.
        precision: Of the network: float32, bfloat16 or float16; states stay in float32.
        compile: Whether ``torch.compile`` fuses the network.
        cuda_graph: Whether the whole trajectory is captured and replayed; needs a GPU and a
            sampler with steps known beforehand.
    """
    num_samples = validation.count("mode=sample", "num_samples", num_samples)
    batch_size = validation.count("mode=sample", "batch_size", batch_size)
    temperature = validation.real("mode=sample", "temperature", temperature, above=0)
    validation.choice("mode=sample", "precision", precision, PRECISIONS)
    validation.flag("mode=sample", "compile", compile)
    validation.installed("matplotlib")
    sampler: Sampler = run.build("sampler")
    if validation.flag("mode=sample", "cuda_graph", cuda_graph):
        refuse_graph_on(run.device())
        Captured(sampler)  # refuses what it cannot capture
    data: Dataset = run.build("data")
    tracker = Safe(run.build("tracking") if rank() == 0 else NoTracker())
    run, model, path, iteration = run.trained()
    sampler.check(model.sde)
    like, asked_for = torch.zeros(1, *data.shape, device=run.device()), repr(sampler)
    quick, place = faster(model, precision=precision, compile=compile), run.path / "fitted"
    sampler = first_alone(
        lambda: fitted(sampler, model, like, checkpoint=path, folder=place, drawn_by=quick)
    )
    sampler = Captured(sampler) if cuda_graph else sampler
    model = quick

    def drawn(rows: range) -> Drawn:
        score = Counted(model.score)
        streams = sample_paths(run.seed, "samples", rows, run.device(), temperature=temperature)
        states = draw(score, model, sampler, data.shape, streams)
        shown = [state.cpu() for state in states] if rows.start == 0 else []
        return Drawn(states[-1].cpu(), streams.seeds, score.nfe, shown)

    with tracker.watching(run.path, run.config, run.config["run"]["name"]):
        began = time.monotonic()
        mine = share(num_samples)
        starts = range(mine.start, mine.stop, batch_size)
        batches = [range(start, min(start + batch_size, mine.stop)) for start in starts]
        parts = gathered([part for rows in batches for part in halving(drawn, rows)])
        if rank() > 0:
            return  # the first process has all samples and writes them
        seconds, nfe = time.monotonic() - began, max(part.nfe for part in parts)
        values = data.units.decode(torch.cat([part.samples for part in parts]))
        asked = f"{asked_for} {run.seed} {num_samples} {path.absolute()}"
        if (temperature, precision) != (1.0, "float32"):
            asked += f" {temperature} {precision}"
        digest = hashlib.sha256(asked.encode()).hexdigest()[:6]
        kind = f"{asked_for.partition('(')[0].lower()}-{nfe}"
        array = run.path / "samples" / f"samples-{iteration:08d}-{kind}-{digest}.npz"
        array.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            array,
            samples=values.numpy(),
            seeds=np.array([seed for part in parts for seed in part.seeds], dtype=np.uint64),
            nfe=nfe,
            seconds=seconds,
            sampler=asked_for,
            temperature=temperature,
            precision=precision,
            checkpoint=str(path),
        )
        say(
            f"{num_samples} samples by {asked_for}, {nfe} evaluations each, "
            f"{seconds:.1f} s: {array}"
        )
        picture = draw_pictures(run, model, data, iteration, values, parts[0].states)
        if picture is not None:
            tracker.image("samples/grid", picture, iteration)
    say(f"report: {write_report(run.path)}")


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
    """Some samples [B, ...] on the CPU, in model units; states on the way of the first of all."""

    samples: Tensor
    seeds: list[int]
    nfe: int
    states: list[Tensor]


@torch.no_grad()
def draw(
    score: Counted,
    model: ScoreModel,
    sampler: Sampler,
    shape: tuple[int, ...],
    streams: PerSample,
) -> list[Tensor]:
    """Eleven states on the way from the prior to the samples, each [B, ...].

    Raises:
        SamplingError: If the samples are not finite.
    """
    start = model.sde.prior_sample(
        (len(streams.seeds), *shape), generator=streams, device=streams.device
    )
    trajectory = sampler.trajectory(score, model.sde, start, generator=streams)
    kept, end = thinned((x for _, x in progress(trajectory, "samples")), 40)
    check_samples(sampler, score, model.sde, start, end)
    return [kept[round(i * (len(kept) - 1) / 10)] for i in range(10)] + [end]


def thinned(states: Iterable[Tensor], most: int) -> tuple[list[Tensor], Tensor]:
    """At most ``most`` evenly spaced ``states``, and the last: a thousand would not fit."""
    kept, stride, end = [], 1, None
    for i, end in enumerate(states):  # noqa: B007
        if i % stride == 0:
            kept.append(end)
        if len(kept) > most:
            kept, stride = kept[::2], 2 * stride
    return kept, end


def draw_and_save(
    run: Run, model: ScoreModel, sampler: Sampler, data: Dataset, iteration: int, count: int
) -> Path | None:
    """Pictures of ``count`` samples, the same noise each time; None where nothing can be drawn."""
    if len(data.shape) != 3 and data.shape != (2,):
        return None
    count = count if len(data.shape) == 3 else max(count, 2000)
    streams = sample_paths(run.seed, "samples", range(count), run.device())
    states = draw(Counted(model.score), model, sampler, data.shape, streams)
    return draw_pictures(run, model, data, iteration, data.units.decode(states[-1].cpu()), states)


def draw_pictures(
    run: Run,
    model: ScoreModel,
    data: Dataset,
    iteration: int,
    values: Tensor,
    states: list[Tensor],
) -> Path | None:
    """Grid and strip of images, density and path of points in the plane; None for other data."""
    if data.shape == (2,):
        return draw_plane(run.path / "figures", iteration, model, data, states)
    if len(data.shape) != 3:
        return None
    folder = run.path / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    grid = folder / f"grid-{iteration:08d}.png"
    figures.save_grid(to_bytes(values, data), grid)
    shown = [_visible(state[:STRIP]) for state in states[:-1]] + [states[-1][:STRIP]]
    steps = [to_bytes(data.units.decode(state.cpu()), data) for state in shown]
    figures.save_strip(steps, folder / f"strip-{iteration:08d}.png")
    return grid


def _visible(state: Tensor) -> Tensor:
    """A noisy state shrunk into the range of the data; that of VE would be all black and white."""
    spread = state.flatten(1).abs().quantile(0.9, dim=1).clamp(min=1.0)
    return state / spread.reshape(-1, *(1,) * (state.ndim - 1))


def to_bytes(values: Tensor, data: Dataset) -> Tensor:
    """Images in data units as grey values 0..255, uint8."""
    if data.levels is not None:
        return (values.float() * (255 / (data.levels - 1))).round().to(torch.uint8)
    low, high = data.train.min(), data.train.max()
    return ((values - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)

"""DDIM's encode-decode protocol on our digits model: what a round trip through the latents loses.

python benchmarks/round_trip.py                      newest checkpoint of runs/digits-vp-unet
python benchmarks/round_trip.py --run DIR            another run on the digits
python benchmarks/round_trip.py --images 360         all test images; more of them, more time

Song, Meng and Ermon 2021, table 2: test images are carried to the latent and back in S steps each
way; the figure is the mean squared error of a pixel, images scaled to [0, 1]. Both sides are given
S evaluations each way, of the same network in float32. The paper's figures are on CIFAR-10 with a
model of 1000 levels: the same protocol, other numbers.

The mean is the paper's figure; the median says what becomes of most images. Where they part, some
image lies between two basins of the flow: its latent decodes to another one as soon as it is off
by a hundredth, whatever the rule.
"""

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiment.checkpoint import (  # noqa: E402
    list_checkpoints,
    load_checkpoint,
    load_weights,
    stored_config,
)
from experiment.config import check_targets  # noqa: E402
from experiment.data import digits  # noqa: E402
from likelihood.latents import round_trip  # noqa: E402
from run import instantiate  # noqa: E402
from score_models import ScoreModel  # noqa: E402
from sde_lib import probability_flow  # noqa: E402
from sde_lib.grids import Karras, Quadratic, UniformTime  # noqa: E402
from sde_lib.samplers import DDIM  # noqa: E402

STEPS = (10, 20, 50, 100, 200, 500)
PAPER = (0.014, 0.0065, 0.0023, 0.0009, 0.0004, 0.0001)
GRIDS = {"even in t": UniformTime(), "quadratic": Quadratic(), "Karras": Karras()}


def load(folder):
    """The averaged model of the newest checkpoint of a run, and where it was found."""
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        sys.exit(
            f"no checkpoint in {folder / 'checkpoints'}; train one first, some minutes on two "
            "cores: `python run.py mode=train data=digits sde=vp network=unet`, or pass --run DIR."
        )
    state = load_checkpoint(found[-1])
    stored = stored_config(found[-1], state)
    parts = {part: stored[part] for part in ("network", "sde", "parameterization")}
    check_targets(parts, f"checkpoint {found[-1]}", ("sde_lib", "score_models"))
    model = ScoreModel(*(instantiate(part) for part in parts.values()))
    load_weights(model, state["ema"], found[-1])
    return model.eval().requires_grad_(False), found[-1]


def ddim_encode(score, sde, x, steps, grid):
    """DDIM's map run upwards: x' = alpha' x0_hat + sigma' eps_hat, eps_hat where the step starts.

    ``Ancestral.step`` cannot be asked: upwards, its share of old noise exceeds all there is.
    """
    for now, nxt in pairwise(sde.level(grid(sde, steps).flip(0)).rows()):
        eps_hat = now.like(x).noise(score(x, now.t))
        x0_hat = (x - now.sigma.to(x) * eps_hat) / now.alpha.to(x)
        x = nxt.alpha.to(x) * x0_hat + nxt.sigma.to(x) * eps_hat
    return x


@torch.no_grad()
def ddim_error(model, x, steps, grid):
    """Mean squared error of a pixel in [0, 1], by image [B], by DDIM."""
    latent = ddim_encode(model.score, model.sde, x, steps, grid)
    again = DDIM(steps, grid, denoise=False)(model.score, model.sde, latent)
    return ((again - x) / 2).square().flatten(1).mean(1)


def our_error(model, x, steps):
    """The same by :func:`likelihood.latents.round_trip`, on as many nodes as DDIM has steps."""
    result = round_trip(probability_flow(model.sde, model.score), x, nodes=steps)
    assert result.nfe == 2 * steps
    return (result.error / 2).square()


def mean(errors):
    """Over images, with its standard error; and by how much the best of DDIM is above ours."""
    cells = [f"{float(e.mean()):.2e} ± {float(e.std() / len(e) ** 0.5):.0e}" for e in errors]
    return [*cells, f"{min(float(e.mean()) for e in errors[:-1]) / float(errors[-1].mean()):.3g}"]


def median(errors):
    """Over images, and by how much the best of DDIM is above ours."""
    medians = [float(e.median()) for e in errors]
    return [*(f"{m:.2e}" for m in medians), f"{min(medians[:-1]) / medians[-1]:.3g}"]


def table(title, summary, results):
    """One row for each number of steps."""
    columns = [*(f"DDIM, {name}" for name in GRIDS), "ours", "best DDIM / ours", "paper, CIFAR-10"]
    print(f"\n{title}\n\n| steps | {' | '.join(columns)} |\n{'| --- ' * (len(columns) + 1)}|")
    for steps, errors in results.items():
        paper = dict(zip(STEPS, PAPER, strict=True)).get(steps, "")
        print(f"| {steps} | {' | '.join(summary(errors))} | {paper} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "digits-vp-unet")
    parser.add_argument("--images", type=int, default=64, help="of the 360 test images")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    options = parser.parse_args()
    model, path = load(options.run)
    data, began = digits(), time.monotonic()
    # dequantized, as the model was trained; model units are [-1, 1]
    x = data.units.encode(data.test[: options.images], torch.Generator().manual_seed(0))
    results = {}
    for steps in options.steps:
        results[steps] = [ddim_error(model, x, steps, grid) for grid in GRIDS.values()]
        results[steps].append(our_error(model, x, steps))
        print(f"{steps} steps: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(f"{path.name} of {options.run.name}, {len(x)} test images, steps each way")
    table("Mean squared error of a pixel in [0, 1]: mean over images", mean, results)
    table("The same: median over images", median, results)


if __name__ == "__main__":
    main()

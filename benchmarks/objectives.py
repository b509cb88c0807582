"""What the objectives of a T-step model reach on a mixture in the plane, and how noisy they are.

`python benchmarks/objectives.py`, four minutes on one core: minus the bound of test data under
three variances after a short training, and the noise of L_vlb with even and with loss-aware
levels.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # benchmarks/likelihood.py is no package

import torch  # noqa: E402

from likelihood import discrete_bounds  # noqa: E402
from score_models import (  # noqa: E402
    EDM,
    Hybrid,
    LearnedVariance,
    LossAwareLevels,
    ScoreModel,
    UniformLevels,
    VariationalBound,
)
from score_models.networks import MLP  # noqa: E402
from score_models.variance_kinds import interpolated_variance  # noqa: E402
from sde_lib import BatchRows, DiscreteSDE, probability_flow  # noqa: E402
from sde_lib.oracles import GaussianMixture  # noqa: E402

T, BATCH = 100, 128
SDE = DiscreteSDE.linear_betas(1e-3, 0.1, num_levels=T)
DATA = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.15, 0.3]))
TRAIN = DATA.sample(4000, generator=torch.Generator().manual_seed(0)).float()


def batch(key):
    rows = torch.randint(len(TRAIN), (BATCH,), generator=torch.Generator().manual_seed(key))
    return TRAIN[rows]


def trained(objective, iterations):
    """A model trained by a plain loop; the objective is trained with it."""
    torch.manual_seed(0)
    model = ScoreModel(MLP((2,), width=64, blocks=2), SDE, EDM(1.0))
    objective.prepare(model, TRAIN[:2])
    optimizer = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=2e-3)
    for key in range(iterations):
        draws = objective.draw(SDE, (BATCH, 2), BatchRows(key, BATCH))
        loss = objective.loss(model, batch(key), draws)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        objective.observe(draws, loss.detach())
    return model.eval()


def bounds(model, variance):
    """Minus the bound of 500 test samples in nats, as a line."""
    x = DATA.sample(500, generator=torch.Generator().manual_seed(9)).float()
    learned = interpolated_variance(model, variance.head.eval())
    reverse = {"posterior": "posterior", "forward": "forward", "learned": learned}
    times = UniformLevels(levels=T).time(SDE, torch.arange(T))
    generator = torch.Generator().manual_seed(2)
    flow = probability_flow(SDE, model.score)
    found = discrete_bounds(flow, x, reverse, times=times, generator=generator)
    costs = {name: -bound.log_prob for name, bound in found.items()}
    entropy = -DATA.log_prob(x.double())
    told = {**costs, "entropy of these": entropy}
    return "  ".join(
        f"{name} {cost.mean():.3f} ± {cost.std() / len(x) ** 0.5:.3f}"
        for name, cost in told.items()
    )


def noise(model, objective, times):
    """Standard deviation of the loss, and of the gradient of a batch around its mean."""
    objective.times, gradients, losses = times, [], []
    for key in range(200):
        loss = objective(model, batch(10_000 + key), BatchRows(10_000 + key, BATCH))
        slopes = torch.autograd.grad(loss.mean(), list(model.parameters()))
        gradients.append(torch.cat([slope.flatten() for slope in slopes]))
        losses.append(loss.detach())
    spread = torch.stack(gradients).var(0).sum().sqrt()
    return f"loss {torch.cat(losses).std():.2f}, gradient {spread:.2f}"


def main():
    torch.set_num_threads(1)
    hybrids = {
        "ddpm_hybrid": Hybrid(UniformLevels(levels=T)),
        "ddpm_hybrid_aware": Hybrid(LossAwareLevels(levels=T)),
    }
    for name, hybrid in hybrids.items():
        print(name, bounds(trained(hybrid, 1500), hybrid.bound.variance), flush=True)
    vlb = VariationalBound(LossAwareLevels(levels=T), LearnedVariance())
    print("ddpm_vlb", bounds(trained(vlb, 1500), vlb.variance), flush=True)
    vlb = VariationalBound(LossAwareLevels(levels=T), LearnedVariance())
    model, aware = trained(vlb, 500), vlb.times
    print("noise of L_vlb, loss-aware levels:", noise(model, vlb, aware))
    del vlb.times  # a module cannot be replaced by what is none
    print("noise of L_vlb, even levels:", noise(model, vlb, UniformLevels(levels=T)))


if __name__ == "__main__":
    main()

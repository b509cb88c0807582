"""The exact trace by reverse and by forward mode, in bare forward passes (F).

Both take D products of a square Jacobian; forward mode keeps no graph. CPU time, three rounds in
alternation, median and spread.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parents[1])

from likelihood import Exact  # noqa: E402
from score_models.networks import MLP, UNet  # noqa: E402

ROUNDS, CALLS = 5, 3
CASES = {
    "MLP, D = 2, batch 1000": (lambda: MLP(shape=(2,)), (1000, 2)),
    "MLP, D = 16, batch 500": (lambda: MLP(shape=(16,)), (500, 16)),
    "U-Net, D = 64, batch 4": (
        lambda: UNet((1, 8, 8), width=32, blocks=1, attention=[], dropout=0.0),
        (4, 1, 8, 8),
    ),
}


def reverse(field: Callable, x: Tensor) -> Tensor:
    exact = Exact()
    return exact(field, x, exact.probes(x)())[1][0]


def forward(field: Callable, x: Tensor) -> Tensor:
    basis = torch.eye(x[0].numel())

    def diagonal(row: Tensor) -> Tensor:
        tangent = row.reshape(x.shape[1:]).expand_as(x)
        return (torch.func.jvp(field, (x,), (tangent,))[1] * tangent).flatten(1).sum(1)

    return torch.vmap(diagonal)(basis).sum(0)


def seconds(call: Callable) -> float:
    began = time.process_time()
    for _ in range(CALLS):
        call()
    return time.process_time() - began


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| | reverse, F | forward, F |\n| --- | --- | --- |")
    for name, (make, shape) in CASES.items():
        network, x = make().eval().requires_grad_(False), torch.randn(shape)
        for weight in network.parameters():
            weight.add_(0.01 * torch.randn_like(weight))  # the last layer starts at zero
        level = torch.zeros(len(x))

        def field(x: Tensor, network: torch.nn.Module = network, level: Tensor = level) -> Tensor:
            return network(x, level)

        torch.testing.assert_close(reverse(field, x), forward(field, x), rtol=1e-3, atol=1e-3)
        ratios = []
        for _ in range(ROUNDS):
            bare = seconds(torch.no_grad()(lambda f=field, x=x: f(x)))
            ratios.append(
                [seconds(lambda f=f, g=field, x=x: f(g, x)) / bare for f in (reverse, forward)]
            )
        cells = []
        for column in zip(*ratios, strict=True):
            low, *_, high = ordered = sorted(column)
            cells.append(f"{ordered[len(ordered) // 2]:.1f} ({low:.1f}..{high:.1f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

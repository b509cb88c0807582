"""Images/s of training DDPM's network on a GPU, and the share of the peak that this is."""

import argparse
import gc
import time
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training_sides import Case, Ours, model_of
from score_models import DenoisingScoreMatching

PEAK = {"float32": 67.0, "tf32": 495.0, "bfloat16": 989.0}  # TFLOP/s of an H200, dense
DDPM = Case(network="preset", shape=(3, 32, 32), size={"name": "ddpm"}, device="cuda")
WARM, TIMED = 5, 20  # iterations


def gpu(options: argparse.Namespace) -> None:
    """The table, or that there is no GPU."""
    print("\n## DDPM's network on 3x32x32, on a GPU\n")
    if not torch.cuda.is_available():
        print("There is no GPU here: nothing was measured.")
        return
    peak = PEAK | options.peak
    print(f"{torch.cuda.get_device_name()}; peaks taken: {peak} TFLOP/s (--peak)")
    table(DDPM, (128, 512), peak)


def table(case: Case, batches: tuple[int, ...], peak: dict[str, float]) -> None:
    """A row for each batch, precision, and with or without compilation."""
    flops = flops_of(case)
    print(f"{flops / 1e9:.2f} GFLOP an image, forward and backward, as torch counts them\n")
    print("| batch | precision | compiled | images/s | TFLOP/s | share of the peak |")
    print("| --- | --- | --- | --- | --- | --- |")
    for batch in batches:
        for precision, most in peak.items():
            for compiled in (False, True):
                one = replace(case, batch=batch, compiled=compiled)
                rate = images_per_second(one, precision)
                reached = rate * flops / 1e12
                cells = (batch, precision, compiled, f"{rate:.0f}", f"{reached:.1f}")
                print(f"| {' | '.join(map(str, cells))} | {reached / most:.1%} |", flush=True)


def flops_of(case: Case) -> float:
    """Of one image, forward and backward."""
    model = model_of(case).train()
    x0 = torch.randn(2, *case.shape, device=case.device)
    with FlopCounterMode(display=False) as counter:
        DenoisingScoreMatching()(model, x0).mean().backward()
    return counter.get_total_flops() / len(x0)


def images_per_second(case: Case, precision: str) -> float:
    """Of mode=train's own loop, once it is warm; "tf32" lets tensor cores round float32 input."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    half = precision if precision == "bfloat16" else "float32"
    side = Ours(replace(case, precision=half))
    side(WARM)
    began = time.perf_counter()
    side(TIMED)  # ends with a line of the record, for which the host waits
    seconds = time.perf_counter() - began
    del side
    gc.collect()
    torch.cuda.empty_cache()
    return TIMED * case.batch / seconds

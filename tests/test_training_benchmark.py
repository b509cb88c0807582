"""Both sides of benchmarks/training.py compute the same thing, and its tables say what was found."""

import argparse
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks.training_mnist import VARIANTS, decided, folder_of, mnist, paired
from benchmarks.training_sides import Case, Ours, Plain, model_of, written_plainly

SIZE = {"width": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2, "dropout": 0.0}
SMALL = Case(shape=(1, 8, 8), size=SIZE, batch=4, shared=True)


def test_both_sides_take_the_same_steps():
    ours, plain = Ours(SMALL), Plain(replace(SMALL, side="plain"))

    losses = ours(3), plain(3)

    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)
    average = ours.state.averages[0].weights
    for own, other in zip(average, plain.average, strict=True):
        # Adam divides by the root of a square: of gradients near zero it keeps few digits
        torch.testing.assert_close(own, other, rtol=1e-4, atol=2e-5)


def test_a_network_written_plainly_is_the_same_function():
    lean, x = model_of(SMALL).network.eval(), torch.randn(2, 1, 8, 8)
    level = torch.tensor([-1.0, 2.0])
    with torch.no_grad():
        before = lean(x, level)
        after = written_plainly(lean)(x, level)

    assert any(type(m).__name__ == "WrittenOutAttention" for m in lean.modules())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_paired_difference_has_the_error_of_the_differences_alone():
    images = np.random.default_rng(0).normal(3, 1, 400)
    gain = np.where(np.arange(400) % 2, 0.01, 0.03)  # of mean 0.02, spread 0.01

    mean, error = paired(images - gain, images)

    assert mean == pytest.approx(-0.02)
    assert error == pytest.approx(0.01 * math.sqrt(400 / 399) / math.sqrt(400))
    assert [decided(m, 0.1) for m in (-0.3, -0.1, 0.3)] == ["met", "not decided", "NOT MET"]


def test_the_table_of_orderings_is_read_off_the_runs(tmp_path, capsys):
    asked = {"root": tmp_path, "steps": 5, "samples": 2, "bounds": 3, "threads": 1, "set": []}
    options = argparse.Namespace(**asked, run=False)
    for number, name in enumerate(VARIANTS):
        folder = folder_of(name, options)
        folder.mkdir()
        bits = np.array([1.0, 3.0]) - [0.1, 0.1 + 0.001 * number] * np.array(number)
        values = {"probability-flow ODE": [bits.mean(), 1.0], "ELBO": [bits.mean() + 0.5, 1.0]}
        row = {"iteration": 5, "num_samples": 2, "value": bits.mean(), "standard_error": 1.0}
        rows = [row | {"bounds": {"steps": 3, "values": values}}, row | {"num_samples": 1}]
        (folder / "likelihood.json").write_text(json.dumps(rows))
        np.savez(folder / "likelihood-00000005-first-2-abc.npz", bits_per_dim=bits)

    mnist(options)

    shown = capsys.readouterr().out
    assert "| VP, noise, uniform t | 2.0000 ± 1.0000 | 2.5000 ± 1.0000 |" in shown
    assert "met: sub-VP, noise, uniform t - (VP, noise, uniform t) = -0.2020 ± 0.0020" in shown
    assert shown.count("bounds above the ODE") == len(VARIANTS)

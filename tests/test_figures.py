"""Pictures: each pixel and each curve is where the numbers say, and no file is half written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from experiment import canvas, figures, plane, plane_figures
from experiment.canvas import GREY, ORANGE, STYLE, write_picture
from experiment.conditions import Conditions
from experiment.data import Dataset, eight_gaussians
from experiment.figures import (
    plot_bits,
    plot_density,
    plot_loss,
    plot_path,
    running_mean,
    save_grid,
    save_strip,
    series,
)
from experiment.tiles import HEADING
from experiment.way import Frame
from sde_lib import VPSDE
from sde_lib.oracles import Gaussian, GaussianMixture

PALE = 225


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn while this is in use; they are not written."""
    collected = []

    @contextmanager
    def collect(path: object, width: float, height: float) -> Iterator[Figure]:
        collected.append(Figure(figsize=(width, height)))
        yield collected[-1]

    for module in (figures, plane_figures):
        monkeypatch.setattr(module, "new_figure", collect)
    return collected


def losses(*pairs: tuple[int, float]) -> list[dict[str, float]]:
    return [{"train/iteration": x, "train/loss": y} for x, y in pairs]


def evaluations(metric: str, *triples: tuple[int, float, float]) -> list[dict[str, float]]:
    return [
        {"train/iteration": x, f"eval/{metric}": y, f"eval/{metric}_stderr": e}
        for x, y, e in triples
    ]


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def pixels(path: Path) -> np.ndarray:
    """[H, W, 3], or [H, W] of a grey picture."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def expected_pixel(images: Tensor, columns: int, scale: int, pad: int, y: int, x: int) -> list:
    """What pixel (y, x) shows, from the pixel back to the image and not the other way round."""
    height, width = (scale * side for side in images.shape[2:])
    row, inner_y = divmod(y - pad, height + pad)
    column, inner_x = divmod(x - pad, width + pad)
    index = row * columns + column
    between = inner_y >= height or inner_x >= width
    if between or min(row, column) < 0 or column >= columns or index >= len(images):
        return [PALE] * 3
    value = images[index, :, inner_y // scale, inner_x // scale].tolist()
    return value[:3] if len(value) >= 3 else value[:1] * 3


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("columns, scale, pad", [(2, 1, 2), (3, 4, 1), (5, 2, 0), (1, 3, 5)])
def test_each_pixel_of_a_grid_is_that_of_its_tile(tmp_path, channels, columns, scale, pad):
    images = noise(5, channels, 2, 3)

    path = save_grid(images, tmp_path / "grid.png", columns, scale, pad)

    shown = pixels(path)
    assert shown.ndim == (2 if channels < 3 else 3)
    rows = math.ceil(5 / columns)
    assert shown.shape[0] == rows * (2 * scale + pad) + pad
    assert shown.shape[1] == columns * (3 * scale + pad) + pad
    colours = shown if shown.ndim == 3 else shown[..., None].repeat(3, axis=-1)
    for y, x in np.ndindex(shown.shape[:2]):
        assert colours[y, x].tolist() == expected_pixel(images, columns, scale, pad, y, x)


@pytest.mark.parametrize("number", range(1, 12))
def test_a_grid_has_the_fewest_columns_that_make_it_square(tmp_path, number):
    path = save_grid(noise(number, 1, 1, 1), tmp_path / "grid.png", scale=1, pad=0)

    columns = pixels(path).shape[1]
    assert (columns - 1) ** 2 < number <= columns**2


def test_more_columns_than_images_leave_no_empty_place(tmp_path):
    images = noise(3, 1, 1, 1)

    path = save_grid(images, tmp_path / "grid.png", columns=8, scale=1, pad=0)

    assert pixels(path).tolist() == [images.flatten().tolist()]


@pytest.mark.parametrize("height, width", [(1, 1), (8, 8), (28, 28), (40, 16), (48, 9), (64, 64)])
def test_a_tile_gets_the_smallest_enlargement_to_48_pixels(tmp_path, height, width):
    path = save_grid(noise(1, 1, height, width), tmp_path / "grid.png", pad=0)

    shown = pixels(path).shape
    scale = shown[0] // height
    assert shown == (scale * height, scale * width)
    assert (scale - 1) * max(height, width) < 48 <= scale * max(height, width)


@pytest.mark.parametrize(
    "images, arguments, match",
    [
        (torch.zeros(2, 1, 4, 4), {}, "uint8.*float32"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), {}, "uint8.*int64"),
        (noise(2, 4, 4), {}, r"\[N, C, H, W\].*\(2, 4, 4\)"),
        (noise(1, 2, 1, 4, 4), {}, r"\(1, 2, 1, 4, 4\)"),
        (noise(0, 1, 4, 4), {}, r"none of them 0.*\(0, 1, 4, 4\)"),
        (noise(2, 1, 0, 4), {}, "none of them 0"),
        (noise(2, 1, 4, 4), {"columns": 0}, "columns=0"),
        (noise(2, 1, 4, 4), {"columns": 1.5}, "columns=1.5"),
        (noise(2, 1, 4, 4), {"scale": 0}, "scale=0"),
        (noise(2, 1, 4, 4), {"pad": -1}, "pad=-1"),
    ],
)
def test_what_is_no_grid_is_refused(tmp_path, images, arguments, match):
    with pytest.raises(ValueError, match=match):
        save_grid(images, tmp_path / "grid.png", **arguments)
    assert os.listdir(tmp_path) == []


def test_a_strip_shows_state_j_of_sample_i_in_row_i_and_column_j(tmp_path):
    states = [noise(3, 1, 2, 2, seed=j) for j in range(4)]

    shown = pixels(save_strip(states, tmp_path / "strip.png", scale=1))

    assert shown.shape == (3 * 4 + 2, 4 * 4 + 2)
    for i in range(3):
        for j in range(4):
            tile = shown[2 + 4 * i : 4 + 4 * i, 2 + 4 * j : 4 + 4 * j]
            assert tile.tolist() == states[j][i, 0].tolist()


@pytest.mark.parametrize("channels", [1, 3])
def test_labels_of_a_strip_stand_above_their_columns_if_they_fit(tmp_path, channels):
    states = [noise(3, channels, 8, 8, seed=j) for j in range(3)]
    path = tmp_path / "strip.png"
    plain = pixels(save_strip(states, path))

    shown = pixels(save_strip(states, path, labels=["152", "", "samples"]))
    assert shown[HEADING:].tolist() == plain.tolist()
    column = plain.shape[1] // 3
    heads = [shown[:HEADING, i * column : (i + 1) * column] for i in range(3)]
    assert [bool((head < 100).any()) for head in heads] == [True, False, True]

    same = pixels(save_strip(states, path, labels=["152", "", "x" * 20]))
    assert same.tolist() == plain.tolist()


@pytest.mark.parametrize("states", [[], [noise(2, 1, 2, 2), noise(3, 1, 2, 2)]])
def test_a_strip_of_unequal_or_no_states_is_refused(tmp_path, states):
    with pytest.raises(ValueError, match="same shape"):
        save_strip(states, tmp_path / "strip.png")


def test_a_picture_makes_its_folder_and_leaves_nothing_else(tmp_path):
    path = save_grid(noise(1, 1, 2, 2), tmp_path / "a run ü" / "samples" / "grid.png")

    assert os.listdir(path.parent) == ["grid.png"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path, error):
    path = tmp_path / "picture.png"
    path.write_bytes(b"the old one")

    def save(partial: Path) -> None:
        partial.write_bytes(b"half a new")
        raise error

    with pytest.raises(type(error)):
        write_picture(path, save)
    assert path.read_bytes() == b"the old one"
    assert os.listdir(tmp_path) == ["picture.png"]


def test_a_picture_is_never_seen_half_written(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"the old one")
    seen = []

    def save(partial: Path) -> None:
        partial.write_bytes(b"the new one")
        seen.append(path.read_bytes())

    write_picture(path, save)
    assert (seen, path.read_bytes()) == ([b"the old one"], b"the new one")


def test_two_writers_of_one_picture_do_not_meet(tmp_path):
    path = tmp_path / "report.html"

    def save(partial: Path) -> None:
        partial.write_bytes(b"begun first, ended last")
        write_picture(path, lambda other: other.write_bytes(b"in between"))

    write_picture(path, save)
    assert path.read_bytes() == b"begun first, ended last"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_figure_that_cannot_be_drawn_is_not_written(tmp_path):
    with pytest.raises(ZeroDivisionError), canvas.new_figure(tmp_path / "a.png", 1, 1):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


PLANE = GaussianMixture(torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), 0.4, torch.tensor([1.0, 3.0]))
BOX = (-4.0, 4.0, -3.0, 3.0)


def draw_density(path: Path, truth: bool = True, resolution: int = 24) -> Path:
    return plot_density(
        PLANE.log_prob,
        PLANE.sample(50, generator=torch.Generator().manual_seed(0)),
        PLANE.sample(60, generator=torch.Generator().manual_seed(1)),
        lambda x: PLANE.score(VPSDE())(x, 0.05),
        Gaussian(torch.zeros(2), 0.5).log_prob if truth else None,
        BOX,
        path,
        resolution=resolution,
    )


@pytest.mark.parametrize(
    "draw, inches",
    [
        (lambda path: plot_loss(losses((1, 0.5), (2, 0.4), (3, 0.1)), path), (6.4, 3.2)),
        (lambda path: plot_bits(evaluations("nll", (1, 3.0, 0.1)), path, 2.8), (6.4, 3.2)),
        (lambda path: plot_path([noise(9, 2) * 1.0] * 3, path), (3 * 1.9, 2.1)),
        (lambda path: draw_density(path), (7.2, 2 * (2.9 * 6 / 8 + 0.6))),
        (lambda path: draw_density(path, truth=False), (10.2, 2.9 * 6 / 8 + 0.6)),
    ],
    ids=["loss", "bits", "path", "density", "density without truth"],
)
def test_a_figure_is_a_png_of_its_size_with_something_on_it(tmp_path, draw, inches):
    path = draw(tmp_path / "figure.png")

    shown = pixels(path)[..., :3]
    for side, length in zip(shown.shape[:2], reversed(inches), strict=True):
        assert abs(side - length * STYLE["savefig.dpi"]) <= 1
    assert (shown.max(-1) > shown.min(-1)).any()  # curves and points have colours, axes have not
    assert (shown[0] == 255).all() and (shown[:, 0] == 255).all()  # nothing runs off the picture
    assert (shown[-1] == 255).all() and (shown[:, -1] == 255).all()
    assert os.listdir(tmp_path) == ["figure.png"]


def test_series_holds_the_finite_values_in_their_order():
    rows = [*losses((3, 1.0), (1, math.nan), (2, math.inf), (5, 2)), {"train/loss": None}]
    rows += [{"train/iteration": 6, "eval/nll": 1.0}, {"train/iteration": 7, "train/loss": "low"}]

    assert series(rows, "train/loss") == ([3, 5], [1.0, 2])


@pytest.mark.parametrize("number", [1, 2, 19, 50, 400])
def test_the_running_mean_of_a_straight_line_is_that_line(number):
    line = [2.0 - 0.25 * i for i in range(number)]

    means = running_mean(line)

    cut = (number - len(means)) // 2
    assert cut == round(0.025 * number)
    assert means == line[cut : number - cut]  # multiples of 1/4: no rounding


def test_the_running_mean_of_a_constant_is_the_constant():
    assert set(running_mean([0.5] * 300)) == {0.5}


@pytest.mark.parametrize("span", [0.05, 0.3, 1.0, 5.0])
def test_the_running_mean_is_a_convolution_with_a_box(span):
    values = np.random.default_rng(0).standard_normal(101)

    means = running_mean(values.tolist(), span)

    window = 2 * min(round(span * 101 / 2), 50) + 1
    assert means == pytest.approx(np.convolve(values, np.ones(window) / window, "valid").tolist())


def test_nothing_has_no_running_mean():
    assert running_mean([]) == []


def test_the_loss_figure_shows_the_logged_values_and_their_running_mean(drawn):
    values = np.random.default_rng(0).random(200) + 1
    iterations = list(range(10, 2010, 10))
    rows = losses(*zip(iterations, values.tolist(), strict=True))
    rows.insert(50, {"train/iteration": 501, "train/loss": math.nan})
    rows.insert(60, {"train/iteration": 600, "eval/nll": 1.0})

    plot_loss(rows, "unused")

    (axes,) = drawn[0].axes
    logged, mean = axes.get_lines()
    assert logged.get_xdata().tolist() == iterations
    assert logged.get_ydata().tolist() == values.tolist()
    assert mean.get_xdata().tolist() == iterations[5:-5]
    assert mean.get_ydata() == pytest.approx(np.convolve(values, np.ones(11) / 11, "valid"))


def test_the_known_loss_of_the_exact_score_is_a_line_across(drawn):
    plot_loss(losses((1, 0.5), (2, 0.4)), "unused", floor=0.31)

    *_, floor = drawn[0].axes[0].get_lines()
    assert list(floor.get_ydata()) == [0.31, 0.31]
    assert list(floor.get_xdata()) == [0, 1]  # in widths of the axes
    assert floor.get_label() == "exact score: 0.31"


@pytest.mark.parametrize(
    "values, scale",
    [((1.0, 0.2), "linear"), ((1.0, 0.01), "log"), ((1.0, 0.01, -0.1), "linear")],
)
def test_a_loss_over_decades_has_a_logarithmic_axis(drawn, values, scale):
    plot_loss(losses(*enumerate(values)), "unused")

    assert drawn[0].axes[0].get_yscale() == scale


@pytest.mark.parametrize("lowest", [0.09, 0.002, 1e-9])
def test_ticks_of_a_logarithmic_axis_are_plain_numbers_that_fit(drawn, lowest):
    plot_loss(losses((1, 1.0), (2, lowest)), "unused")

    axis = drawn[0].axes[0].yaxis
    low, high = axis.get_view_interval()
    shown = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
    assert 3 <= len(shown) <= 10
    for tick in shown:
        assert float(axis.get_major_formatter()(tick)) == pytest.approx(tick, rel=1e-5)


@pytest.mark.parametrize("iterations", [(5,), (0, 1), (1, 2, 3), (10_000, 20_000)])
def test_ticks_are_whole_iterations_and_none_twice(drawn, iterations):
    plot_loss(losses(*((x, 1.0) for x in iterations)), "unused")

    axis = drawn[0].axes[0].xaxis
    ticks = axis.get_majorticklocs()
    labels = [axis.get_major_formatter()(tick) for tick in ticks]
    assert [float(label.replace(" ", "")) for label in labels] == ticks.tolist()
    assert len(set(labels)) == len(labels)


def test_error_bars_are_the_standard_errors_in_the_order_of_iterations(drawn):
    triples = [(400, 2.5, 0.25), (200, 3.0, 0.5), (600, 2.0, 0.125)]

    plot_bits([*losses((100, 1.0)), *evaluations("bits_per_dim", *triples)], "unused")

    (axes,) = drawn[0].axes
    line, _, (bars,) = axes.containers[0]
    assert line.get_xdata().tolist() == [200, 400, 600]
    assert line.get_ydata().tolist() == [3.0, 2.5, 2.0]
    for segment, (x, y, error) in zip(bars.get_segments(), sorted(triples), strict=True):
        assert segment.tolist() == [[x, y - error], [x, y + error]]
    assert axes.get_ylabel().startswith("bits/dim")


@pytest.mark.parametrize("error", [None, math.nan, math.inf, -0.1, "0.1"])
def test_an_unknown_standard_error_has_no_bar(drawn, error):
    plot_bits(evaluations("nll", (1, 2.0, error), (2, 1.5, 0.25)), "unused")

    axes = drawn[0].axes[0]
    first, second = axes.containers[0][2][0].get_segments()
    assert first.tolist() == [[1, 2.0], [1, 2.0]]
    assert second.tolist() == [[2, 1.25], [2, 1.75]]
    assert axes.get_ylabel().startswith("nats")


def test_the_entropy_is_a_line_across_the_likelihood(drawn):
    plot_bits(evaluations("nll", (1, 3.0, 0.1)), "unused", floor=2.83188)

    entropy = drawn[0].axes[0].get_lines()[-1]
    assert list(entropy.get_ydata()) == [2.83188, 2.83188]
    assert entropy.get_label() == "entropy: 2.832"


@pytest.mark.parametrize("draw", [plot_loss, plot_bits])
@pytest.mark.parametrize("rows", [[], [{"train/iteration": 1, "train/loss": math.nan}]])
def test_nothing_to_draw_is_refused_and_nothing_written(tmp_path, draw, rows):
    with pytest.raises(ValueError, match="got none"):
        draw(rows, tmp_path / "figure.png")
    assert os.listdir(tmp_path) == []


def panels(figure: Figure) -> dict[str, object]:
    return {axes.get_title(): axes for axes in figure.axes}


def test_the_density_is_that_at_the_centre_of_each_cell(drawn):
    draw_density("unused", resolution=8)

    (image,) = panels(drawn[0])["Density, model"].get_images()
    shown = image.get_array()
    assert image.origin == "lower" and tuple(image.get_extent()) == BOX
    for row, column in np.ndindex(8, 8):
        centre = torch.tensor([[-4 + (column + 0.5) * 1.0, -3 + (row + 0.5) * 0.75]])
        assert shown[row, column] == pytest.approx(float(PLANE.log_prob(centre).exp()), rel=1e-5)


def test_the_density_as_drawn_integrates_to_one(drawn):
    draw_density("unused", resolution=80)

    (image,) = panels(drawn[0])["Density, model"].get_images()
    # midpoints a quarter of a std apart are exact to float32, the rest lies outside of the box
    assert float(image.get_array().sum()) * (8 / 80) * (6 / 80) == pytest.approx(1, abs=1e-5)


def test_model_and_truth_share_a_colour_scale_that_ends_at_the_truth(drawn):
    draw_density("unused")

    (truth,) = panels(drawn[0])["Density, truth"].get_images()
    (model,) = panels(drawn[0])["Density, model"].get_images()
    assert truth.get_clim() == model.get_clim() == (0, float(truth.get_array().max()))
    assert float(model.get_array().max()) > model.get_clim()[1]


def test_without_the_truth_three_panels_are_left(drawn):
    draw_density("unused", truth=False)

    titles = [axes.get_title() for axes in drawn[0].axes]
    assert [title.partition(",")[0] for title in titles] == ["Density", "Score", "Samples", ""]


def test_arrows_point_along_the_score_and_grow_with_its_logarithm(drawn):
    draw_density("unused")

    (axes,) = (axes for title, axes in panels(drawn[0]).items() if title.startswith("Score"))
    (quiver,) = (artist for artist in axes.collections if hasattr(artist, "U"))
    places = torch.tensor(np.stack([quiver.X, quiver.Y], 1), dtype=torch.float32)
    score = PLANE.score(VPSDE())(places, 0.05)
    norm = score.norm(dim=1, keepdim=True)
    arrows = torch.tensor(np.stack([quiver.U, quiver.V], 1), dtype=torch.float32)
    assert_close(arrows, score / norm * torch.log1p(norm))


def test_samples_of_data_and_model_are_told_apart(drawn):
    draw_density("unused")

    axes = panels(drawn[0])["Samples"]
    data, model = axes.collections
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    assert_close(
        torch.tensor(model.get_offsets()).float(), PLANE.sample(50, generator=generators[0])
    )
    assert_close(
        torch.tensor(data.get_offsets()).float(), PLANE.sample(60, generator=generators[1])
    )
    assert tuple(model.get_facecolor()[0][:3]) == to_rgb(ORANGE)
    assert tuple(data.get_facecolor()[0][:3]) == to_rgb(GREY)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["data", "model"]
    assert (*axes.get_xlim(), *axes.get_ylim()) == BOX


def test_a_density_that_is_not_finite_is_drawn_as_none(drawn):
    def broken(x: Tensor) -> Tensor:
        return torch.tensor([math.nan, math.inf, -math.inf, 0.0]).repeat(len(x) // 4)

    plot_density(broken, PLANE.sample(9), PLANE.sample(9), lambda x: x * math.nan, None, BOX, "")

    (image,) = panels(drawn[0])["Density, model"].get_images()
    assert set(np.asarray(image.get_array()).flatten().tolist()) == {0.0, 1.0}


def test_a_density_is_asked_for_no_more_than_4096_points_at_once(drawn):
    asked = []

    def log_prob(x: Tensor) -> Tensor:
        asked.append(len(x))
        return PLANE.log_prob(x)

    plot_density(log_prob, x := PLANE.sample(9), x, lambda x: x, None, BOX, "", resolution=70)

    assert asked == [4096, 4900 - 4096]


def test_a_density_of_one_point_is_refused(drawn):
    with pytest.raises(ValueError, match="resolution=1"):
        draw_density("unused", resolution=1)


def test_each_state_on_the_way_has_its_panel_with_its_points_and_range(drawn):
    states = [30 * torch.randn(7, 2), torch.tensor([[-1.5, 9.0], [0.25, -9.0], [math.nan, 0.0]])]

    plot_path(states, "unused", ["noise", "data"])

    assert [axes.get_title() for axes in drawn[0].axes] == ["noise", "data"]
    for axes, state in zip(drawn[0].axes, states, strict=True):
        (points,) = axes.collections
        assert_close(torch.tensor(points.get_offsets().data).float(), state, equal_nan=True)
    assert drawn[0].axes[1].get_xlabel() == "-1.5 to 0.25"


def test_panels_on_the_way_are_numbered_if_they_have_no_names(drawn):
    plot_path([torch.zeros(2, 2)] * 2, "unused")

    assert [axes.get_title() for axes in drawn[0].axes] == ["state 1 of 2", "state 2 of 2"]


@pytest.mark.parametrize("states", [[], [torch.zeros(4, 3)], [torch.zeros(4, 2), torch.zeros(2)]])
def test_a_way_through_no_plane_is_refused(tmp_path, states):
    with pytest.raises(ValueError, match=r"\[N, 2\]"):
        plot_path(states, tmp_path / "path.png")


class Known(nn.Module):
    """A model whose score is exact."""

    def __init__(self, oracle: GaussianMixture) -> None:
        super().__init__()
        self.oracle, self.sde, self.times = oracle, VPSDE(), []
        self.weight = nn.Parameter(torch.zeros(()))

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(t)
        return self.oracle.score(self.sde)(x, t)


def way(x: Tensor) -> list[Frame]:
    """From a noisy state to one at t_min, both ``x``."""
    return [Frame(0, 1.0, 152.0, x), Frame(1, 1e-5, 1e-3, x)]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """What ``draw_plane`` hands to the two figures."""
    taken = {}
    for name in ("plot_density", "plot_path"):
        monkeypatch.setattr(
            plane, name, lambda *given, name=name, **_: taken.__setitem__(name, given)
        )
    return taken


def exact_model(data: Dataset) -> Known:
    """The eight Gaussians in the units of the model."""
    angle = torch.arange(8) * (math.pi / 4)
    centres = 4 / 1.414 * torch.stack([angle.cos(), angle.sin()], 1)
    std = torch.full((8, 2), 0.5 / 1.414) / data.units.scale
    return Known(GaussianMixture(data.units.encode(centres), std))


def test_the_plane_shows_the_density_in_data_units_to_hundredths_of_its_top(handed):
    data = eight_gaussians(train_size=500, test_size=100)

    plane.draw_plane(
        Path("unused"), "7-x", exact_model(data), Conditions(data, 0), way(torch.zeros(9, 2))
    )

    log_prob, _, test, _, truth, extent, path = handed["plot_density"]
    points = torch.cat([data.test, torch.tensor([[0.0, 0.0], [3.5, 3.5]])])
    top = math.exp(float(truth(torch.tensor([[4 / 1.414, 0.0]]))))
    assert float((log_prob(points).exp() - truth(points).exp()).abs().max()) < 0.03 * top
    assert_close(test, data.test[:9])
    for axis in range(2):
        low, high = extent[2 * axis : 2 * axis + 2]
        assert low < float(data.test[:, axis].min()) < float(data.test[:, axis].max()) < high
    assert path == Path("unused/density-7-x.png")


def test_the_plane_shows_the_score_of_slightly_noisy_data_in_data_units(handed):
    data = eight_gaussians(train_size=500, test_size=100)
    model = exact_model(data)

    plane.draw_plane(Path("unused"), "7", model, Conditions(data, 0), way(torch.zeros(9, 2)))

    score = handed["plot_density"][3](data.test)
    time = model.times[-1]
    assert float(model.sde.sigma(time) / model.sde.alpha(time)) == pytest.approx(0.1)
    values = data.test.clone().requires_grad_()
    log_prob = model.oracle.log_prob(data.units.encode(values), model.sde, time)
    (gradient,) = torch.autograd.grad(log_prob.sum(), values)  # the chain rule knows the units
    assert_close(score, gradient, rtol=1e-4, atol=1e-4)


def test_the_plane_shows_k_level_data_with_each_level_as_wide_as_its_bin(handed):
    levels = torch.tensor([[0, 1], [3, 1], [2, 2], [1, 3]], dtype=torch.uint8)
    data = Dataset("pairs", levels, levels, levels=4)
    model = Known(GaussianMixture(torch.tensor([[0.25, -0.5]]), 0.1))  # model units: [-1, 1]
    state = torch.tensor([[0.25, -0.5], [-1.0, 1.0]])

    plane.draw_plane(Path("unused"), "7", model, Conditions(data, 0), way(state))

    log_prob, samples, test, score, *_ = handed["plot_density"]
    assert_close(samples, torch.tensor([[2.5, 1.0], [0.0, 4.0]]))
    assert torch.equal(test.floor(), levels[:2].float())
    centre = torch.tensor([[2.5, 1.0]])
    # std 0.1 in model units are 0.2 levels, and t_min adds next to nothing
    known = -math.log(2 * math.pi * 0.2**2)
    assert float(log_prob(centre)) == pytest.approx(known, abs=0.03)
    field = score(torch.tensor([[2.0, 2.0]]))  # at zero in model units, where a level is 1/2
    level = model.sde.level(model.times[-1])
    variance = (0.1 * level.alpha) ** 2 + level.sigma**2
    assert_close(field, (level.alpha * state[:1] / variance / 2).float())


@pytest.mark.parametrize("number", [2, 3, 6, 7, 10, 11])
def test_the_way_begins_with_the_noise_and_ends_with_the_samples(handed, number):
    data = eight_gaussians(train_size=100, test_size=20)
    states = [Frame(i, 0.1, 9.0 - i, torch.full((450, 2), float(i))) for i in range(number)]

    plane.draw_plane(Path("unused"), "7", exact_model(data), Conditions(data, 0), states)

    shown, path, labels = handed["plot_path"]
    places = [round(float(data.units.encode(state)[0, 0])) for state in shown]
    assert places[0] == 0 and places[-1] == number - 1
    assert len(places) == min(number, 6) and sorted(set(places)) == places
    assert (labels[0], labels[-1]) == ("sigma/alpha 9", "samples")
    assert path == Path("unused/path-7.png")


def test_data_at_the_noise_of_a_state_have_its_mean_and_spread():
    generator, model = torch.Generator().manual_seed(0), SimpleNamespace(sde=VPSDE())
    n = 20_000
    found = plane.noised(torch.full((n, 2), 3.0), model, Frame(0, 0.2, 0.0, None), generator)

    level = VPSDE().level(torch.tensor(0.2, dtype=torch.float64))
    assert abs(float(found.mean() - 3 * level.alpha)) < 5 * float(level.sigma) / math.sqrt(2 * n)
    # the standard deviation of N numbers is known to 1 / sqrt(2 N) of itself
    assert float(found.std() / level.sigma) == pytest.approx(1, abs=5 / math.sqrt(4 * n))


def test_one_point_on_the_way_has_the_data_around_it_or_its_place_below(drawn):
    point, around = torch.tensor([[0.8, -0.25]]), torch.tensor([[-2.0, 0.0], [3.0, 1.0]])

    plot_path([point], "unused")
    plot_path([point], "unused", truth=[around])

    assert drawn[0].axes[0].get_xlabel() == "(0.8, -0.25)"
    grey, blue = drawn[1].axes[0].collections
    assert_close(torch.tensor(grey.get_offsets().data).float(), around)
    assert_close(torch.tensor(blue.get_offsets().data).float(), point)
    assert drawn[1].axes[0].get_xlabel() == "-2 to 3"


def test_the_plane_is_written_as_two_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(plane, "RESOLUTION", 8)
    data = eight_gaussians(train_size=100, test_size=20)

    picture = plane.draw_plane(
        tmp_path / "figures", "30", exact_model(data), Conditions(data, 0), way(torch.randn(9, 2))
    )

    assert picture.name == "density-30.png"
    assert sorted(os.listdir(tmp_path / "figures")) == [picture.name, "path-30.png"]

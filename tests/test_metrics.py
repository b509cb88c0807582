"""The vocabulary of metrics: what is logged is in it, and the limits of a band."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiment import metrics, settings
from experiment.curve_figure import curve_picture
from experiment.record import ITERATION

ROOT = Path(__file__).resolve().parents[1]
NAMES = {name for metric in metrics.NUMBERS for name in metric.names}
SHOWN = {item.name for item in (*metrics.PICTURES, *metrics.CURVES)}


def test_every_metric_has_a_section_of_its_own_prefix_and_no_name_is_used_twice() -> None:
    everything = (*metrics.NUMBERS, *metrics.PICTURES, *metrics.CURVES)
    assert {item.section for item in everything} == set(metrics.SECTIONS)
    assert len(NAMES | SHOWN) == len(NAMES) + len(SHOWN)
    assert len({item.title for item in everything}) == len(everything)


def test_every_name_that_the_experiments_log_is_in_the_vocabulary() -> None:
    files = {*(ROOT / "experiment").glob("*.py")} - {Path(metrics.__file__)}
    pattern = r"\"((?:train|eval|perf|diagnose)/[a-z_]+)\"|tracker\.image\(\"([a-z_/]+)\""
    found = [re.findall(pattern, path.read_text(encoding="utf-8")) for path in files]
    logged = {name or picture for pairs in found for name, picture in pairs}
    assert {"train/loss", "perf/images_per_s", "samples/grid"} <= logged
    assert logged - {ITERATION} <= NAMES | SHOWN
    assert {f"eval/{name}": unit for name, unit in settings.UNITS.items()} == metrics.UNITS


def test_a_value_with_its_standard_error_gets_one_down_and_one_up_and_others_nothing() -> None:
    values = {"eval/nll": 2.0, "eval/nll_stderr": 0.25, "train/loss": 1.0, "lone_stderr": 1.0}
    limits = {"eval/nll_low": 1.75, "eval/nll_high": 2.25}
    assert metrics.with_limits(values) == values | limits
    (nll,) = [metric for metric in metrics.NUMBERS if metric.name == "eval/nll"]
    assert set(nll.series) == {"eval/nll", *limits}


@pytest.mark.parametrize("name", [metrics.CURVES[0].name, "something/else"])
def test_a_picture_of_a_curve_is_there_as_long_as_it_is_looked_at(name: str) -> None:
    from PIL import Image

    with curve_picture(name, [0.01, 1.0, 50.0], [0.1, 0.5, 0.9]) as path:
        with Image.open(path) as picture:
            assert picture.size == (int(6.4 * 144), int(3.2 * 144))
            shades = picture.convert("L").getextrema()
    assert shades[0] < 100 and shades[1] == 255  # something is drawn on white
    assert not path.parent.exists()

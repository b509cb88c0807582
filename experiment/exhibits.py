"""What the page of a run shows of its samples, and of its samplers side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiment.compare_figure import TITLES
from experiment.page import is_number, load, picture, plain
from experiment.uncertainty import interval

Row = Mapping[str, Any]
STEMS = {  # files whose newest are shown, and what they show
    "samples/grid": "Samples of the model",
    "samples/strip": "Samples on their way, one a row, with sigma/alpha above",
    "figures/path": "Points on their way; grey: data at the same noise",
    "figures/density": "What was learnt",
}
COUNTS = {"steps": "step", "nfe": "evaluation"}


def samples(run_dir: Path) -> dict[str, str]:
    """The sections of samples by their titles: the latest of mode=sample, and those that training
    drew if they are of a later iteration, or the only ones."""
    shown = {stem: _newest(run_dir, stem, caption) for stem, caption in STEMS.items()}
    return {
        "Samples": shown["samples/grid"],
        "From noise to data": shown["samples/strip"] + shown["figures/path"],
        "Density, score and samples": shown["figures/density"],
    }


def _newest(run_dir: Path, stem: str, caption: str) -> str:
    drawn, reached = "", -1
    for about, name in _asked_for(run_dir):
        drawn = picture(
            run_dir / f"{stem}-{name}.png",
            f"{caption}, iteration {about['iteration']}: {drawn_by(about)}",
        )
        if drawn:
            reached = about["iteration"]
            break
    for iteration, path in _trained(run_dir / stem):
        own = picture(path, f"{caption}, iteration {iteration}") if iteration > reached else ""
        if own:
            return drawn + own
    return drawn


def _asked_for(run_dir: Path) -> list[tuple[Row, str]]:
    """What mode=sample has drawn, the latest first, and what its files are named by."""
    found = [
        (load(path, dict), path.stem.partition("-")[2])
        for path in (run_dir / "samples").glob("samples-*.json")
    ]
    whole = [
        (about, name)
        for about, name in found
        if is_number(about.get("drawn")) and is_number(about.get("iteration"))
    ]
    return sorted(whole, key=lambda entry: entry[0]["drawn"], reverse=True)


def _trained(stem: Path) -> list[tuple[int, Path]]:
    """Pictures ``<stem>-<iteration>.png``, that of the highest iteration first."""
    found = []
    for path in stem.parent.glob(f"{stem.name}-*.png"):
        digits = re.fullmatch(r"\d+", path.stem.removeprefix(f"{stem.name}-"))
        if digits:
            found.append((int(digits[0]), path))
    return sorted(found, reverse=True)


def drawn_by(about: Row) -> str:
    """The sampler with its numbers, as far as they are not what one takes for granted."""
    parts = [str(about.get("sampler"))]
    counts = [(about[key], word) for key, word in COUNTS.items() if is_number(about.get(key))]
    parts += [f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts]
    parts += [
        f"{key} {about[key]:g}"
        for key in ("eta", "temperature", "guidance")
        if is_number(about.get(key)) and about[key] != 1
    ]
    parts += [f"average {about['average']}"] if about.get("average") else []
    asked = about.get("cond", "training")
    parts += [] if asked == "training" else [f"cond {asked}"]
    precision = about.get("precision", "float32")
    return ", ".join(parts + ([] if precision == "float32" else [str(precision)]))


def comparison(run_dir: Path) -> str:
    """The latest comparison of samplers: its figure, and a table of its results."""
    found = sorted(_compared(run_dir), key=lambda entry: entry[0], reverse=True)
    if not found:
        return "".join(
            picture(path, f"Samplers compared, iteration {iteration}")
            for iteration, path in _trained(run_dir / "figures/compare")[:1]
        )
    _, path, record = found[0]
    note = "" if record.get("complete", True) else plain("Not complete: it was stopped, or runs.")
    return note + _figure_of(run_dir, path, record) + _results(record)


def widths(run_dir: Path) -> str:
    """The figure of the latest iteration of which averages were compared."""
    found = _trained(run_dir / "figures/averages")[:1]
    return "".join(
        picture(
            path,
            f"Likelihood by width of the average, iteration {iteration}, less that of the average "
            "of training on the same samples, with its standard error; hollow: put together from "
            "snapshots",
        )
        for iteration, path in found
    )


def _compared(run_dir: Path) -> Iterator[tuple[tuple[float, ...], Path, Row]]:
    for path in (run_dir / "compare").glob("compare-*.json"):
        record = load(path, dict)
        if isinstance(record.get("results"), list) and is_number(record.get("iteration")):
            begun = record.get("begun", 0)
            yield (begun if is_number(begun) else 0, record["iteration"]), path, record


def _figure_of(run_dir: Path, path: Path, record: Row) -> str:
    return picture(
        run_dir / "figures" / f"{path.stem}.png",
        f"Quality by evaluations of the network, iteration {record['iteration']}; bars are 95 % "
        "intervals, the band is how far training samples are from the test set",
    )


def _results(record: Row) -> str:
    """A row a sampler and price; what failed is not a number, and says so."""
    rows = [row for row in record["results"] if isinstance(row, dict)]
    floor = record.get("floor")
    floor = [{"sampler": "training set", **floor}] if isinstance(floor, dict) else []
    measures = [name for name in TITLES if any(_known(row, name) for row in rows)]
    heads = ["sampler", "evaluations", *(TITLES[name] for name in measures), "seconds"]
    lines = [_line(row, measures) for row in [*floor, *rows]]
    return table(heads, lines) + plain("± is half of the 95 % interval.") if rows else ""


def _line(row: Row, measures: Sequence[str]) -> list[str]:
    name = str(row.get("sampler"))
    if "failed" in row:
        return [f"{name}, failed at {row.get('asked')}: {row['failed']}"]
    numbers = [interval(row[one]) if _known(row, one) else "–" for one in measures]
    seconds = f"{row['seconds']:.1f}" if is_number(row.get("seconds")) else "–"
    return [name, str(row["nfe"]) if is_number(row.get("nfe")) else "–", *numbers, seconds]


def _known(row: Row, name: str) -> bool:
    estimate = row.get(name)
    ends = ("value", "low", "high")
    return isinstance(estimate, dict) and all(is_number(estimate.get(end)) for end in ends)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """HTML with text in the first column; a line of one cell goes across."""
    head = "".join(f"<th>{escape(title)}</th>" for title in heads)
    body = "".join(f"<tr>{_cells(line, len(heads))}</tr>\n" for line in lines)
    return (
        f'<div class="scroll"><table class="named"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def _cells(line: Sequence[str], columns: int) -> str:
    first, *others = map(escape, line)
    across = "" if others else f' colspan="{columns}"'
    return f'<td class="name"{across}>{first}</td>' + "".join(f"<td>{x}</td>" for x in others)

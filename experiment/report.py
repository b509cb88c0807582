"""``report.html``: one page about a run that opens from disk, at any time of the run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiment import figures
from experiment.canvas import write_picture
from experiment.diagnosis.page import diagnosis
from experiment.exhibits import comparison, samples, widths
from experiment.ledger import is_own
from experiment.page import is_number, load, page, picture, plain
from experiment.record import ITERATION, Record
from experiment.settings import UNITS
from experiment.uncertainty import uncertain

Row = Mapping[str, Any]
FINEST = {
    "bits_per_dim": "Below the width of a bin every e-fold costs the same, for noise that the "
    "dequantization added and gives back.",
    "nll": "Below the finest structure of the data every e-fold costs one nat a dimension.",
}
COLUMNS = {
    "iteration": "iteration",
    "value": "result ± standard error",
    "num_samples": "samples",
    "nfe": "evaluations",
    "seconds": "seconds",
    "how": "how",
}
HOW = ("sde", "how", "note", "checkpoint", "average", "caveat")


def write_report(run_dir: str | Path) -> Path:
    """Build ``report.html`` from what stands in ``run_dir``; what is missing is left out.

    Read: ``metrics.jsonl``, ``config.yaml``, ``run.json`` (name, created, command, versions,
    state; optionally entropy), ``likelihood.json`` (a list of evaluations; each may carry the
    entropy of the data), ``diagnose.json``, and of ``samples/``, ``figures/`` and ``compare/``
    what :mod:`experiment.exhibits` says.
    Written: ``report.html`` and in ``figures/``: ``loss.png``, ``bits.png``, ``information.png``,
    ``rate-distortion.png``. Pictures are embedded; the page loads nothing and runs no script.

    Args:
        run_dir: Directory of the run.

    Returns:
        Path of the page.

    Raises:
        OSError: If the page cannot be written.
    """
    run_dir = Path(run_dir)
    rows = [row for row in Record.read(run_dir) if is_number(row.get(ITERATION))]
    about = load(run_dir / "run.json", dict)
    evaluations = [row for row in load(run_dir / "likelihood.json", list) if _complete(row)]
    newest = _newest(evaluations, rows)
    entropy = next(
        (
            source["entropy"]
            for source in (newest or {}, about)
            if is_number(source.get("entropy"))
        ),
        None,
    )
    floor = entropy if newest is not None and newest["metric"] == "nll" else None
    bits = _figure(
        run_dir / "figures" / "bits.png",
        "Likelihood of the test set or of a part of it, during training and after",
        lambda path: figures.plot_bits(rows, path, floor=floor),
    )
    loss = _figure(
        run_dir / "figures" / "loss.png",
        "Loss of the training batches",
        lambda path: figures.plot_loss(rows, path),
    )
    sections = {
        **samples(run_dir),
        "Samplers compared": comparison(run_dir),
        "Likelihood": bits or plain("No evaluation yet."),
        "Averages of the weights": widths(run_dir),
        "Where the bits are": _information(run_dir, evaluations),
        "Three estimates of one likelihood": _bounds(run_dir, evaluations),
        "What the data ask for": diagnosis(run_dir),
        "Training loss": loss or plain("No loss logged yet."),
        "All evaluations": _table(evaluations),
        "How to go on": _commands(str(about.get("command") or "")),
        "Configuration": _config(run_dir),
    }
    name = str(about.get("name") or run_dir.resolve().name)
    body = _headline(name, about, rows, newest, entropy) + "".join(
        f"<section><h2>{escape(title)}</h2>\n{content}</section>\n"
        for title, content in sections.items()
        if content
    )
    target = run_dir / "report.html"
    return write_picture(
        # a name or a command need not be valid unicode
        target,
        lambda partial: partial.write_bytes(page(name, body).encode("utf-8", "replace")),
    )


def renew_report(run_dir: str | Path) -> str:
    """Build the page anew; a page that cannot be written costs a line and not the run.

    Args:
        run_dir: Directory of the run.

    Returns:
        ``report: PATH``, or why there is none.
    """
    try:
        return f"report: {write_report(run_dir)}"
    except OSError as error:
        return f"warning: report.html not written ({error}); metrics.jsonl has the numbers."


def go_on(command: str) -> dict[str, str]:
    """What to type next, from the ``command`` that began the run: its choices, other modes."""
    try:
        words = shlex.split(command)
    except ValueError:  # an unbalanced quote: the command was joined without quoting
        words = command.split()
    words = words or ["python", "run.py"]
    other = re.compile(r"\+*(mode(\.\w+)*|run\.fresh|checkpoint)=")
    own = [word for word in words if not other.match(word)]
    base = shlex.join(own)
    return {
        "Train on, or resume after a stop": f"{base} mode=train",
        "Likelihood of the newest checkpoint": f"{base} mode=likelihood",
        "Samples of the newest checkpoint": f"{base} mode=sample",
        "Samplers of it compared, by what they cost": f"{base} mode=compare",
        "What sampler=analytic_ddpm and its like want to know of it": f"{base} mode=calibrate",
        "What the data ask for, and where in the noise it errs": f"{base} mode=diagnose",
    }


def _headline(
    name: str, about: Row, rows: Sequence[Row], newest: Row | None, entropy: float | None
) -> str:
    if newest is None:
        result = plain("No evaluation yet.")
    else:
        unit = UNITS[newest["metric"]]
        result = (
            f'<p class="result">{uncertain(newest["value"], newest.get("standard_error"))} '
            f"<span>{unit}, {_test_set(newest)}</span></p>\n"
        )
        if newest.get("caveat"):
            result += plain(f"Warning: {newest['caveat']}.")
        elif newest["metric"] == "nll" and entropy is not None:
            gap = uncertain(newest["value"] - entropy, newest.get("standard_error"))
            result += plain(
                f"Entropy of the data: {entropy:.4f} nats; the model is {gap} above it."
            )
    return f"<header><h1>{escape(name)}</h1>\n{result}{_facts(about, rows)}</header>\n"


def _test_set(evaluation: Row) -> str:
    """What was evaluated; a row of the record does not say how much of the test set."""
    number = evaluation.get("num_samples")
    if not is_number(number):
        return "test set or a part of it"
    return f"test set ({_grouped(number)} samples)"


def _facts(about: Row, rows: Sequence[Row]) -> str:
    """One line: how far, how fast, when, with which versions."""
    iterations = [row[ITERATION] for row in rows]
    speed = figures.series(rows, "perf/images_per_s")[1]
    versions = about.get("versions")
    facts = [
        str(about.get("state") or ""),
        f"iteration {_grouped(max(iterations))}" if iterations else "",
        f"{_grouped(speed[-1])} samples/s in training" if speed else "",
        f"begun {about['created']}" if about.get("created") else "",
        ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "",
    ]
    return plain(" · ".join(fact for fact in facts if fact), "facts")


def _newest(evaluations: Sequence[Row], rows: Sequence[Row]) -> Row | None:
    """The evaluation of the highest iteration, on most samples; of several the last.

    A row of the record does not say how many; one of another run's checkpoint does not count.
    """
    logged = [
        {
            "iteration": row[ITERATION],
            "metric": metric,
            "value": row[f"eval/{metric}"],
            "standard_error": row.get(f"eval/{metric}_stderr"),
        }
        for row in rows
        for metric in UNITS
        if is_number(row.get(f"eval/{metric}"))
    ]
    own = [row for row in evaluations if is_own(row)]
    return max(
        [*own[::-1], *logged[::-1]],  # max keeps the first of equals
        key=lambda row: (row["iteration"], is_number(n := row.get("num_samples")) and n),
        default=None,
    )


def _table(evaluations: Sequence[Row]) -> str:
    if not evaluations:
        return plain("No full evaluation yet; `mode=likelihood` makes one.")
    head = "".join(f"<th>{escape(title)}</th>" for title in COLUMNS.values())
    lines = ("".join(_cell(row, key) for key in COLUMNS) for row in evaluations[::-1])
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    if key == "how":
        how = "; ".join(str(row[part]) for part in HOW if row.get(part))
        return f'<td class="text">{escape(how)}</td>'
    if key == "value":
        shown = f"{uncertain(value, row.get('standard_error'))} {UNITS[row['metric']]}"
    elif isinstance(value, float):
        shown = f"{value:.4g}" if value < 100 else f"{value:.0f}"
    else:
        shown = "–" if value is None else str(value)
    return f"<td>{escape(shown)}</td>"


def _information(run_dir: Path, evaluations: Sequence[Row]) -> str:
    """The figure of the last evaluation on a fixed grid."""
    found = [row for row in evaluations if any(row.get("information") or []) and is_own(row)]
    if not found:
        return ""
    clock, information = found[-1]["information"]
    metric = found[-1]["metric"]
    return _figure(
        run_dir / "figures" / "information.png",
        "Information by noise level, averaged over the samples; the dashed line is what telling "
        "the data from noise took down to there, which grows with every finer noise and is no "
        f"likelihood. {FINEST[metric]}",
        lambda path: figures.plot_information(clock, information, path, UNITS[metric]),
    )


def _bounds(run_dir: Path, evaluations: Sequence[Row]) -> str:
    """Table, order and rate-distortion curve of the last evaluation that has them."""
    found = [row for row in evaluations if isinstance(row.get("bounds"), dict) and is_own(row)]
    if not found:
        return ""
    bounds = found[-1]["bounds"]
    unit = UNITS[bounds["metric"]]
    lines = "\n".join(
        f"<tr><td>{escape(name)}</td><td>{uncertain(*value)} {unit}</td></tr>"
        for name, value in bounds["values"].items()
    )
    order = plain(f"T = {bounds['steps']}; {bounds['order']}".replace("\n", "; "))
    curve = _figure(
        run_dir / "figures" / "rate-distortion.png",
        "Bits sent so far against the error of what can be made of them",
        lambda path: figures.plot_rate_distortion(
            bounds["rate_distortion"],
            path,
            "grey levels" if bounds["metric"] == "bits_per_dim" else "model units",
        ),
    )
    table = f'<div class="scroll"><table><tbody>{lines}</tbody></table></div>\n'
    return f"{table}{order}{curve}"


def _commands(command: str) -> str:
    return "".join(
        f'<p>{escape(what)}</p><pre class="command"><code>{escape(line)}</code></pre>\n'
        for what, line in go_on(command).items()
    )


def _config(run_dir: Path) -> str:
    path = run_dir / "config.yaml"
    if not path.exists():
        return plain("No config.yaml in this directory.")
    return f"<pre>{escape(path.read_text(encoding='utf-8', errors='replace'))}</pre>\n"


def _figure(path: Path, alt: str, draw: Callable[[Path], object]) -> str:
    """The picture that ``draw`` writes; a line if it cannot, nothing if there is no data."""
    try:
        draw(path)
    except ImportError as error:
        return plain(f"Not drawn: {error}; `pip install matplotlib` adds the figures.")
    except ValueError:
        return ""
    except OSError as error:
        return plain(f"Not drawn: {error}.")
    return picture(path, alt)


def _complete(row: object) -> bool:
    return (
        isinstance(row, dict)
        and row.get("metric") in list(UNITS)  # a list: what was read need not be hashable
        and is_number(row.get("value"))
        and is_number(row.get("iteration"))
    )


def _grouped(number: float) -> str:
    return f"{number:,.0f}".replace(",", " ")

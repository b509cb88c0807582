"""The wandb workspace of a project as code: a section a topic, a panel a metric."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiment import metrics
from experiment.record import ITERATION

NAME = "score-sde"
REMEMBERED = "wandb-dashboard"  # file in the run directory: the address of the workspace
PATIENCE = 20.0  # seconds; the client itself would go on asking for minutes


def lay_out(run: Any, run_dir: Path, patience: float = PATIENCE) -> str:  # noqa: ANN401
    """Make the workspace of the run's project, or bring it up to date, and return its address.

    One workspace serves all runs of a project: it is looked for in ``run_dir`` and in the
    directories beside it, where its address is remembered, and made where there is none. Sections
    that a person has added stay; ours are laid out anew.

    Args:
        run: A wandb run that is online.
        run_dir: Directory of the run.
        patience: How long the server may take, in seconds.

    Raises:
        ModuleNotFoundError: Without wandb-workspaces.
        TimeoutError: If it takes longer.
        Exception: As wandb-workspaces does, where the server refuses.
    """
    project = run.url.partition("/runs/")[0]
    known = _remembered(run_dir, project)
    url = within(patience, lambda: _save(run.entity, run.project, known))
    (run_dir / REMEMBERED).write_text(url + "\n")  # torn, it is no address of this project
    return url


def sections() -> list[Any]:
    """What the workspace shows, from the vocabulary of ``experiment.metrics``."""
    from wandb_workspaces.workspaces import Section

    return [Section(name=name, is_open=True, panels=_panels(name)) for name in metrics.SECTIONS]


def _panels(section: str) -> list[Any]:
    kinds = ((metrics.NUMBERS, _line), (metrics.PICTURES, _media), (metrics.CURVES, _chart))
    return [panel(item) for items, panel in kinds for item in items if item.section == section]


def within(seconds: float, call: Callable[[], str]) -> str:
    """What ``call`` returns, or raises, if it takes no longer than ``seconds``."""
    answer: queue.Queue[tuple[str, Exception | None]] = queue.Queue()

    def ask() -> None:
        try:
            answer.put((call(), None))
        except Exception as error:
            answer.put(("", error))

    threading.Thread(target=ask, daemon=True).start()  # left behind if the server never answers
    try:
        value, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"wandb did not answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def _save(entity: str, project: str, known: str | None) -> str:
    from wandb_workspaces.workspaces import Workspace

    workspace = _found(known) or Workspace(entity=entity, project=project, name=NAME)
    ours = sections()
    names = {section.name for section in ours}
    workspace.sections = ours + [s for s in workspace.sections if s.name not in names]
    return workspace.save().url


def _found(known: str | None) -> Any:  # noqa: ANN401
    """The workspace at the remembered address, or None where it has been deleted since."""
    from wandb_workspaces.workspaces import Workspace

    try:
        return Workspace.from_url(known) if known else None
    except ValueError:
        return None


def _remembered(run_dir: Path, project: str) -> str | None:
    """The address of a workspace of ``project``: the run's own, else that of a run beside it."""
    beside = sorted(run_dir.absolute().parent.glob(f"*/{REMEMBERED}"))
    for path in (run_dir / REMEMBERED, *beside):
        url = path.read_text(errors="replace").strip() if path.exists() else ""
        if url.partition("?")[0] == project:
            return url
    return None


def _line(metric: metrics.Metric) -> Any:  # noqa: ANN401
    from wandb_workspaces.reports.v2 import LinePlot

    title = f"{metric.title}, ± 1 standard error" if metric.estimate else metric.title
    return LinePlot(title=title, x=ITERATION, y=list(metric.series), title_y=metric.unit or None)


def _media(picture: metrics.Picture) -> Any:  # noqa: ANN401
    from wandb_workspaces.reports.v2 import MediaBrowser

    return MediaBrowser(title=picture.title, media_keys=[picture.name])


def _chart(curve: metrics.Curve) -> Any:  # noqa: ANN401
    from wandb_workspaces.reports.v2 import CustomChart

    return CustomChart(
        query={"summaryTable": {"tableKey": f"{curve.name}_table"}},
        chart_name="wandb/line/v0",  # that of wandb.plot.line, by which the curve is logged
        chart_fields={"x": curve.x, "y": curve.y},
        chart_strings={"title": curve.title},
    )

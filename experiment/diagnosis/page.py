"""What the page of a run shows of ``diagnose.json``."""

from __future__ import annotations

from html import escape
from pathlib import Path

from experiment.diagnosis.words import findings
from experiment.exhibits import table
from experiment.page import load, picture

FILE, PICTURE = "diagnose.json", Path("figures") / "diagnose.png"


def diagnosis(run_dir: Path) -> str:
    """The section of the latest mode=diagnose: its figure, proposals, and what was found."""
    found = load(run_dir / FILE, dict)
    if not found:
        return ""
    try:
        said = "\n".join(findings(found)).replace("\n\n", "\n")
        rows = [
            [row["override"], "fits" if row["fits"] else "proposed", row["reason"]]
            for row in found["advice"]
        ]
    except (KeyError, TypeError, ValueError):  # written by another version, or by hand
        return ""
    shown = picture(
        run_dir / PICTURE,
        "Error of noise estimates, and where training draws its levels, against the noise",
    )
    told = f'<pre class="command">{escape(said)}</pre>\n'
    return shown + table(["setting", "", "why"], rows) + told

"""A run of a tracker that needs no server, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from test_trackers import ROOT, Silent, environment

RUN = """
import sys
from experiment import trackers
tracker = trackers.Safe(getattr(trackers, sys.argv[1])())
tracker.start(sys.argv[2], {"sde": {"beta_max": 20.0}}, "a name")
for i in range(1, 4):
    tracker.log({"train/loss": 1 / i, "eval/nfe": 64}, 10 * i)
tracker.finish()
print(tracker.describe(), file=sys.stderr)
"""


def run(name: str, folder: Path, *, server: Silent) -> subprocess.CompletedProcess[str]:
    """Log three rows by ``experiment.trackers.<name>`` in ``run ü``, with stdout closed.

    Whatever would leave the machine goes to ``server``.
    """
    proxies = {key: server.url for key in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy")}
    command = [sys.executable, "-c", RUN, name, str(folder / "run ü")]
    return subprocess.run(
        ["bash", "-c", 'exec "$@" >&-', "bash", *command],
        env=environment(folder / "home", HF_TOKEN="hf_" + "a" * 34, **proxies),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )

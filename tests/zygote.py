"""Runs ``run.py`` many times without paying for its imports each time.

Reads one JSON request a line from stdin, forks, runs the command line in the child exactly as a
new interpreter would after its imports, and answers with the exit code on stdout. A request may
ask for the number of the process in a file ``pid``, so that it can be killed, and for code that
runs in it ``before`` the command line.
"""

import contextlib
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

PRELOADED = (
    "hydra", "torch", "torchdiffeq", "matplotlib.figure", "PIL.Image", "sklearn.datasets",
    "sklearn.model_selection", "experiment.train", "experiment.sample", "experiment.likelihood",
)  # fmt: skip


def command_line(script: str, arguments: list[str]) -> int:
    """The exit code of ``python SCRIPT ARGUMENTS``."""
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
            return 1
        return leaving.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def child(request: dict) -> int:
    """Everything of a new process: its streams, directory and environment."""
    for number, path in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdout, sys.stderr = (
        open(number, "w", encoding="utf-8", closefd=False, buffering=1) for number in (1, 2)
    )
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if "pid" in request:
        Path(request["pid"]).write_text(str(os.getpid()))
    exec(request.get("before", ""), {})
    return command_line(request["script"], request["arguments"])


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    for module in PRELOADED:
        importlib.import_module(module)
    importlib.import_module("torch").set_num_threads(1)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            code = 1
            try:
                code = child(json.loads(line))
            finally:
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)

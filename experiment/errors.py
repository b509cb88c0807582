"""What goes wrong at run time through no bug of ours: told in one line, without a traceback."""

from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
EXTRAS = {  # others: run
    "torchdiffeq": "solvers",
    "torchsde": "solvers",
    "wandb": "wandb",
    "wandb_workspaces": "dashboard",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "datasets": "hf",
}
PACKAGES = {  # where the name to install is not the name to import
    "hydra": "hydra-core",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "wandb_workspaces": "wandb-workspaces",
}
SET_UP = ("solvers", "run", "wandb", "dashboard", "tensorboard")  # of these ./dev setup has all


class RunError(RuntimeError):
    """A run that cannot go on; the message says what, where, and what to do."""


class LostError(RunError):
    """The end of a process because another one is gone, which may have said why."""

    def __init__(self, error: BaseException) -> None:
        what = " ".join(str(error).split())[:200]
        super().__init__(
            f"another process of this run has ended or does not answer ({what}); the same "
            "command goes on from the newest checkpoint."
        )


EXPECTED = (RunError, ValueError, OSError, ImportError, MemoryError, FloatingPointError)


def one_line(error: Exception) -> str:
    """What to tell the user of ``error``; a package that is missing comes with its extra."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.partition(".")[0]
        package, extra = PACKAGES.get(module, module), EXTRAS.get(module, "run")
        return f"this needs the package {package}: {to_install(extra)}"
    return " ".join(str(error).split())  # what a library says may take several lines


def to_install(extra: str) -> str:
    """What to do for the packages of an extra."""
    also = ", or ./dev setup" * (extra in SET_UP)
    return f"pip install '.[{extra}]' in {HOME}{also}"

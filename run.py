"""Entry point: `python run.py sde=vp mode=train`, `python run.py mode=likelihood`; `--help` lists
the choices.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# spinning threads wait for a busy neighbour at several times the cost; on an idle machine sleeping
# ones cost a third
if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.errors import HydraException, InstantiationException  # noqa: E402
from omegaconf import DictConfig, OmegaConf, open_dict  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

CONF = Path(__file__).resolve().parent / "conf"
OVERRIDES = [a for a in sys.argv[1:] if not a.startswith("-")]


def instantiate(node: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The object that a configuration node names; its constructor's complaint is passed on as it
    is.
    """
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        where = "" if isinstance(cause, ValueError) else f"{node.get('_target_')}: "
        raise ValueError(f"{where}{cause}") from error


def known_keys() -> list[str]:
    """Every key that can be set under the chosen groups, and the groups."""
    from experiment.config import walk

    groups = [p.name for p in CONF.iterdir() if p.is_dir() and p.name != "hydra"]
    chosen = [o for o in OVERRIDES if o.split("=")[0] in groups]
    config = hydra.compose("config", chosen)
    with open_dict(config):
        return [*groups, *(key for key, _ in walk(OmegaConf.to_container(config)))]


def check_command_line() -> None:
    """Compose once before hydra does, so that a wrong choice or a typo is told in one line."""
    from experiment.config import check_added, explain

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            hydra.compose("config", OVERRIDES)
            if any(o.startswith("+") for o in OVERRIDES):
                check_added(OVERRIDES, known_keys())
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explain(str(error), OVERRIDES, known_keys())) from error
    GlobalHydra.instance().clear()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Compose, build, run one mode."""
    from experiment.run import Run

    report_errors(lambda: Run(OmegaConf.to_container(config, resolve=True), instantiate).go())


def report_errors(action: Any) -> None:  # noqa: ANN401
    """Run ``action``; tell what the user can mend in one line, the rest with a traceback."""
    from experiment.errors import RunError

    try:
        action()
    except (RunError, ValueError, OSError, ImportError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    if not any(a.startswith("-") for a in sys.argv[1:]):
        report_errors(check_command_line)
    main()

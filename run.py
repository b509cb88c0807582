"""Entry point: `python run.py sde=vp mode=train`, `mode=likelihood`; `--help` lists choices."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiment.start import before_the_slow_imports

CONF = Path(__file__).resolve().parent / "conf"
OVERRIDES = [a for a in sys.argv[1:] if not a.startswith("-")]

if __name__ == "__main__":
    before_the_slow_imports(CONF)

import hydra  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.errors import HydraException, InstantiationException  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402


def instantiate(node: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The object that a configuration node names; its constructor's complaint passes as it is."""
    from experiment.config import refusal

    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise refusal(node, error.__cause__ or error) from error


def compose(overrides: list[str]) -> dict[str, Any]:
    """The configuration as plain dicts, nothing resolved."""
    return OmegaConf.to_container(hydra.compose("config", overrides))


def check_command_line() -> None:
    """Compose once before hydra does, so that a wrong choice or a typo is told in one line."""
    from experiment.config import check_added, choices, explain, walk

    groups = choices(CONF)
    valid = [o for o in OVERRIDES if o.partition("=")[2] in groups.get(o.partition("=")[0], ())]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        known = [*groups, *(key for key, _ in walk(compose(valid)))]
        try:
            compose(OVERRIDES)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explain(str(error), OVERRIDES, known)) from error
        check_added(OVERRIDES, known)
    GlobalHydra.instance().clear()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Compose, build, run one mode."""
    from experiment.run import Run

    plain = OmegaConf.to_container(config, resolve=True)
    report_errors(lambda: Run(plain, instantiate, OVERRIDES, CONF).go())


def report_errors(action: Callable[[], None]) -> None:
    """Run ``action``; tell what the user can mend in one line, the rest with a traceback."""
    from experiment.errors import EXPECTED
    from experiment.last_words import last_words

    try:
        action()
    except EXPECTED as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(last_words(error))


if __name__ == "__main__":
    if not any(a.startswith("-") for a in sys.argv[1:]):
        report_errors(check_command_line)
    main()

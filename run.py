"""Entry point: `python run.py sde=vp mode=train`, `mode=likelihood`; `--help` lists choices."""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from experiment.start import before_the_slow_imports

CONF = Path(__file__).resolve().parent / "conf"
OVERRIDES = [a for a in sys.argv[1:] if not a.startswith("-")]
FLAGS = {a for a in sys.argv[1:] if a.startswith("-")}

if __name__ == "__main__":
    before_the_slow_imports(CONF)

import hydra  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
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


def compose(overrides: list[str], resolve: bool = False) -> dict[str, Any]:
    """The configuration as plain dicts; ``${...}`` stays unless it is to ``resolve``."""
    composed = hydra.compose("config", overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(composed)  # what ${hydra:...} stands for
    own = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    return OmegaConf.to_container(own, resolve=resolve)


def begun() -> AbstractContextManager[object]:
    """Compose before hydra does, so that a wrong choice or a typo is told in one line."""
    from experiment import command_line

    sweeps, errors = bool(FLAGS), (HydraException, OmegaConfBaseException)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        read = partial(parser.parse_overrides, OVERRIDES) if sweeps else None
        made = command_line.begun(OVERRIDES, CONF, compose, instantiate, read, errors)
    GlobalHydra.instance().clear()
    return made


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Compose, build, run one mode; within a sweep as one of its jobs."""
    from experiment.command_line import act

    template = OmegaConf.to_container(config.run)["name"]
    about = OmegaConf.to_container(HydraConfig.get())
    act(OmegaConf.to_container(config, resolve=True), template, instantiate, about, CONF)


if __name__ == "__main__":
    from experiment.command_line import report_errors

    with report_errors(begun) if FLAGS <= {"-m", "--multirun"} else nullcontext():
        main()

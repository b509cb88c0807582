"""A sampler of a comparison as it is written: a name of conf/sampler, and settings after it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.config import check_targets, named, read_yaml, walk
from experiment.errors import RunError
from sde_lib import grids

EXAMPLE = "'ancestral variance=forward grid=UniformLogSNR'"


def variant(folder: Path, entry: str) -> dict[str, Any]:
    """The node of ``entry``, NAME KEY=VALUE ...: the file of that name with these settings.

    Keys are those of the file, dotted within its parts, and values are YAML; ``grid=NAME`` is a
    class of :mod:`sde_lib.grids`. The end is always denoised.

    Args:
        folder: That of the configuration.
        entry: Settings are apart by spaces, and have none within.

    Raises:
        RunError: For an unknown name or key, one that mode=compare sets itself, or no ``=``.
    """
    name, *settings = entry.split()
    node = copy.deepcopy(named(folder, "sampler", name))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise RunError(
                f"mode.samplers: {setting!r} in {entry!r} is no setting; write key=value after "
                f"the name, as in {EXAMPLE}."
            )
        _check_key(node, entry, key)
        _set(node, key, _value(entry, key, text))
    check_targets(node, f"mode.samplers: {entry!r}")
    return node | ({"denoise": True} if "denoise" in node else {})


def _check_key(node: Mapping[str, Any], entry: str, key: str) -> None:
    """Refuse a ``key`` that is not there, or that is not this entry's to set."""
    decided = {"denoise": "every sampler ends denoised"}
    decided |= (
        {"steps": "steps are what mode.nfe buys"}
        if "steps" in node
        else dict.fromkeys(("rtol", "atol"), "tolerances are those of mode.tolerances")
    )
    leaves = [k for k, value in walk(node) if _leaf(k, value)]
    known = [k for k in leaves if k not in decided]
    if key in known:
        return
    why = decided[key] if key in decided and key in node else "there is no such key"
    raise RunError(
        f"mode.samplers: {key!r} cannot be set in {entry!r}, since {why}; "
        f"there are: {', '.join(known) or 'none'}."
    )


def _leaf(key: str, value: object) -> bool:
    """Whether it is a number or a word to set; a grid is set as a whole, by its name."""
    last = key.split(".")[-1]
    return last == "grid" or not (last == "_target_" or isinstance(value, Mapping | list))


def _value(entry: str, key: str, text: str) -> Any:  # noqa: ANN401
    import yaml

    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise RunError(f"mode.samplers: {text!r} in {entry!r} is no YAML value.") from error
    if key.split(".")[-1] != "grid" or value is None:
        return value
    known = named_grids()
    if value not in known:
        raise RunError(
            f"mode.samplers: unknown grid {text!r} in {entry!r}; choose of {', '.join(known)}."
        )
    return {"_target_": f"{grids.__name__}.{value}"}


def named_grids() -> list[str]:
    """The classes of :mod:`sde_lib.grids` that can be built from their name alone."""
    return [
        name
        for name, made in inspect.getmembers(grids, inspect.isclass)
        if issubclass(made, grids.Grid) and not inspect.isabstract(made) and _needs_nothing(made)
    ]


def _needs_nothing(made: type) -> bool:
    parameters = inspect.signature(made).parameters.values()
    return all(parameter.default is not parameter.empty for parameter in parameters)


def _set(node: dict[str, Any], key: str, value: Any) -> None:  # noqa: ANN401
    *above, last = key.split(".")
    for part in above:
        node = node[part]
    node[last] = value

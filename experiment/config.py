"""What a configuration may say: checked as plain dicts, before anything is built from it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiment.errors import RunError, to_install

ROOMS = ("sde_lib", "score_models", "likelihood", "experiment")
ALLOW_VARIABLE = "SCORE_SDE_ALLOW"  # packages of the user's own, comma-separated


def walk(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Every (dotted key, value) of nested dicts and lists, inner nodes included."""
    items = (
        config.items()
        if isinstance(config, Mapping)
        else enumerate(config)
        if isinstance(config, list)
        else ()
    )
    for key, value in items:
        inner = f"{path}.{key}" if path else str(key)
        yield inner, value
        yield from walk(value, inner)


def check_targets(config: Mapping[str, Any], source: str, rooms: tuple[str, ...] = ROOMS) -> None:
    """Refuse every ``_target_`` outside this project's rooms and the packages the user allows.

    A configuration names classes, and a stored one travels with its checkpoint: without this,
    opening a stranger's checkpoint would call whatever function it names. Text that would still be
    interpolated is refused too: it could become a target, or a whole node, after this check.

    Args:
        config: Composed or stored configuration.
        source: Where it comes from, for the message.
        rooms: The rooms it may name.

    Raises:
        RunError: Naming key and value; nothing has been called then.
    """
    own = [name.strip() for name in os.environ.get(ALLOW_VARIABLE, "").split(",") if name.strip()]
    for key, value in walk(config):
        if isinstance(value, str) and "${" in value:
            raise RunError(
                f"{source}: {key}={value} would be interpolated when it is built; refused. "
                "Write out what it stands for."
            )
        if key.split(".")[-1] != "_target_":
            continue
        room = str(value).split(".")[0]
        allowed = (*rooms, *own)
        if room not in allowed or not _defined_in(str(value), room):
            remedy = (
                f"If it is yours and you trust it, allow its package: {ALLOW_VARIABLE}={room} "
                "python run.py ..."
            )
            raise RunError(
                f"{source}: {key}={value} names something outside {', '.join(allowed)}; refused. "
                f"{remedy if room not in ROOMS else 'Name a class by the room that defines it.'}"
            )


def _defined_in(target: str, room: str) -> bool:
    """Whether ``target`` is of ``room``, not only reachable through it (sde_lib.x.torch)."""
    names = target.split(".")
    for split in range(len(names) - 1, 0, -1):
        module = ".".join(names[:split])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            continue
        if not found.__name__.split(".")[0] == room:
            return False
        for name in names[split:]:
            if not hasattr(found, name):
                return True  # a misspelt name in our own room: building it says so
            found = getattr(found, name)
        return (getattr(found, "__module__", None) or "").split(".")[0] == room
    return True


def check_complete(config: Mapping[str, Any]) -> None:
    """Report all values that still have to be given (``???``) in one message.

    Raises:
        RunError: Naming every missing key.
    """
    missing = [key for key, value in walk(config) if value == "???"]
    if missing:
        raise RunError(
            "missing: "
            + ", ".join(f"{key}=..." for key in missing)
            + "; give them on the command line."
        )


def fill_measured(config: Mapping[str, Any], **measured: Any) -> dict[str, Any]:  # noqa: ANN401
    """A copy in which every ``null`` under one of the names in ``measured`` has the measured
    value.

    So the stored configuration says all that is needed to rebuild a model without its data.
    """

    def fill(node: Any) -> Any:  # noqa: ANN401
        if isinstance(node, Mapping):
            return {
                k: measured[k] if v is None and k in measured else fill(v) for k, v in node.items()
            }
        return [fill(item) for item in node] if isinstance(node, list) else node

    return fill(config)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: Iterable[str] = ()
) -> list[str]:
    """Leaves in which two configurations differ, as ``key: old -> new``.

    Args:
        old: What was stored.
        new: What is asked for.
        ignore: Keys to pass over, with all below them.

    An absent key and ``null`` or ``false`` are the same, so that a later version may add an
    option that is off.
    """

    def leaves(config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: value
            for key, value in walk(config)
            if not isinstance(value, Mapping | list)
            and not any(f"{key}.".startswith(f"{i}.") for i in ignore)
        }

    a, b = leaves(old), leaves(new)
    off = (None, False)
    return [
        f"{k}: {a.get(k, 'absent')} -> {b.get(k, 'absent')}"
        for k in sorted({*a, *b})
        if str(a.get(k)) != str(b.get(k))  # NaN is not equal to itself, but the same
        and a.get(k) != b.get(k)
        and not (k not in a and b[k] in off or k not in b and a[k] in off)
    ]


def asked_for(changes: Iterable[str], overrides: Iterable[str]) -> list[str]:
    """Those ``changes`` (see :func:`differences`) that an override asked for."""
    keys = [f"{_key(override)}." for override in overrides]
    return [c for c in changes if any(f"{c.partition(':')[0]}.".startswith(key) for key in keys)]


def refusal(node: Mapping[str, Any], cause: BaseException) -> BaseException:
    """The error to report when the object that ``node`` names cannot be built.

    A constructor's own complaint passes as it is; an argument that it does not know is answered
    with those it takes.

    Args:
        node: Its configuration.
        cause: What its constructor, or that of a part of it, raised.
    """
    absent = re.search(r"'(\w+)' is importable from module '([\w.]+)'", str(cause))
    if absent:
        there = sorted(vars(importlib.import_module(absent[2])))
        return ValueError(f"{absent[2]} has no {absent[1]}{_close(absent[1], there)}")
    if isinstance(cause, ValueError | OSError | ImportError | RuntimeError):
        return cause
    unknown = re.match(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword", str(cause))
    for key, target in walk(node):
        if unknown and key.split(".")[-1] == "_target_" and target.endswith(f".{unknown[1]}"):
            room, _, name = target.rpartition(".")
            taken = inspect.signature(getattr(importlib.import_module(room), name)).parameters
            return ValueError(f"{target}: {cause}; it takes {', '.join(taken) or 'nothing'}.")
    return ValueError(f"{node.get('_target_')}: {cause}")


def check_choices(overrides: Iterable[str], folder: Path) -> dict[str, list[str]]:
    """The groups of a configuration folder and what can be chosen in each.

    Args:
        overrides: What was chosen.
        folder: The configuration folder.

    Raises:
        RunError: If a group has no such choice, listing those there are.
    """
    groups = choices(folder)
    for override in overrides:
        name, _, value = override.partition("=")
        group, choice = name.lstrip("+").partition("@")[0], value.strip("'\"")
        if group not in groups or choice in groups[group]:
            continue
        raise RunError(f"unknown {group}={value}; choose one of {', '.join(groups[group])}.")
    return groups


def choices(folder: Path) -> dict[str, list[str]]:
    """The groups of a configuration folder and what can be chosen in each, sorted."""
    groups = sorted(path for path in folder.iterdir() if path.is_dir())
    return {group.name: sorted(file.stem for file in group.glob("*.yaml")) for group in groups}


def named(folder: Path, group: str, name: str) -> dict[str, Any]:
    """The node that ``group=name`` stands for, read off its file without composing anything.

    Raises:
        RunError: If there is no such choice, listing those there are, the likely ones first; or
            if it names a class outside this project.
    """
    known = choices(folder).get(group, [])
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        listed = [*close, *(choice for choice in known if choice not in close)]
        raise RunError(f"unknown {group} {name!r}; choose one of {', '.join(listed)}.")
    path = folder / group / f"{name}.yaml"
    node = read_yaml(path.read_text(encoding="utf-8"))
    check_targets(node, str(path))
    return node


def read_yaml(text: str) -> Any:  # noqa: ANN401
    """What ``text`` stands for, with 1e-4 as the number that hydra takes it for; YAML 1.1 asks
    for 1.0e-4."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return yaml.load(text, Loader)


def explain(message: str, overrides: Iterable[str], known: Iterable[str], folder: Path) -> str:
    """A composition error in one line, with the key that was probably meant.

    Args:
        message: What the configuration library says.
        overrides: The overrides given.
        known: Keys and groups that exist.
        folder: Of the configuration, where other choices may have the key.
    """
    absent = re.search(
        r"Could not find '([^']+)/([^'/]*)'\s+Available options in [^:]*:(.*?)Config",
        message,
        re.S,
    )
    if absent:
        group, choice, options = absent.groups()
        more = f"; {to_install('sweep')} brings more" * (group == "hydra/launcher")
        return f"unknown {group}={choice}; choose one of {', '.join(options.split())}{more}."
    if "override_grammar" in message or "Config group override must" in message:
        given = " ".join(message.partition("See http")[0].split())
        return (
            f"cannot read an override ({given}); write key=value without spaces around the =; "
            "a value with spaces or special characters needs quotes of its own: 'key=\"a value\"'."
        )
    twice = re.match(r"Multiple values for (\w+)|(\w+) appears more than once", message)
    if twice:
        group = twice[1] or twice[2]
        return f"{group} is chosen already; write {group}=CHOICE without a + before it."
    unknown = re.search(
        r"Key '([^']+)' is not in struct|Could not (?:override|append) '([^']+)'", message
    )
    if unknown:
        for override in overrides:
            key = _key(override)
            if key not in known:
                group, others = key.split(".")[0], ", ".join(_choices_with(key, folder))
                elsewhere = f"it goes with {group}={others}; " if others else ""
                return f"unknown key {key!r}; {elsewhere}{_meant(key, known)}"
    return " ".join(message.split())


def check_added(overrides: Iterable[str], known: Iterable[str]) -> None:
    """Catch a key behind ``+`` or ``++`` that nothing reads.

    Raises:
        RunError: If an added key is close to one that exists, or outside every class.
    """
    known = list(known)
    for override in overrides:
        key = _key(override)
        if not override.startswith("+") or key in known or key.startswith("hydra."):
            continue
        above = [key[:i] for i, letter in enumerate(key) if letter == "."]
        close = difflib.get_close_matches(key, {*known} - {*above}, n=1, cutoff=0.75)
        if close:
            raise RunError(
                f"+{key} adds a key that nothing reads; did you mean {close[0]} (without +)?"
            )
        if not any(f"{node}._target_" in known for node in above):  # else its class will say
            namesakes = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
            raise RunError(
                f"+{key} adds a key that nothing reads; "
                + (f"there is {', '.join(namesakes)}." if namesakes else _meant(key, known))
            )


def _close(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."


def _key(override: str) -> str:
    return override.split("=")[0].strip().lstrip("+~").split("@")[0].replace("/", ".")


def _meant(key: str, known: Iterable[str]) -> str:
    """The key that was probably meant; else what there is in its group, or the groups."""
    same_kind = [name for name in known if ("." in name) == ("." in key)]
    group, _, tail = key.partition(".")
    inside = sorted(n for n in same_kind if n.startswith(f"{group}.") and _settable(n))
    if not inside and group in known and tail:
        return f"with these choices {group} has no keys."
    # a group in common does not make two keys alike
    start = len(group) + 1 if inside else 0
    near = {name[start:]: name for name in inside or same_kind}
    close = difflib.get_close_matches(key[start:], near, n=1, cutoff=0.6)
    if close:
        return f"did you mean {near[close[0]]}?"
    return f"there are: {', '.join(inside or sorted({n.split('.')[0] for n in known}))}."


def _settable(name: str) -> bool:
    """Whether it is neither internal nor one entry of a list."""
    return "._" not in name and not name.rpartition(".")[2].isdecimal()


def _choices_with(key: str, folder: Path) -> list[str]:
    """The choices of its group that have ``key``."""
    group, _, tail = key.partition(".")
    nodes = {
        path.stem: read_yaml(path.read_text(encoding="utf-8"))
        for path in sorted((folder / group).glob("*.yaml"))
    }
    return [name for name, node in nodes.items() if tail in dict(walk(node))]

"""Pictures of a data set of Hugging Face, from the Hub or from a folder."""

from __future__ import annotations

import io
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy

from experiment.data.dataset import Dataset
from experiment.data.labels import conditions
from experiment.data.pictures import Pictures, read_header, read_image
from experiment.data.samples import some_rows
from experiment.data.split import split_rows
from experiment.errors import RunError
from experiment.progress import progress
from sde_lib import validation

if TYPE_CHECKING:
    import datasets

LOOKED_AT = 256  # pictures of which it is asked whether they are grey
PATIENCE = 3.0  # seconds in which the Hub has to take a call
MODES = {1: "L", 3: "RGB"}


def huggingface(
    path: str,
    column: str = "image",
    label: str = "label",
    split: str = "train",
    test_split: str | None = None,
    channels: int | None = None,
    size: int | None = None,
    test_size: float = 0.1,
    seed: int = 0,
    conditional: bool = False,
) -> Dataset:
    """Pictures of a data set that the package ``datasets`` reads, [N, 1 or 3, H, W], 256 levels.

    They stay on disk as the package keeps them, and are decoded when they are asked for. No code
    that comes with a data set is run.

    Args:
        path: A folder or file here (parquet, pictures in folders, or what ``save_to_disk`` has
            written), or the name of a data set on the Hub.
        column: That of the pictures.
        label: That of the classes; read where ``conditional`` is true.
        split: That of the training samples.
        test_split: That of the test samples; by default ``test`` if there is one, else a part of
            ``split`` is kept, at random.
        channels: 1 (grey) or 3; by default 1 if the first pictures are all grey.
        size: Crop each picture to its central square and scale that to size x size; None leaves
            pictures as they are, and they must all have one size.
        test_size: Share (below 1) or number of samples that a random split keeps for the test.
        seed: Of a random split.
        conditional: Whether its class goes with each picture.

    Raises:
        RunError: If it cannot be had, is damaged, or lacks a column or split; says which there
            are. From reading, for a picture that is damaged or unlike the first; names its row.
        ModuleNotFoundError: Without the package.
    """
    size = None if size is None else validation.count("huggingface", "size", size)
    wanted = validation.flag("huggingface", "conditional", conditional)
    found, name = _load(path, split), Path(path).name
    test_split = test_split or ("test" if "test" in found and split != "test" else None)
    parts = [_part(path, found, key) for key in (split, test_split) if key is not None]
    mode = _mode(path, parts[0], column, channels)
    pictures = [
        _pictures(path, key, part, column, mode, size)
        for key, part in zip((split, test_split), parts, strict=False)
    ]
    labels = [_labels(path, part, label) for part in parts] if wanted else []
    if test_split is None:
        rows = split_rows(name, len(parts[0]), test_size, seed)
        pictures = [some_rows(pictures[0], part) for part in rows]
        labels = [(labels[0][0][part.numpy()], labels[0][1]) for part in rows] if wanted else []
    conds = conditions(name, labels[0][0], labels[1][0], labels[0][1]) if wanted else {}
    return Dataset(name, *pictures, levels=256, **conds)


def _load(path: str, split: str) -> Mapping[str, datasets.Dataset]:
    """The splits by name."""
    here = Path(path).expanduser()
    if not here.exists():
        _stay_offline_without_network()
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        found = _read(datasets, here) if here.exists() else datasets.load_dataset(path)
    except Exception as error:  # of many types, one for each format and for each way to fail
        why = " ".join(f"{error.__cause__ or error}".split()) or type(error).__name__
        raise RunError(
            f"huggingface: {here} cannot be read: {why}."
            if here.exists()
            else f"huggingface: there is no folder {here.absolute()}, and no data set {path!r} "
            f"can be had from the Hub ({why}). Pass data.path=FOLDER with its files."
        ) from error
    return found if hasattr(found, "keys") else {split: found}


def _read(package: ModuleType, here: Path) -> datasets.DatasetDict:
    if any((here / name).exists() for name in ("dataset_dict.json", "state.json")):
        return package.load_from_disk(str(here))
    if here.is_file():
        kind = here.suffix.removeprefix(".")
        return package.load_dataset(kind, data_files=str(here))
    return package.load_dataset(str(here))


def _stay_offline_without_network() -> None:
    """Ask the Hub once, for seconds: the package itself would try for half a minute.

    Offline it still finds what it has downloaded before. Behind a proxy nothing is asked.
    """
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if "HF_HUB_OFFLINE" in os.environ or any(os.environ.get(name) for name in proxies):
        return
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = hub.port or {"http": 80}.get(hub.scheme, 443)
    try:
        socket.create_connection((hub.hostname, port), PATIENCE).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by the package when it is imported


def _part(path: str, found: Mapping[str, datasets.Dataset], split: str) -> datasets.Dataset:
    if split not in found:
        raise RunError(
            f"huggingface: {path} has no split {split!r}; there are: {', '.join(found)}. Pass "
            "data.split=NAME or data.test_split=NAME."
        )
    return found[split]


def _feature(path: str, part: datasets.Dataset, column: str, option: str) -> object:
    if column not in part.features:
        raise RunError(
            f"huggingface: {path} has no column {column!r}; there are: "
            f"{', '.join(part.features)}. Pass data.{option}=NAME."
        )
    return part.features[column]


@dataclass(frozen=True)
class _Decoder:
    """Decodes a row; goes to other processes as the package sees to it."""

    rows: datasets.Dataset
    column: str
    mode: str
    size: int | None
    where: str

    def __call__(self, row: int) -> numpy.ndarray:
        header = read_header(self.source(row), self.called(row))
        if self.mode == "L" and not header.grey:
            raise RunError(
                f"{self.called(row)} is in colour, and the first pictures are grey; pass "
                "data.channels=3."
            )
        return read_image(self.source(row), self.mode, self.size, self.called(row))

    def source(self, row: int) -> io.BytesIO | Path:
        """The encoded picture."""
        found = self.rows[row][self.column]
        if found is None:
            raise RunError(f"{self.called(row)} holds no picture. Remove the row.")
        return Path(found["path"]) if found["bytes"] is None else io.BytesIO(found["bytes"])

    def called(self, row: int) -> str:
        """Data set and row."""
        return f"{self.where}, row {row}"


def _decoder(
    path: str,
    split: str,
    part: datasets.Dataset,
    column: str,
    mode: str,
    size: int | None,
) -> _Decoder:
    import datasets

    feature = _feature(path, part, column, "column")
    if not isinstance(feature, datasets.Image):
        raise RunError(
            f"huggingface: the column {column!r} of {path} holds {feature}, no pictures; pass "
            "data.column=NAME. Numbers are read from .npy files, with data=arrays."
        )
    rows = part.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return _Decoder(rows, column, mode, size, f"{path} ({split})")


def _mode(path: str, part: datasets.Dataset, column: str, channels: int | None) -> str:
    if channels is not None:
        count = validation.count("huggingface", "channels", channels)
        if count not in MODES:
            raise ValueError(f"huggingface needs channels to be 1 or 3; got channels={channels}.")
        return MODES[count]
    decoder = _decoder(path, "first pictures", part, column, "RGB", None)
    looked_at = range(min(LOOKED_AT, len(part)))
    grey = [
        read_header(decoder.source(row), decoder.called(row)).grey
        for row in progress(looked_at, "pictures")
    ]
    return "L" if all(grey) else "RGB"


def _pictures(path: str, split: str, part: datasets.Dataset, *how: str | int | None) -> Pictures:
    if len(part) == 0:
        raise RunError(f"huggingface: the split {split!r} of {path} is empty.")
    decoder = _decoder(path, split, part, *how)
    return Pictures.of(decoder, decoder.called, len(part))


def _labels(path: str, part: datasets.Dataset, label: str) -> tuple[numpy.ndarray, int | None]:
    """The classes [N], and how many there are where the data set says so."""
    feature = _feature(path, part, label, "label")
    if str(getattr(feature, "dtype", "")).rstrip("0123456789") not in ("int", "uint"):
        raise RunError(
            f"huggingface: the column {label!r} of {path} holds {feature}, no classes; pass "
            "data.label=NAME of a column of class labels or integers."
        )
    return numpy.array(part[label][:]), getattr(feature, "num_classes", None)

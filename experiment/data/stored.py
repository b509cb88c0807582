"""Rows of an array that stays in its file."""

from __future__ import annotations

import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy

from experiment.errors import RunError
from experiment.progress import progress

_LOCAL_HEADER = 30  # bytes in front of the name of a member of a zip archive


class NotByRow(RunError):
    """An array that is whole, but of which single samples cannot be read."""


@dataclass(frozen=True)
class StoredArray:
    """An array [N, ...] in a file, of which rows are read when they are asked for.

    They are read by position and not through a memory map: under a map, a file that is cut short
    ends the process with SIGBUS, and what was read counts as its memory. The kernel keeps the
    pages either way. Nothing is open in between, so that threads, processes and pickled copies
    need no care.

    Args:
        path: The file.
        offset: Of the first number in it, bytes.
        shape: [N, ...].
        dtype: Of the numbers.
        key: Name of the array, where the file holds several.

    Raises:
        RunError: If the file ends before the array does.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: numpy.dtype
    key: str = ""

    def __post_init__(self) -> None:
        self._check_length(os.stat(self.path).st_size)

    def __len__(self) -> int:
        return self.shape[0]

    def __str__(self) -> str:
        return f"{self.path}: the array {self.key!r}" if self.key else str(self.path)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.shape[0] * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __getitem__(self, rows: numpy.ndarray) -> numpy.ndarray:
        """Rows of increasing or any indices [B], 0..N-1, as they are in the file, [B, ...]."""
        found = numpy.empty((len(rows), *self.shape[1:]), self.dtype)
        content, size = memoryview(found.reshape(-1).view(numpy.uint8)), self._row_bytes
        with open(self.path, "rb", buffering=0) as file:
            for start, stop in _runs(rows):
                place = self.offset + int(rows[start]) * size
                self._fill(file, content[start * size : stop * size], place)
        return found

    def _fill(self, file: BinaryIO, target: memoryview, place: int) -> None:
        done = 0
        while done < len(target):
            got = os.preadv(file.fileno(), [target[done:]], place + done)
            if got == 0:
                self._check_length(os.fstat(file.fileno()).st_size)
                raise RunError(f"{self} changed while it was read. Start again.")
            done += got

    def _check_length(self, size: int) -> None:
        if size < self.offset + self.nbytes:
            whole = max(0, size - self.offset) // max(1, self._row_bytes)
            raise RunError(
                f"{self} is cut short: its header promises {self.shape[0]} samples of shape "
                f"{self.shape[1:]}, {self.nbytes} bytes, and there are "
                f"{max(0, size - self.offset)}. Sample {whole} is the first that is not whole. "
                "Write or get the file again."
            )


def _runs(rows: numpy.ndarray) -> list[tuple[int, int]]:
    """Where in ``rows`` stretches of neighbours start and stop: each is read at once."""
    if len(rows) == 0:
        return []
    breaks = (numpy.flatnonzero(numpy.diff(rows) != 1) + 1).tolist()
    return list(zip([0, *breaks], [*breaks, len(rows)], strict=True))


def stored_npy(path: Path) -> StoredArray:
    """The array of a ``.npy`` file.

    Raises:
        NotByRow: If its rows do not lie in the file one after the other.
        ValueError: If it is no such file.
    """
    with open(path, "rb") as file:
        return _stored(path, file, 0, "")


def stored_npz(path: Path) -> dict[str, StoredArray]:
    """The arrays of a ``.npz`` file, which must not be compressed; read once for its checksums.

    Raises:
        NotByRow: If one is compressed, or its rows do not lie one after the other.
        RunError: If one is damaged.
        ValueError: If it is no such file.
    """
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise NotByRow(
                    f"{path}: the array {_key(member)!r} is compressed, so that single samples of "
                    "it cannot be read. Save it with numpy.savez or numpy.save, or pass "
                    "data.lazy=false to hold all of it in memory."
                )
        for member in progress(archive.infolist(), f"checksums of {path.name}"):
            _check_sum(path, archive, member)
        return {
            _key(member): _stored(path, file, _start(file, member), _key(member))
            for member in archive.infolist()
        }


def _key(member: zipfile.ZipInfo) -> str:
    return member.filename.removesuffix(".npy")


def _check_sum(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    try:
        with archive.open(member) as content:
            while content.read(2**20):  # to the end, where the checksum is compared
                pass
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise RunError(
            f"{path}: the array {_key(member)!r} cannot be read: {error}. Get the file again."
        ) from error


def _start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where the content of a member begins: behind its local header, name and extra field."""
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER)
    lengths = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return member.header_offset + _LOCAL_HEADER + sum(lengths)


def _stored(path: Path, file: BinaryIO, place: int, key: str) -> StoredArray:
    file.seek(place)
    version = numpy.lib.format.read_magic(file)
    read = {1: numpy.lib.format.read_array_header_1_0, 2: numpy.lib.format.read_array_header_2_0}
    shape, by_column, dtype = read.get(version[0], read[2])(file)  # version 3: names in UTF-8
    if dtype.hasobject or (by_column and len(shape) > 1):
        why = "holds Python objects" if dtype.hasobject else "is stored by column (Fortran order)"
        raise NotByRow(
            f"{path} {why}, so that single samples of it cannot be read. Save "
            "numpy.ascontiguousarray(values), or pass data.lazy=false."
        )
    if not shape:
        raise RunError(f"{path} holds a single number; samples are arrays [N, ...].")
    return StoredArray(path, file.tell(), shape, dtype, key)

"""Files of every kind that the data sources read, written small."""

import gzip
import io
import os
import pickle
import struct
import tarfile

import numpy as np
from PIL import Image

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def same(tensor, values):
    """Equal in shape and in every value."""
    return tensor.shape == values.shape and bool((tensor.numpy() == values).all())


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def idx(images):
    return b"\x00\x00\x08\x03" + struct.pack(">3I", *images.shape) + images.tobytes()


def write_idx(folder, train, test, pack=True):
    for name, images in ((TRAIN, train), (TEST, test)):
        if pack:
            write(folder / f"{name}.gz", gzip.compress(idx(images), mtime=0))
        else:
            write(folder / name, idx(images))


def python2_batch(images):
    """What Python 2 wrote: byte strings as keys, and the array's bytes as one of them."""
    rows = images.reshape(len(images), -1)
    n, width = struct.pack("<H", len(rows)), struct.pack("<H", rows.shape[1])
    minus_1 = b"J\xff\xff\xff\xff"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + minus_1 * 2 + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    state = b"(K\x01M" + n + b"M" + width + b"\x86" + dtype + b"\x89T"
    state += struct.pack("<i", rows.size) + rows.tobytes() + b"tb"
    label = b"U\x0bbatch_labelU\x15training batch 1 of 5U\x06labels](K\x06K\x09e"
    return b"\x80\x02}(" + label + b"U\x04data" + array + state + b"u."


def python3_batch(images, protocol=4, text=False):
    rows = images.reshape(len(images), -1)
    record = {b"batch_label": b"batch", b"labels": [6, 9], b"data": rows, b"filenames": [b"a.png"]}
    if text:
        record = {key.decode(): value for key, value in record.items()}
    return pickle.dumps(record, protocol=protocol)


def batches(train, test, pickled=python2_batch):
    """Content of the six files by name."""
    parts = [*np.array_split(train, 5), test]
    return {name: pickled(part) for name, part in zip(BATCHES, parts, strict=True)}


def write_batches(folder, contents):
    for name, content in contents.items():
        write(folder / "cifar-10-batches-py" / name, content)


def write_archive(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        top = tarfile.TarInfo("cifar-10-batches-py")
        top.type = tarfile.DIRTYPE
        archive.addfile(top)
        for name, content in {"batches.meta": b"not read", **contents}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_npz(folder, train, test, axes=(0, 1, 2, 3)):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "cifar10.npz", train=train.transpose(axes), test=test.transpose(axes))


def sheet(images, columns):
    """Tiles of 32x32, row by row."""
    canvas = np.zeros((32 * (len(images) // columns), 32 * columns, 3), np.uint8)
    for i, image in enumerate(images):
        y, x = 32 * (i // columns), 32 * (i % columns)
        canvas[y : y + 32, x : x + 32] = image.transpose(1, 2, 0)
    return Image.fromarray(canvas)


def write_sheets(folder, train, test):
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(np.array_split(train, 2)):
        sheet(part, 3).save(folder / f"train_{i:02d}.webp", lossless=True)
    sheet(test, 2).save(folder / "test_00.webp", lossless=True)


def write_array(path, **found):
    """A .npz file, or a .npy file of the only array; object arrays by pickle, as numpy does."""
    if path.suffix == ".npz":
        np.savez(path, **found)
    else:
        np.save(path, *found.values(), allow_pickle=True)
    return path


def picture(shape, seed=0, mode=None):
    return Image.fromarray(random_bytes(*shape, seed=seed), mode)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)

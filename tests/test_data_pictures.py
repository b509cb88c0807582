"""Folders of pictures: exact values, and a clear word about what is missing or broken."""

import struct
import zlib

import numpy as np
import pytest
import torch
from data_files import picture, random_bytes, same, save, write
from PIL import Image

from experiment.data import image_folder
from experiment.errors import RunError

pytestmark = pytest.mark.usefixtures("no_data_by_chance")


def folder_of(path, image, size=None, **options):
    """The set whose four pictures are all ``image``."""
    for part in ("train", "test"):
        for name in ("a", "b"):
            save(image, path / part / f"{name}.png", **options)
    return image_folder(path, size)


@pytest.mark.parametrize(
    "suffix, options", [("png", {}), ("webp", {"lossless": True}), ("bmp", {})]
)
def test_colour_pictures_come_back_byte_for_byte_in_the_order_of_their_names(
    tmp_path, suffix, options
):
    images = random_bytes(5, 6, 4, 3)
    names = ["train/b", "train/a/z", "train/c", "test/2", "test/10"]
    for name, image in zip(names, images, strict=True):
        save(Image.fromarray(image), tmp_path / "mine" / f"{name}.{suffix}", **options)
    (tmp_path / "mine" / "train" / "notes.txt").write_text("no picture")
    data = image_folder(tmp_path / "mine")
    first = images.transpose(0, 3, 1, 2)
    assert same(data.train, first[[1, 0, 2]]) and same(data.test, first[[4, 3]])
    assert (data.name, data.levels, data.train.dtype) == ("mine", 256, torch.uint8)


def test_grey_pictures_have_one_channel(tmp_path):
    image = picture((6, 4))
    data = folder_of(tmp_path, image)
    assert same(data.train, np.stack([np.asarray(image)[None]] * 2))


def test_one_colour_picture_makes_all_of_them_rgb(tmp_path):
    grey, colour = random_bytes(5, 5), random_bytes(5, 5, 3, seed=1)
    for part in ("train", "test"):
        save(Image.fromarray(grey), tmp_path / part / "a.png")
        save(Image.fromarray(grey), tmp_path / part / "b.png")
    save(Image.fromarray(colour), tmp_path / "test" / "c.png")
    data = image_folder(tmp_path)
    assert same(data.train, np.stack([np.stack([grey] * 3)] * 2))
    assert same(data.test[2], colour.transpose(2, 0, 1))


def test_jpeg_blocks_of_one_grey_come_back_exactly(tmp_path):
    blocks = np.kron(
        random_bytes(3, 2), np.ones((8, 8), "u1")
    )  # only the mean of a block is coded
    for name in ("train/a.jpg", "train/b.JPEG", "test/a.jpeg", "test/b.JPG"):
        save(Image.fromarray(blocks), tmp_path / name, quality=100, format="JPEG")
    assert same(image_folder(tmp_path).train, np.stack([blocks[None]] * 2))


def test_transparency_is_dropped_and_the_colour_beneath_it_kept(tmp_path):
    rgba, grey = random_bytes(5, 5, 4), random_bytes(5, 5, 2)
    data = folder_of(tmp_path / "colour", Image.fromarray(rgba))
    assert same(data.train[0], rgba[..., :3].transpose(2, 0, 1))
    data = folder_of(tmp_path / "grey", Image.fromarray(grey, "LA"))
    assert same(data.train[0], grey[None, ..., 0])


def test_palettes_are_looked_up_and_single_bits_are_black_and_white(tmp_path):
    index = random_bytes(5, 5) % 4
    palette = random_bytes(4, 3, seed=1)
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    assert same(folder_of(tmp_path / "p", image).train[0], palette[index].transpose(2, 0, 1))
    bits = Image.fromarray((index > 1).astype("u1") * 255).convert("1")
    assert same(folder_of(tmp_path / "1", bits).train[0], (index[None] > 1) * 255)


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_pictures_are_turned_upright_as_their_exif_says(tmp_path, orientation, upright):
    image = random_bytes(3, 5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = folder_of(tmp_path, Image.fromarray(image), exif=exif)
    assert same(data.train[0], upright(image).transpose(2, 0, 1))


def deep_png(channels, kind):
    """A 3x3 PNG of 16 bits a channel, which Pillow can read but not write in colour."""

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    rows = random_bytes(3, 6 * channels)
    header = struct.pack(">IIBBBBB", 3, 3, 16, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\x00" + row.tobytes() for row in rows))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "channels, kind", [(1, 0), (3, 2), (2, 4), (4, 6)], ids=["L", "RGB", "LA", "RGBA"]
)
def test_pictures_of_16_bits_are_refused_by_name_not_cut_to_8(tmp_path, channels, kind):
    save(picture((3, 3, 3)), tmp_path / "a.png")
    path = write(tmp_path / "b.png", deep_png(channels, kind))
    Image.open(path).load()  # whole, as Pillow sees it
    with pytest.raises(RunError, match=f"{path} has more than 8 bits a channel; save it with 8"):
        image_folder(tmp_path)


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<f4"])
def test_the_depth_is_that_of_the_content_whatever_the_suffix_says(tmp_path, dtype):
    image = Image.fromarray(np.full((3, 3), 300, dtype))
    path = save(image, tmp_path / "a.png", format="TIFF")
    with pytest.raises(RunError, match=f"{path} has more than 8 bits a channel"):
        image_folder(tmp_path)


def test_a_size_crops_the_central_square_and_scales_it(tmp_path):
    image = random_bytes(4, 10, 3)
    for part in ("train", "test"):
        save(Image.fromarray(image), tmp_path / part / "wide.png")
        save(Image.fromarray(image.swapaxes(0, 1)), tmp_path / part / "tall.png")
    data = image_folder(tmp_path, size=4)  # scaled by 1: exact
    assert same(data.train[1], image[:, 3:7].transpose(2, 0, 1))
    assert same(data.train[0], image[:, 3:7].transpose(2, 1, 0))

    ramp = np.tile(np.arange(0, 80, 4, dtype="u1"), (8, 1))  # a filter keeps straight lines
    data = folder_of(tmp_path / "ramp", Image.fromarray(ramp), size=4)
    assert same(data.train[0, 0], np.tile(np.uint8([26, 34, 42, 50]), (4, 1)))


def test_pictures_of_two_sizes_are_refused_by_name_with_the_remedy(tmp_path):
    first = save(picture((4, 6)), tmp_path / "a.png")
    second = save(picture((5, 6)), tmp_path / "b.png")
    with pytest.raises(
        RunError, match=f"{second} is 6x5 pixels, {first} is 6x4; pass data.size=N"
    ):
        image_folder(tmp_path)


def test_a_folder_without_parts_is_split_at_random_without_loss(tmp_path):
    images = random_bytes(20, 4, 4)
    for i, image in enumerate(images):
        save(Image.fromarray(image), tmp_path / f"{i:02d}.png")
    data, again, other = (image_folder(tmp_path, test_size=0.25, seed=i) for i in (3, 3, 4))
    assert (len(data.train), len(data.test)) == (15, 5)
    assert torch.equal(data.test, again.test) and not torch.equal(data.test, other.test)
    rows = torch.cat([data.train, data.test]).flatten(1)
    assert sorted(rows.tolist()) == sorted(images.reshape(20, -1).tolist())


@pytest.mark.parametrize(
    "name, words",
    [("absent", "no folder .*absent; pass data.path=FOLDER"), ("bare", "no pictures .*png.*bare")],
)
def test_a_folder_that_is_missing_or_bare_is_named(tmp_path, name, words):
    write(tmp_path / "bare" / "notes.txt", b"")
    with pytest.raises(RunError, match=f"image_folder: {words}"):
        image_folder(tmp_path / name)


@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_a_size_is_a_whole_number_of_pixels(tmp_path, size):
    with pytest.raises(ValueError, match=f"image_folder needs size .*size={size}"):
        image_folder(tmp_path, size=size)


@pytest.mark.parametrize(
    "shape, words", [((1, 4, 4), "there are 1 samples"), ((5, 4, 4), "every value .* is 0")]
)
def test_one_picture_and_constant_pictures_are_refused(tmp_path, shape, words):
    for i in range(shape[0]):
        save(Image.new("L", shape[1:]), tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=words):
        image_folder(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.8])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_truncated_picture_is_named(tmp_path, suffix, kept):
    for i in range(5):
        path = save(picture((16, 16, 3), i), tmp_path / f"{i}.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(RunError, match=f"{path} cannot be read as a picture: ..*Repair or remove"):
        image_folder(tmp_path)

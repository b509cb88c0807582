"""Pictures that are decoded when they are asked for."""

import pickle
import threading

import pytest
import torch
from data_files import picture, random_bytes, save
from PIL import Image

from experiment.data import image_folder
from experiment.data.pictures import Pictures
from experiment.errors import RunError

pytestmark = pytest.mark.usefixtures("no_data_by_chance")


@pytest.fixture
def folder(tmp_path):
    """Twelve colour pictures, one of them grey."""
    for i, image in enumerate(random_bytes(11, 5, 4, 3)):
        save(Image.fromarray(image), tmp_path / f"{i:02d}.png")
    save(picture((5, 4), 7), tmp_path / "11.png")
    return tmp_path


@pytest.mark.parametrize("size", [None, 3])
def test_pictures_decoded_on_access_are_those_decoded_at_once(folder, size):
    lazy, held = (image_folder(folder, size, lazy=lazy, test_size=3) for lazy in (True, False))
    assert isinstance(held.train, torch.Tensor) and not isinstance(lazy.train, torch.Tensor)
    for part in ("train", "test"):
        here, there = getattr(held, part), getattr(lazy, part)
        assert here.shape == there.shape and here.dtype == there.dtype
        assert torch.equal(there[:], here)
        assert torch.equal(there[torch.tensor([2, 0, 2])], here[[2, 0, 2]])


def test_no_picture_is_decoded_but_those_asked_for(folder, monkeypatch):
    data = image_folder(folder, lazy=True, test_size=3)
    decoded, one = [], Pictures._picture
    monkeypatch.setattr(Pictures, "_picture", lambda self, i: (decoded.append(i), one(self, i))[1])
    data.train[torch.tensor([4, 1])]
    assert sorted(decoded) == sorted(data.train.indices[[4, 1]].tolist())


def test_auto_decodes_on_access_where_all_would_take_too_much(folder, monkeypatch):
    assert isinstance(image_folder(folder).train, torch.Tensor)
    monkeypatch.setattr("experiment.data.samples.LAZY_BYTES", 100)
    assert not isinstance(image_folder(folder).train, torch.Tensor)


def test_a_pickled_copy_and_threads_decode_the_same(folder):
    data = image_folder(folder, lazy=True, test_size=3)
    whole, found = data.train[:], {}
    copy = pickle.loads(pickle.dumps(data.train))

    def work(seed):
        rows = torch.randint(9, (40,), generator=torch.Generator().manual_seed(seed))
        found[seed] = torch.equal(copy[rows], whole[rows])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_a_picture_that_is_damaged_in_the_middle_of_training_is_named(folder):
    data = image_folder(folder, lazy=True, test_size=3)
    path = folder / "05.png"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=f"{path} cannot be read as a picture: .*Repair or remove"):
        data.train[:], data.test[:]
    path.unlink()
    with pytest.raises(RunError, match=f"{path} cannot be read as a picture"):
        data.train[:], data.test[:]


def test_a_picture_of_another_size_is_named_at_the_door_or_when_it_is_read(folder, monkeypatch):
    data = image_folder(folder, lazy=True, test_size=3)
    path = save(picture((6, 4, 3)), folder / "05.png")
    with pytest.raises(RunError, match=f"{path} is 4x6 pixels, .*00.png is 4x5; pass data.size=N"):
        data.train[:], data.test[:]
    monkeypatch.setattr(Pictures, "of", None)  # no picture is decoded before this is found
    with pytest.raises(RunError, match=f"{path} is 4x6 pixels, .*00.png is 4x5; pass data.size=N"):
        image_folder(folder, lazy=True)


def test_a_picture_that_its_exif_turns_is_found_when_it_is_read(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(picture((5, 4, 3)), folder / "05.png", exif=exif)
    data = image_folder(folder, lazy=True, test_size=3)  # its front has the extent of the others
    with pytest.raises(RunError, match=f"{path} is 5x4 pixels, .*00.png is 4x5"):
        data.train[:], data.test[:]

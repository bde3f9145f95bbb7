import random
import threading
import time

import pytest
from PIL import Image

from bpo_fast.answers import images as module
from bpo_fast.answers.images import unreadable_images


@pytest.fixture
def folder(tmp_path):
    """Thirty images of which the third is damaged and the fifth is gone, and one outside."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(30):
        Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(768)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    (folder / "4.png").unlink()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    return folder


def test_each_bad_image_has_its_reason(folder):
    names = [f"{number}.png" for number in range(30)]
    found = unreadable_images(folder, [*names, "../secret.png", "x" * 300, *names])
    assert list(found) == ["2.png", "4.png", "../secret.png", "x" * 300]
    assert "2.png: found a file that cannot be decoded" in found["2.png"]
    assert "4.png: found no such file, expected an image" in found["4.png"]
    assert "found a path that leaves the image folder" in found["../secret.png"]


def test_images_are_read_at_the_same_time_each_once(folder, monkeypatch):
    monkeypatch.setattr(module.os, "cpu_count", lambda: 4)
    together, read = threading.Barrier(4, timeout=20), []

    def read_image(path):
        read.append(path.name)
        together.wait()

    monkeypatch.setattr(module, "read_image", read_image)
    names = [f"{number}.png" for number in range(8)]
    assert unreadable_images(folder, names * 2) == {}
    assert sorted(read) == sorted(names)


def test_an_interrupted_check_ends_at_once(folder, monkeypatch):
    monkeypatch.setattr(module.os, "cpu_count", lambda: 1)
    read = []

    def read_image(path):
        read.append(path)
        time.sleep(0.05)

    def stop(values, **_):
        yield next(values)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "read_image", read_image)
    monkeypatch.setattr(module, "tqdm", stop)
    with pytest.raises(KeyboardInterrupt):
        unreadable_images(folder, [f"{number}.png" for number in range(30)])
    assert len(read) < 10

"""The one reader of images: paths that stay in their folder, pixels that are what the file says."""

import os

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from bpo_fast.data import load_preference_dataset, preference_row, write_pairs
from bpo_fast.data.images import image_path, read_image, upright_rgb

GREY = np.array([[0, 1000, 20000], [32896, 60000, 65535]], dtype=np.uint16)
GREY_8 = np.rint(GREY / 257).astype(np.uint8)
ANGLES = {1: 0, 3: 180, 6: -90, 8: 90}


def pixels(path):
    return np.asarray(read_image(path))


def saved(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_16_bits_become_8_and_not_white(tmp_path, name):
    found = pixels(saved(tmp_path / name, Image.fromarray(GREY)))
    assert np.array_equal(found, np.repeat(GREY_8[:, :, None], 3, axis=2))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (GREY.astype(np.int32), GREY_8),
        (np.array([[0, 7, 255]], dtype=np.int32), [[0, 7, 255]]),
        (np.array([[-10, 0, 10]], dtype=np.int32), [[0, 128, 255]]),
        (np.array([[0, 2**20, 2**21]], dtype=np.int32), [[0, 128, 255]]),
        (np.array([[2**20, 2**20]], dtype=np.int32), [[0, 0]]),
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [[0, 128, 255]]),
        (np.array([[0.0, 7.4, 255.0]], dtype=np.float32), [[0, 7, 255]]),
        (GREY.astype(np.float32), GREY_8),
    ],
    ids=["16 bits", "8 bits", "signed", "21 bits", "even", "share", "float of 8 bits", "float of 16 bits"],
)
def test_numbers_of_32_bits_are_scaled_by_what_holds_them(tmp_path, values, expected):
    found = pixels(saved(tmp_path / "grey.tif", Image.fromarray(values)))
    assert np.array_equal(found[:, :, 0], expected)
    assert np.array_equal(found[:, :, 0], found[:, :, 2])


def test_what_is_transparent_lies_on_white(tmp_path):
    rgba = np.array([[[200, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    expected = [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert pixels(saved(tmp_path / "a.png", Image.fromarray(rgba))).tolist() == expected
    grey = Image.fromarray(np.array([[[90, 255], [0, 0]]], dtype=np.uint8), mode="LA")
    assert pixels(saved(tmp_path / "la.png", grey)).tolist() == [[[90] * 3, [255] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    assert pixels(saved(tmp_path / "p.png", palette, transparency=1)).tolist() == [[[10, 20, 30], [255] * 3]]
    assert pixels(saved(tmp_path / "q.png", palette, transparency=b"\xff\x00")).tolist() == [[[10, 20, 30], [255] * 3]]


def test_other_modes(tmp_path):
    cmyk = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert pixels(saved(tmp_path / "a.tif", cmyk)).tolist() == [[[255, 0, 0]]]
    assert pixels(saved(tmp_path / "b.png", Image.new("1", (1, 1), 1))).tolist() == [[[255, 255, 255]]]
    frames = [Image.new("RGB", (1, 1), color) for color in ("red", "blue")]
    path = saved(tmp_path / "c.gif", frames[0], save_all=True, append_images=frames[1:])
    assert pixels(path).tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize("orientation", ANGLES)
@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_images_are_upright_whatever_their_mode(tmp_path, orientation, mode):
    image = Image.fromarray(GREY if mode == "I;16" else GREY_8)
    exif = image.getexif()
    exif[0x0112] = orientation
    found = pixels(saved(tmp_path / "turned.png", image, exif=exif))
    expected = np.asarray(Image.fromarray(GREY_8).rotate(ANGLES[orientation], expand=True))
    assert np.array_equal(found[:, :, 0], expected)


def test_a_second_time_changes_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    once = read_image(saved(tmp_path / "a.png", Image.fromarray(GREY), exif=exif))
    assert np.array_equal(np.asarray(upright_rgb(once)), np.asarray(once))


def test_a_data_set_gives_what_the_reader_gives(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    saved(tmp_path / "0.png", Image.fromarray(GREY), exif=exif)
    saved(tmp_path / "1.png", Image.fromarray(np.array([[[9, 9, 9, 0]]], dtype=np.uint8)))
    write_pairs(tmp_path / "pairs.jsonl", [preference_row(f"{n}.png", "q", "good", "bad") for n in range(2)])
    dataset = load_preference_dataset(tmp_path / "pairs.jsonl")
    for kept in (dataset, dataset.select([0, 1]).map(lambda row: {"more": 1}), Dataset.from_list(list(dataset))):
        for number in range(2):
            (image,) = kept[number]["images"]
            assert np.array_equal(np.asarray(image), pixels(tmp_path / f"{number}.png"))
    dataset.save_to_disk(tmp_path / "saved")
    (image,) = load_preference_dataset(tmp_path / "saved")[0]["images"]
    assert np.array_equal(np.asarray(upright_rgb(image)), pixels(tmp_path / "0.png"))


def test_damaged_files_are_named(tmp_path, monkeypatch):
    noise = Image.effect_noise((64, 64), 50)
    for name in ("cut.png", "cut.jpg", "cut.tif", "cut.gif", "cut.webp", "cut.bmp"):
        noise.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    saved(tmp_path / "nan.tif", Image.fromarray(np.array([[np.nan]], dtype=np.float32)))
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=rf"{path.name}: found a file that cannot be decoded \(.*\), expected an"):
            read_image(path)
    with pytest.raises(ValueError, match=r"none\.png: found no such file, expected an image"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"a\.png: found a file that cannot be decoded \(.*name too long"):
        read_image(tmp_path / f"{'a' * 300}.png")
    saved(tmp_path / "large.png", noise)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(ValueError, match=r"large\.png: found a file that cannot be decoded \(Image size \(4096 pixel"):
        read_image(tmp_path / "large.png")


def test_paths_that_stay_in_the_folder(tmp_path):
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "a" / "1.png").touch()
    (root / "link.png").symlink_to("a/1.png")
    (tmp_path / "root").symlink_to(root)
    for name in ("a/1.png", "link.png", "a/../a/1.png", "none.png", str(root / "a/1.png")):
        for folder in (root, tmp_path / "root", os.path.relpath(root)):
            assert image_path(folder, name).exists() == (name != "none.png")


@pytest.mark.parametrize(
    "name", ["../out.png", "a/../../out.png", "{out}", "link.png", "linked/out.png", "/etc/hostname"]
)
def test_paths_that_leave_the_folder(tmp_path, name):
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "images-too").mkdir()
    (tmp_path / "out.png").touch()
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "linked").symlink_to(tmp_path)
    with pytest.raises(
        ValueError, match=r"^image '.*': found a path that leaves the image folder '.*', expected one i"
    ):
        image_path(root, name.format(out=tmp_path / "images-too" / "1.png"))


@pytest.mark.parametrize("name", [None, 3, "", " ", ["1.png"], "nul\0.png", "half\ud83d.png"])
def test_what_is_no_path(name):
    with pytest.raises(ValueError, match=r"^image: found .*, expected .* of an image\.$"):
        image_path("images", name)

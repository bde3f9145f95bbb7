"""Each image once, whatever it is kept as; what cannot be shown has a reason."""

import errno
import io
import os

import pytest
from PIL import Image

from bpo_fast.report.browse.thumbnails import Thumbnails


def encoded(size, color, **options):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, **{"format": "PNG"} | options)
    return stream.getvalue()


@pytest.fixture
def files(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "red #1?.png").write_bytes(encoded((640, 320), "red"))
    (tmp_path / "in" / "blue.jpg").write_bytes(encoded((30, 60), "blue", format="JPEG"))
    return tmp_path / "in", tmp_path / "out"


def test_files_and_bytes_become_small_jpegs_and_small_images_stay_as_they_are(files):
    source, out = files
    images = [str(source / "red #1?.png"), {"path": str(source / "blue.jpg"), "bytes": None}]
    images.append({"path": "x.png", "bytes": encoded((400, 1600), "lime")})
    with Thumbnails(out, 160) as thumbnails:
        red, blue, lime = thumbnails.show(images)
    assert [(each["width"], each["height"]) for each in (red, blue, lime)] == [(160, 80), (30, 60), (40, 160)]
    for shown, color in ((red, (254, 0, 0)), (blue, (0, 0, 254)), (lime, (0, 255, 1))):
        with Image.open(out / shown["src"]) as image:
            assert (image.format, image.size) == ("JPEG", (shown["width"], shown["height"]))
            assert all(abs(a - b) <= 2 for a, b in zip(image.getpixel((5, 5)), color, strict=True))
    assert (red["file"], red["name"]) == ("../in/red%20%231%3F.png", "red #1?.png")
    assert (lime["name"], "file" in lime) == ("x.png", False)


def test_a_thumbnail_is_turned_as_its_image_says(files):
    source, out = files
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (source / "turned.jpg").write_bytes(encoded((800, 400), "red", format="JPEG", exif=exif))
    with Thumbnails(out, 100) as thumbnails:
        (shown,) = thumbnails.show([str(source / "turned.jpg")])
    assert (shown["width"], shown["height"]) == (50, 100)


def test_an_image_is_made_once_and_again_only_when_it_changes(files, monkeypatch):
    source, out = files
    path, content = str(source / "blue.jpg"), {"path": None, "bytes": encoded((9, 9), "red")}
    with Thumbnails(out, 100) as thumbnails:
        first = thumbnails.show([path, content, path])
        assert thumbnails.show([dict(content), path]) == [first[1], first[0]]
        assert len(thumbnails) == 2
    saved = []
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda *args, **options: saved.append(1) or save(*args, **options))
    with Thumbnails(out, 100) as thumbnails:
        assert thumbnails.show([path, content, path]) == first
    assert saved == []
    # What a crash of the machine has emptied is made again.
    (out / first[0]["src"]).write_bytes(b"")
    with Thumbnails(out, 100) as thumbnails:
        assert thumbnails.show([path]) == first[:1]
    assert len(saved) == 1
    os.utime(path, (1, 1))
    with Thumbnails(out, 100) as thumbnails:
        (changed,) = thumbnails.show([path])
        assert changed["src"] != first[0]["src"]
        thumbnails.remove_others()
    assert [each.relative_to(out).as_posix() for each in out.glob("thumbnails/*/*")] == [changed["src"]]


def test_an_image_that_cannot_be_shown_has_its_reason_and_is_counted_once(files):
    source, out = files
    (source / "cut.png").write_bytes(encoded((99, 99), "red")[:60])
    images = [str(source / "cut.png"), {"path": None, "bytes": b"none"}, str(source / "gone.png")]
    images += [{"path": None, "bytes": None}, str(source / "cut.png")]
    with Thumbnails(out, 100) as thumbnails:
        cut, embedded, gone, nothing, again = thumbnails.show(images)
    assert cut == again
    assert f"{source / 'cut.png'}: found a file that cannot be decoded" in cut["reason"]
    assert embedded["reason"].startswith("embedded image: found a file that cannot be decoded")
    assert gone == {"name": "gone.png", "reason": f"{source / 'gone.png'}: found no such file, expected an image."}
    assert nothing["reason"] == "image: found neither a path nor bytes, expected one of them."
    assert sorted(thumbnails.reasons.values()) == sorted({each["reason"] for each in (cut, embedded, gone, nothing)})


def test_a_full_disk_is_no_fault_of_the_image(files, monkeypatch):
    source, out = files

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "x.tmp")

    monkeypatch.setattr(Image.Image, "save", full)
    with Thumbnails(out, 100) as thumbnails, pytest.raises(OSError, match="No space left on device"):
        thumbnails.show([str(source / "blue.jpg")])


def test_files_may_be_linked_and_embedded_images_cannot(files):
    source, out = files
    with Thumbnails(out, 100, link=True) as thumbnails:
        images = [str(source / "blue.jpg"), {"path": "y.png", "bytes": encoded((200, 100), "red")}]
        linked, embedded, gone = thumbnails.show([*images, str(source / "gone.jpg")])
    assert linked == {"name": "blue.jpg", "file": "../in/blue.jpg", "src": "../in/blue.jpg"}
    assert (out / embedded["src"]).is_file()
    assert "found no such file" in gone["reason"]

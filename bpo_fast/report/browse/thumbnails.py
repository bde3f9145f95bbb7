"""Thumbnails of images, each made once."""

import hashlib
import os
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from bpo_fast.data.images import read_image

_QUALITY = 80  # of JPEG
_MAX_THREADS = 16


class Thumbnails:
    """Thumbnails below a folder, by image.

    An image file is known by its path, size and time of change, embedded bytes by what they hold: images that are in
    the folder already, from an earlier run, are not read again. Decoding, scaling and writing leave Python's lock, so
    threads share the work.

    Args:
        folder: where thumbnails lie, in `thumbnails/`; the paths of `show` start here.
        size: pixels of the longer side at most.
        link: show image files themselves; embedded images are thumbnails all the same.

    Attributes:
        reasons: image -> why it cannot be shown.
    """

    def __init__(self, folder: str | os.PathLike, size: int, *, link: bool = False):
        self.folder, self.size, self.link = Path(folder), size, link
        self.reasons: dict[Hashable, str] = {}
        self._made: dict[Hashable, dict[str, Any]] = {}
        self._threads = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))

    def __enter__(self) -> "Thumbnails":
        return self

    def __exit__(self, *error) -> None:
        self._threads.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return len(self._made)

    def show(self, images: Iterable[Mapping[str, Any] | str]) -> list[dict[str, Any]]:
        """What the page needs to show each of some images.

        Args:
            images: paths, or {bytes, path} as `datasets` keeps an image.

        Returns:
            The `name` of each; its `src` with `width` and `height` of a thumbnail, and `file`, the image itself, where
            there is one; of an image that cannot be shown the `reason`.
        """
        images = [{"path": image, "bytes": None} if isinstance(image, str) else image for image in images]
        keys = [_key(image) for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._made}
        self._made |= zip(new, self._threads.map(self._show, new, new.values()), strict=True)
        return [self._made[key] for key in keys]

    def remove_others(self) -> None:
        """Remove the thumbnails that `show` was not asked for."""
        wanted = {image.get("src") for image in self._made.values()}
        for path in self.folder.glob("thumbnails/*/*"):
            if path.relative_to(self.folder).as_posix() not in wanted:
                path.unlink()

    def _show(self, key, image):
        path, content = image.get("path"), image.get("bytes")
        name = os.path.basename(path or "") or "embedded image"
        shown = {"name": name}
        try:
            if content is None:
                if not path:
                    raise ValueError("image: found neither a path nor bytes, expected one of them.")
                shown["file"] = quote(os.fsencode(os.path.relpath(path, self.folder)))
                if self.link:
                    if not os.path.isfile(path):
                        raise ValueError(f"{path}: found no such file, expected an image.")
                    return shown | {"src": shown["file"]}
            return shown | self._thumbnail(key, path if content is None else content, name)
        except ValueError as error:  # of the image; that a thumbnail cannot be written is another matter
            self.reasons[key] = str(error)
            return {"name": name, "reason": str(error)}

    def _thumbnail(self, key, source, image_name):
        name = hashlib.blake2b(repr((key, self.size, _QUALITY)).encode(), digest_size=16).hexdigest()
        thumbnail = self.folder / "thumbnails" / name[:2] / f"{name}.jpg"
        try:
            with Image.open(thumbnail) as kept:
                size = kept.size
        except OSError:  # none yet, or one that a crash of the machine has emptied
            image = read_image(source, image_name, least=self.size)
            image.thumbnail((self.size, self.size), reducing_gap=2)
            thumbnail.parent.mkdir(parents=True, exist_ok=True)
            temporary = thumbnail.with_suffix(".tmp")
            image.save(temporary, "JPEG", quality=_QUALITY)
            os.replace(temporary, thumbnail)
            size = image.size
        return {"src": thumbnail.relative_to(self.folder).as_posix(), "width": size[0], "height": size[1]}


def _key(image):
    """What an image is known by."""
    if image.get("bytes") is not None:
        return hashlib.blake2b(image["bytes"], digest_size=16).hexdigest()
    try:
        status = os.stat(image["path"])
    except (OSError, TypeError, ValueError):
        return image.get("path"), None, None
    return image["path"], status.st_size, status.st_mtime_ns

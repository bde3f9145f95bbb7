"""Images decoded by as many threads as there are cores: all before a model is loaded, or a few ahead of it."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from PIL import Image
from tqdm.auto import tqdm

from bpo_fast.data.images import image_path, read_image


def unreadable_images(image_folder: str | os.PathLike, names: Iterable[str]) -> dict[str, str]:
    """Decode every image, as many at a time as the machine has cores.

    Args:
        image_folder: folder that the names start from.
        names: paths below it; one that occurs again is read once.

    Returns:
        Name -> what is wrong with it, for those that are missing, damaged or outside the folder.
    """
    names = list(dict.fromkeys(names))

    def fault(name):
        try:
            read_image(image_path(image_folder, name))
        except ValueError as error:
            return str(error)

    pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1))
    try:
        found = tqdm(pool.map(fault, names), total=len(names), unit="image", desc="images", leave=False)
        return {name: reason for name, reason in zip(names, found, strict=True) if reason}
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted check ends with the images that are being read


def read_ahead(
    images: Iterable[str | os.PathLike | bytes | ValueError], ahead: int
) -> Iterator[Image.Image | ValueError]:
    """Decode images in order, `ahead` of them beyond the one that is asked for.

    Args:
        images: of each its file's path or content, or why it has none.
        ahead: how many are decoded, and in memory, before they are asked for.

    Yields:
        Each image, or the error that says why it cannot be read.
    """

    def read(image):
        try:
            return image if isinstance(image, ValueError) else read_image(image)
        except ValueError as error:
            return error

    images = iter(images)
    pool = ThreadPoolExecutor(min(ahead, os.cpu_count() or 1))
    try:
        waiting = deque(pool.submit(read, image) for image in islice(images, ahead))
        while waiting:
            image = waiting.popleft().result()
            waiting.extend(pool.submit(read, image) for image in islice(images, 1))
            yield image
    finally:
        pool.shutdown(cancel_futures=True)

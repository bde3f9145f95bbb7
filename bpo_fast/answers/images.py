"""Which images can be read, found out before there is a model to wait for."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

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

"""The folder of a page: its data in files that a page may load from the disk, and the page itself last.

    index.html          summary, style and scripts; names the folder of its data
    data-DIGEST/        index.js: what pairs are sorted and filtered by; texts-00000.js ...: what they say, in order
    thumbnails/XX/      a JPEG an image, however many pairs show it

The page is whole at any moment: data are written under another name, the page that shows them takes the place of the
former one in one step, and only then are the former's data removed. A killed run leaves its thumbnails, for the next.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from bpo_fast.report.browse.document import document
from bpo_fast.report.browse.index import Index
from bpo_fast.report.browse.records import Record, to_record
from bpo_fast.report.browse.thumbnails import Thumbnails
from bpo_fast.runs.files import json_text, replacing, writing
from bpo_fast.runs.folder import claim_folder, locked_folder

PAGE_FILE = "index.html"
# Pairs in a file of texts. A screen shows twenty, in any order: from large files it would read much for little, and
# a search reads all files, each at a cost of its own.
PAIRS_A_FILE = 256
_RECORD = "browse.json"  # tells a folder that may be written again
_UNFINISHED = "data.unfinished"


def write_browser(
    rows: Iterable[Mapping[str, Any]],
    output_dir: str | os.PathLike,
    *,
    name: str,
    total: int | None = None,
    thumbnail_size: int = 320,
    link_images: bool = False,
    left_out: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Write pairs as a page, `output_dir/index.html`; one that is there already is replaced.

    Args:
        rows: TRL's columns `images` (paths, or {bytes, path}), `prompt`, `chosen` and `rejected` (texts or messages);
            `id`, `rejected_type`, `variant`, `source`, `chosen_logp`, `rejected_logp` where they are known; any other
            column is shown as it is. Read once, and never held together.
        output_dir: folder of the page alone.
        name: of the data set, for the page's heading.
        total: number of rows, for the time left.
        thumbnail_size: pixels of a thumbnail's longer side.
        link_images: show image files where they lie, and make no thumbnails of them.
        left_out: why records gave no pair -> how many.

    Returns:
        Counts: `pairs`, `images`, and `unreadable` images.

    Raises:
        ValueError: `output_dir` holds something else, or there is no row.
        OSError: it cannot be written.
    """
    with locked_folder(output_dir) as folder:
        claim_folder(folder, {"command": "browse"}, record=_RECORD)
        unfinished = folder / _UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        with writing(folder, unfinished), Thumbnails(folder, thumbnail_size, link=link_images) as thumbnails:
            unfinished.mkdir()
            try:
                index = Index()
                bar = tqdm(rows, total=total, desc="browse", unit=" pairs")
                digest = _write_data(unfinished, map(to_record, bar, range(2**63)), thumbnails, index)
                if not len(index):
                    raise ValueError("dataset: found no pairs, expected at least one.")
                data = folder / f"data-{digest}"
                if not data.exists():
                    unfinished.rename(data)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            counts = {"pairs": len(index), "images": len(thumbnails), "unreadable": len(thumbnails.reasons)}
            with replacing(folder / PAGE_FILE) as file:
                file.write(document(name, data.name, index, counts, left_out or {}))
            for other in folder.glob("data-*"):
                if other != data:
                    shutil.rmtree(other)
            thumbnails.remove_others()
    return counts


def _write_data(folder: Path, records: Iterator[Record], thumbnails: Thumbnails, index: Index) -> str:
    """The files of the pairs; a digest of what they hold."""
    digest = hashlib.blake2b(digest_size=8)

    def write(name, call):
        digest.update(call.encode())
        with replacing(folder / name) as file:
            file.write(call)

    number = 0
    while batch := list(islice(records, PAIRS_A_FILE)):
        shown = iter(thumbnails.show([image for record in batch for image in record.images]))
        texts = []
        for record in batch:
            images = list(islice(shown, len(record.images)))
            index.add(record, unreadable=any("reason" in image for image in images))
            texts.append({"images": images, **record.texts})
        # A page opened from the disk may load scripts and nothing else. JSON in a string is read faster than literals,
        # and its keys are but keys.
        write(f"texts-{number:05}.js", f"bpoTexts({number}, {json_text(json_text(texts))});\n")
        number += 1
    write("index.js", f"bpoIndex({json_text(json_text(index.as_json() | {'pairsAFile': PAIRS_A_FILE}))});\n")
    return digest.hexdigest()

"""Writes a page of the paper's 167,710 pairs and opens it: `python tests/large_page.py`.

Pairs are drawn, with about 100 words a response; images are files of 640 x 480 pixels, each of which is decoded though
few differ. Says how long writing took, how much memory and disk it needed, and how long the browser took to show the
page, to sort, to filter, to search all texts and to turn to a page.
"""

import argparse
import os
import random
import resource
import tempfile
import time
from pathlib import Path

from headless import headless, open_page, settle
from PIL import Image

from bpo_fast.data.formats import preference_row
from bpo_fast.report.browse import write_browser

KINDS = {"image_weakened": ("300", "500", "700"), "error_injected": ("object", "count", "color"), "m3po": ("",)}
SOURCES = ("llava_instruct", "sharegpt4v", "llavar")
DIFFERENT = 200  # images that differ; the others are further names of theirs


def make_images(folder, number):
    """Paths of images, which cost what photographs of this size cost to decode."""
    folder.mkdir()
    rng = random.Random(0)
    for count in range(min(number, DIFFERENT)):
        small = Image.frombytes("RGB", (80, 60), rng.randbytes(80 * 60 * 3))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{count}.jpg", quality=90)
    for count in range(DIFFERENT, number):
        os.link(folder / f"{count % DIFFERENT}.jpg", folder / f"{count}.jpg")
    return [str(folder / f"{count}.jpg") for count in range(number)]


def make_rows(number, images):
    rng = random.Random(1)
    words = ["".join(rng.choices("aeioulnrst", k=rng.randint(2, 9))) for _ in range(5000)]
    for count in range(number):
        chosen = rng.choices(words, k=rng.randint(40, 160))
        cut = rng.randrange(len(chosen))
        rejected = chosen[:cut] + rng.choices(words, k=rng.randint(1, 100)) + chosen[cut + rng.randint(1, 40) :]
        kind = rng.choice(list(KINDS))
        texts = " ".join(rng.choices(words, k=12)), " ".join(chosen), " ".join(rejected)
        extra = {"id": f"{count:012}", "rejected_type": kind, "variant": rng.choice(KINDS[kind]), "seed": 0}
        extra |= {"source": rng.choice(SOURCES), "chosen_logp": rng.gauss(-90, 9), "rejected_logp": rng.gauss(-95, 9)}
        extra |= {"rejected_truncated": False, "details": '{"step": 500, "schedule": "sigmoid", "target": "features"}'}
        yield preference_row(images[count % len(images)], *texts, **extra)


def size(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in paths) / 1e6, len(paths)


def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(browser, change):
    """Seconds from a change of the page's state to the end of its drawing, by the page's own clock."""
    script = f"""
    const [report] = arguments, began = performance.now();
    {change};
    const wait = () => hashOf(state) !== hashOf({{ ...readHash(), page: state.page }}) || read < 1
      || document.getElementById("list").ariaBusy === "true"
      ? setTimeout(wait, 1) : requestAnimationFrame(() => report((performance.now() - began) / 1000));
    setTimeout(wait, 1);
    """
    browser.set_script_timeout(120)
    return browser.execute_async_script(script)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=167_710)
    parser.add_argument("--images", type=int, default=80_000)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        images = make_images(folder / "images", options.images)
        began = time.process_time()
        for _ in make_rows(options.pairs, images):
            pass
        making = time.process_time() - began
        for run in ("first", "with the thumbnails of before"):
            before, began, used = resident(), time.perf_counter(), time.process_time()
            write_browser(make_rows(options.pairs, images), folder / "page", name="drawn pairs", total=options.pairs)
            seconds, used = time.perf_counter() - began, time.process_time() - used
            print(
                f"written ({run}): {seconds:.1f} s, {used - making:.1f} s of a processor beside {making:.1f} s for "
                f"drawing the pairs; peak of memory {resident():.0f} MiB, {resident() - before:.0f} of them new",
                flush=True,
            )
        for part in ("data-*", "thumbnails"):
            (path,) = (folder / "page").glob(part)
            megabytes, files = size(path)
            print(f"{path.name}: {megabytes:,.1f} MB in {files:,} files")
        with headless() as browser:
            began = time.perf_counter()
            open_page(browser, folder / "page" / "index.html")
            shown = time.perf_counter() - began
            paint = browser.execute_script("return performance.getEntriesByType('paint').at(-1).startTime / 1000")
            print(f"first paint {paint:.2f} s, all there {shown:.2f} s (as the driver sees it)")
            changes = {
                "sort by gap": "go({ sort: 'gap' })",
                "sort by length": "go({ sort: 'length' })",
                "turn round": "go({ sort: 'length', descending: true })",
                "filter by kind": "go({ kind: 'm3po' })",
                "and by source": "go({ source: 'llavar' })",
                "last page": "go({ page: 10 ** 9 })",
                "no filter": "go(INITIAL)",
                "search, the first": "go({ query: 'zzz' })",
                "search, the second": "go({ query: 'tas' })",
                "search and sort": "go({ query: 'tas tel', sort: 'gap' })",
                "differences in one text": "go({ together: true })",
            }
            for name, change in changes.items():
                seconds = timed(browser, change)
                print(f"{name}: {seconds:.2f} s, {browser.find_element('id', 'count').text}", flush=True)
            settle(browser)
            heap = browser.execute_script("return performance.memory.usedJSHeapSize / 1e6")
            print(f"memory of the page: {heap:.0f} MB of JavaScript")


if __name__ == "__main__":
    main()

"""Peak memory of reading and drawing at 1 thousand and at 1 million records: `python tests/memory.py`.

A measurement is a process of its own, which does its work on a file of so many records and prints the most memory that
it held (VmHWM; files that are mapped count). The records have LLaVA-Instruct's shape, two questions each and texts of
their own. "iterate" passes over the samples of the source, "draw" draws a third of as many and reads every 1,000th
again, "skip" draws from records of which 99 in 100 are left out. More than 200 MiB between both sizes ends the script
with code 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 200  # MiB
SIZES = (1_000, 1_000_000)
FILES = ("records.json", "records.jsonl", "records.parquet", "saved")
WORK = ("iterate", "draw", "skip")
WORDS = ("red", "blue", "a circle", "a square", "left of", "right of", "above", "two", "three", "dark", "with", "and")


def records(count):
    for number in range(count):
        text = " ".join(WORDS[(number * step + 7) % len(WORDS)] for step in range(1, 30))
        turns = [f"<image>\nWhat is in image {number}?", f"{text} {number}.", f"And not in {number}?"]
        turns.append(f"Nothing {number}." if number % 100 == 0 else f"Nothing but {text} in {number}.")
        speakers = ("human", "gpt", "human", "gpt")
        said = [{"from": speaker, "value": value} for speaker, value in zip(speakers, turns, strict=True)]
        yield {"id": f"{number:012}", "image": "1.png", "conversations": said}


def write(path, count):
    if path.suffix in (".json", ".jsonl"):
        start, between, end = ("[", ", ", "]") if path.suffix == ".json" else ("", "\n", "\n")
        with path.open("w") as file:
            for number, record in enumerate(records(count)):
                file.write((between if number else start) + json.dumps(record))
            file.write(end)
        return
    from datasets import Dataset

    made = Dataset.from_generator(records, gen_kwargs={"count": count}, cache_dir=str(path.parent / "made"))
    if path.suffix == ".parquet":
        made.to_parquet(str(path))
    else:
        made.save_to_disk(str(path))


def measure(work, path, count):
    """The work of one process; prints samples, seconds and MiB."""
    from bpo_fast.data.annotations import Annotation
    from bpo_fast.data.mixture import read_sources
    from bpo_fast.data.sources import Source

    samples = count // 3 if work == "draw" else None
    source = Source(name="it", annotations=path, image_folder=path.parent, turns="split", samples=samples)
    start = time.perf_counter()
    if work == "iterate":
        found = 0
        for number, (_, record) in enumerate(source.open()):
            found += sum(isinstance(each, Annotation) for each in source.samples_of(record, number, None))
    else:
        selected = read_sources([source], max_response_words=10 if work == "skip" else 350).samples
        found = len(selected)
        assert all(selected[index].id for index in range(0, found, 1_000))
    seconds = time.perf_counter() - start
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(found, round(seconds, 1), int(peak) // 1024)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        work, path, count = options.measure
        measure(work, Path(path), int(count))
        return 0
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": folder}
        for name in options.files:
            for count in SIZES:
                path = Path(folder, str(count), name)
                path.parent.mkdir(exist_ok=True)
                Image.new("RGB", (4, 4)).save(path.parent / "1.png")
                write(path, count)
            for work in WORK:
                peaks = []
                for count in SIZES:
                    line = [sys.executable, __file__, "--measure", work, f"{folder}/{count}/{name}", str(count)]
                    out = subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout
                    found, seconds, peak = out.split()[-3:]
                    peaks.append(int(peak))
                    print(f"{work} {name}, {count:,} records: {peak} MiB, {found} samples, {seconds} s", flush=True)
                wrong += peaks[1] - peaks[0] > LIMIT
                print(f"{work} {name}: {peaks[1] - peaks[0]} MiB more", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

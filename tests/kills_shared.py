"""Kills processes that share a bootstrap at random moments: `python tests/kills_shared.py`.

A small world is bootstrapped by one process, undisturbed. Then several processes share the work, or a local Ray
cluster of two workers does; one of them, drawn at random, is killed by SIGKILL at a random moment, and so on until the
kills are used up. A killed process is started again, a killed Ray worker is Ray's to replace. Every file that a run
leaves must hold the bytes of the undisturbed run, its journals as many responses as there are: what was written before
a kill is not made again. Any difference ends the script with code 1.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import shared_run
from kills import NUM_RECORDS, ROOT, RUN, make_larger_world

RECIPE = """
model_name_or_path: model
image_folder: images
bootstrap: {annotations: data.json, max_new_tokens: 48, batch_size: 2, rows_per_part: 8, max_repetition: null}
"""
OWN_FILES = ("metadata.json", "manifest.json", "README.md", "skipped.jsonl", "data/*.parquet", "parts/*.json")
KILLS_A_RUN = 4


def start(world, out, *options):
    """One `bpo-fast bootstrap` as a process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["RAY_AUTH_MODE"] = "disabled"
    line = [sys.executable, "-c", RUN, "bootstrap", "--config", "run.yaml", "--output_dir", out, *options]
    with (world / "stderr").open("a") as stderr:
        return subprocess.Popen(line, cwd=world, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)


def contents(folder):
    """Name -> bytes of what a run leaves, its journals aside."""
    paths = [path for pattern in OWN_FILES for path in folder.glob(pattern)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def journaled(folder):
    """How many responses the journals hold, and how many different ones."""
    lines = [line for path in folder.glob("parts/*.jsonl") for line in path.read_text().splitlines()]
    keys = [json.loads(line)["key"] for line in lines if line.endswith("}")]
    return len(keys), len(set(keys))


def ray_workers(driver):
    """The processes of a driver's cluster that make parts."""
    try:
        children = psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    found = []
    for child in children:
        try:
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::MapWorker"):
                found.append(child)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def share(world, out, count, kills, rng, duration):
    """Processes that share a run, of which some are killed and started again; what went wrong, and the kills."""
    processes, sent = [start(world, out) for _ in range(count)], 0
    while sent < kills:
        time.sleep(rng.uniform(0, duration))
        alive = [process for process in processes if process.poll() is None]
        if not alive:
            break
        victim = rng.choice(alive)
        victim.kill()
        victim.wait()
        sent += 1
        print(f"{out}: killed one of {len(alive)} with {journaled(world / out)[0]} responses written", flush=True)
        processes[processes.index(victim)] = start(world, out)
    statuses = [process.wait() for process in processes]
    return [f"{out}: a process ended with status {status}" for status in statuses if status], sent


def cluster(world, out, kills, rng, longest):
    """A run on a local Ray cluster, of whose workers some are killed; what went wrong, and the kills."""
    driver, sent, before = start(world, out, "--ray", "local", "--ray_workers", "2"), 0, 0
    while driver.poll() is None and sent < kills:
        # A worker takes many seconds to start, and to kill it then is to learn nothing.
        if journaled(world / out)[0] == before:
            time.sleep(0.05)
            continue
        time.sleep(rng.uniform(0, longest))
        before = journaled(world / out)[0]
        if workers := ray_workers(driver):
            try:
                rng.choice(workers).send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
            sent += 1
            print(
                f"{out}: killed one of {len(workers)} with {journaled(world / out)[0]} responses written", flush=True
            )
    status = driver.wait()
    return [f"{out}: ended with status {status}"] if status else [], sent


def forks(kills, seed):
    """Kills of processes that take no time to start and ask no model, so that each hits the sharing itself."""
    wrong, left, number = [], kills, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        records = shared_run.make_samples(folder)
        shared_run.run(folder, "one", records)
        wanted = shared_run.contents(folder / "one")
        while left > 0:
            out, count = f"killed-{number}", (2, 5)[number % 2]
            statuses = shared_run.kill_at_random(folder, out, records, count, min(left, 10), seed + number)
            if any(statuses) or shared_run.contents(folder / out) != wanted:
                wrong.append(f"{out}: other files than the undisturbed run's, statuses {statuses}")
            left, number = left - 10, number + 1
    print(f"forks: {kills} killed in {number} runs, {len(wrong)} differences", flush=True)
    return wrong


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 5])
    parser.add_argument("--ray", type=int, default=1, help="0 leaves it out")
    parser.add_argument("--forks", type=int, default=200, help="kills of processes that only share, without a model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng, wrong = random.Random(options.seed), forks(options.forks, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        make_larger_world(world)
        (world / "run.yaml").write_text(RECIPE)
        began = time.perf_counter()
        if start(world, "whole").wait():
            print((world / "stderr").read_text())
            return 1
        duration = time.perf_counter() - began
        wanted = contents(world / "whole")
        print(f"undisturbed: {duration:.1f} s, {len(wanted)} files, {journaled(world / 'whole')[0]} responses")
        ways = [*options.processes, *(["ray"] if options.ray else [])]
        for way in ways:
            sent, number = 0, 0
            while sent < options.kills:
                out, kills = f"{way}-{number}", min(KILLS_A_RUN, options.kills - sent)
                if way == "ray":
                    faults, killed = cluster(world, out, kills, rng, 1.0)
                else:
                    faults, killed = share(world, out, way, kills, rng, duration)
                found = contents(world / out)
                names = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
                wrong += [*faults, *(f"{out}/{name} differs from the undisturbed run's" for name in names)]
                total, different = journaled(world / out)
                if not total == different == NUM_RECORDS - 1:
                    wrong.append(f"{out}: {total} responses in its journals, {different} different ones")
                sent, number = sent + killed, number + 1
            print(f"{way}: {sent} killed in {number} runs, {len(wrong)} differences so far", flush=True)
        if wrong:
            print((world / "stderr").read_text()[-4000:])
    for sentence in wrong:
        print(sentence)
    print("every result the same bytes" if not wrong else f"{len(wrong)} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

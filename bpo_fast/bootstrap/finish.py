"""The end of a run: what was left out, the data set's card, the manifest."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bpo_fast.bootstrap.card import write_card
from bpo_fast.bootstrap.job import Job, setting_owner
from bpo_fast.bootstrap.parts import DATA_FOLDER, PARTS_FOLDER
from bpo_fast.bootstrap.work import read_done
from bpo_fast.data.mixture import Selection
from bpo_fast.data.pairs import MANIFEST_FILE, METADATA_FILE, SKIPPED_FILE
from bpo_fast.runs.files import read_json, write_json, write_jsonl
from bpo_fast.runs.fingerprint import fingerprint
from bpo_fast.runs.folder import held


def finish(job: Job, selection: Selection) -> dict[str, Any]:
    """Make the folder of a run whose parts are done one data set, whichever process comes to it, and again at will.

    The manifest, written last, makes it whole. All files have the same bytes whoever writes them.

    Args:
        job: the run.
        selection: what its samples are of.

    Returns:
        The manifest.

    Raises:
        ValueError: no pair is left.
    """
    with held(job.folder / ".finish.lock"):
        done = [read_done(part) for part in job.parts]
        skipped = _skipped(job, selection, done)
        report = selection.report()
        num_records = sum(source["records"] for source in report["sources"].values())
        write_jsonl(job.folder / SKIPPED_FILE, skipped)
        _remove_stale(job)
        num_pairs = sum(each["rows"] for each in done)
        if not num_pairs:
            reason, times = Counter(skip["reason"] for skip in skipped).most_common(1)[0]
            raise ValueError(
                f"annotations: found no pair in {num_records} records ({times} with {reason}), "
                f"expected at least one; see {job.folder / SKIPPED_FILE}."
            )
        manifest = _manifest(job, done, skipped) | {"sources": report["sources"]}
        manifest["counts"] = {"records": num_records, **manifest["counts"]}
        write_card(job.folder, manifest)
        write_json(job.folder / MANIFEST_FILE, manifest)
    return manifest


def _skipped(job: Job, selection: Selection, done: Sequence[Mapping[str, Any]]) -> list[dict]:
    order = {source: number for number, source in enumerate(job.samples.sources)}
    kinds = {maker.kind: number for number, maker in enumerate(job.makers)}
    skipped = [asdict(skip) for skip in selection.skipped]
    skipped += [skip for each in done for skip in each["skipped"]]
    return sorted(skipped, key=lambda skip: (order[skip["source"]], skip["record"], kinds.get(skip.get("kind"), -1)))


def _manifest(job: Job, done: Sequence[Mapping[str, Any]], skipped: Sequence[dict]) -> dict[str, Any]:
    settings = read_json(job.folder / METADATA_FILE)["settings"]
    asked = {maker.kind for maker in job.makers}
    return {
        "settings": {name: value for name, value in settings.items() if setting_owner(name) in {*asked, "model"}},
        "filters": asdict(job.filters),
        "embed_images": any(each["embedded"] for each in done),
        "rows_per_part": job.rows_per_part,
        **job.selection,
        "annotations": fingerprint(each["result"] for each in done),
        "image_folders": job.image_folders,
        "counts": {
            "pairs": sum(each["rows"] for each in done),
            "skipped": len(skipped),
            "rejected_truncated": sum(each["rejected_truncated"] for each in done),
            **({"unscored": sum(each["unscored"] for each in done)} if job.score_pairs else {}),
            "kinds": _sums(each["kinds"] for each in done),
            "sources": _sums(each["sources"] for each in done),
        },
        "files": {
            str(part.shard.relative_to(job.folder)): {name: each[name] for name in ("rows", "bytes", "sha256")}
            for part, each in zip(job.parts, done, strict=True)
        },
    }


def _sums(counts):
    return dict(sorted(sum(map(Counter, counts), Counter()).items()))


def _remove_stale(job):
    """Shards and records of another cut, and what killed processes left half-written: no part is in work by now."""
    wanted = {path for part in job.parts for path in (part.shard, part.done)}
    data, parts = job.folder / DATA_FOLDER, job.folder / PARTS_FOLDER
    half_written = [path for folder in (job.folder, data, parts) for path in folder.glob(".*.tmp")]
    for path in [*data.glob("*.parquet"), *parts.glob("*.json"), *half_written]:
        if path not in wanted:
            path.unlink(missing_ok=True)

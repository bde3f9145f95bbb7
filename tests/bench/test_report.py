"""Tables and documents made of benchmark results."""

import json

from benching import group, row

ENVIRONMENT = {
    "cpu": "Xeon",
    "threads": 2,
    "versions": {"torch": "2.13", "trl": "1.16"},
    "commit": "abc",
    "time": "2026-11-21T",
}


def test_a_table_says_times_ratios_memory_and_who_is_ahead():
    from report import text

    groups = {
        "op": group(
            bpo_fast=row(0.5, 100, time_ratio=0.25, peak_ratio=0.05),
            eager=row(2.0, 2000, time_ratio=1.0, peak_ratio=1.0),
            rival=row(0.4, 10, time_ratio=0.2, agrees=True),
            wrong=row(0.1, 1, agrees=False, loss_error=0.01, gradient_error=0.02),
            other=row(0.1, 1, variant="trained head"),
            absent={"missing": "CUDA only"},
            broken={"missing": "failed: RuntimeError: too large"},
            floor=row(0.000_2, is_floor=True),
        )
    }
    said = text({"groups": groups, "settings": {"dtype": "float32"}})
    title, header, _, *lines = [line for line in said.splitlines() if line]
    assert title == (
        "`op`: a job; tokens 2,048, V 64, float32. Lower is better. "
        "op: wrong differs from float64 (loss by 1.0e-02, gradient by 2.0e-02). "
        "op: less time than bpo_fast is taken by rival (0.8x). op: less memory than bpo_fast is taken by rival (0.1x)."
    )
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [
        "median time",
        "quartiles",
        "of eager's time",
        "peak MiB",
        "of eager's peak",
    ]
    assert cells["bpo_fast"] == ["0.5 s", "0.45 s - 0.55 s", "0.25x", "100", "0.05x"]
    assert cells["eager"] == ["2 s", "1.8 s - 2.2 s", "1x", "2,000", "1x"]
    assert cells["absent"] == ["CUDA only", "", "", "", ""]
    assert cells["broken"][0] == "failed"
    assert cells["floor"][0] == "0.2 ms"
    assert "wrong (differs)" in cells


def test_groups_that_do_the_same_share_a_table_and_its_common_sizes():
    from report import text

    small, large = group(eager=row(1.0)), group(eager=row(3.0))
    large["shape"] = {"tokens": 4096, "V": 64}
    said = text({"groups": {"tokens 2048": small, "tokens 4096": large}, "settings": {}})
    assert said.startswith("`op`: a job; V 64. Lower is better.\n\n|")
    assert "| tokens 4096: eager |" in said


def result_of(device, title, bench="kernels", **rows):
    return {
        "bench": bench,
        "environment": ENVIRONMENT | {"device": device},
        "settings": {},
        "groups": {title: group(**rows)},
    }


def test_figures_are_written_between_the_markers_gpus_first(repository, capsys):
    import tables

    folder = repository / "bench/results"
    cpu = result_of("cpu", "linear_dpo_loss", bpo_fast=row(1.0, 10), eager=row(2.0, 40), slow=row(9.0, 1))
    (folder / "kernels-cpu.json").write_text(json.dumps(cpu))
    (folder / "kernels-cpu.partial.json").write_text("{")
    assert tables.main(["--check"], repository) == 1
    assert "README.md: behind bench/results" in capsys.readouterr().out
    assert tables.main([], repository) == 0
    assert tables.main(["--check"], repository) == 0
    readme, document = (repository / "README.md").read_text(), (repository / "docs/benchmarks.md").read_text()
    assert readme.startswith(
        "before <!-- begin figures -->\n\nFigures on a CPU; there are none on a GPU yet. Xeon, 2 threads"
    )
    assert readme.endswith("<!-- end figures --> after\n")
    assert "old" not in readme
    assert "Lower is better" in readme
    assert [cell.strip() for cell in readme.splitlines()[6].split("|")[1:-1]] == [
        "linear_dpo_loss",
        "eager",
        "1 s",
        "2 s",
        "0.5x",
        "10",
        "40",
        "0.25x",
    ]
    assert "A peer is faster" not in readme
    assert "linear_dpo_loss: less memory than bpo_fast is taken by slow (0.1x)." in document
    for name in ("kernels-cpu.png", "overview.png"):
        assert (folder / name).stat().st_size > 1000
    gpu = result_of("NVIDIA X", "linear_dpo_loss", bpo_fast=row(0.2), eager=row(0.1))
    (folder / "kernels-nvidia-x.json").write_text(json.dumps(gpu))
    assert tables.main(["--check"], repository) == 1
    assert tables.main([], repository) == 0
    readme, document = (repository / "README.md").read_text(), (repository / "docs/benchmarks.md").read_text()
    assert readme.index("Figures on NVIDIA X.") < readme.index("Figures on a CPU.")
    assert "A peer is faster than ours in: `op`;" in readme
    assert document.index("## Figures on NVIDIA X") < document.index("## Figures on a CPU")


def test_a_document_without_markers_is_said(repository):
    import tables

    (repository / "README.md").write_text("no markers")
    assert tables.main([], repository).startswith("README.md: found no '<!-- begin figures -->'")

"""Bad options and folders of the demo: a sentence before any work, and the folder as it was."""

from bad_input import Bad, check, table

from bpo_fast.runs.folder import claim_folder


def file_instead_of_folder(world):
    (world / "out").write_text("a note")


def folder_of_a_user(world):
    (world / "out").mkdir()
    (world / "out" / "thesis.txt").write_text("a note")


@table(
    Bad(
        "a seed twice", lambda world: None, "demo --seeds 1 1", "seeds: found [1, 1], expected one or more, each once"
    ),
    Bad("a negative seed", lambda world: None, "demo --seeds -1", "seed: found -1, expected"),
    Bad("a seed too large", lambda world: None, "demo --seeds 4294967296", "seed: found 4294967296, expected"),
    Bad("a file for a folder", file_instead_of_folder, "demo", "output_dir: found the file 'out'"),
    Bad("a folder of files", folder_of_a_user, "demo", "output_dir: found files but no", left=("thesis.txt",)),
    Bad(
        "a folder of another run",
        lambda world: claim_folder(world / "out", {"seeds": [1]}),
        "demo --seeds 2",
        "output_dir: found another run in 'out' (seeds is [1] there and [2] here)",
        left=("metadata.json",),
    ),
)
def test_bad_demo(bad, world, capsys):
    check(bad, world, capsys)

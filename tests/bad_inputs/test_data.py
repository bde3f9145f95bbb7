"""Bad annotations, pairs, questions and images: a sentence or a counted skip, and nothing lost."""

from bad_input import Bad, check, table
from tiny_world import edit


@table(
    Bad(
        "an annotation of no known format",
        lambda world: edit(world / "data.json", lambda records: [{"id": "1"}]),
        "bootstrap",
        "data.json: found no usable record among 1 (record 0 has no 'conversations'",
    ),
    Bad(
        "a missing image of one annotation",
        lambda world: (world / "images/0.png").unlink(),
        "bootstrap",
        "3 pairs in out (1 records skipped",
        left=("metadata.json", "pairs.jsonl", "responses.jsonl", "skipped.jsonl"),
        status=0,
    ),
)
def test_bad_data(bad, world, capsys):
    check(bad, world, capsys)

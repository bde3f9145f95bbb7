"""The miniature world: figures that would say something else than their names."""

from mutation_lists.mutation import Mutation

MUTATIONS = [
    Mutation(
        "two objects that changed places count as no difference",
        "bpo_fast/demo/grade.py",
        "zip_longest(*sides)",
        "zip_longest(*map(sorted, sides))",
        "tests/demo/test_grade.py::test_differences_are_counted_by_place",
    ),
    Mutation(
        "BPO on injected errors trains on samples that BPO does not train on",
        "bpo_fast/demo/negatives.py",
        "pairs.select([found[name] for name in shared])",
        "pairs.select(list(found.values()))",
        "tests/demo/test_negatives.py::test_pairs_of_both_kinds_are_told_apart_and_those_of_one_sample_meet",
    ),
    Mutation(
        "a run with few answers weighs as much as one with many",
        "bpo_fast/demo/negatives.py",
        'sum(row["answers"] * row[share] for row in rows) / answers for',
        "fmean(row[share] for row in rows) for",
        "tests/demo/test_negatives.py::test_the_mean_of_runs_counts_each_answer_alike",
    ),
    Mutation(
        "an error asks for one kind and another is put in",
        "bpo_fast/demo/wrong_answers.py",
        "_CHANGES[kind][ERRORS.index(error)]",
        "_CHANGES[kind][0]",
        "tests/demo/test_wrong_answers.py::test_each_error_puts_every_other_value_in_one_place",
    ),
]

"""Errors of runs that go on, whose fixes `tests/mutations.py` takes out."""

from mutation_lists.mutation import Mutation

MUTATIONS = [
    Mutation(
        "scores of an adapter that was trained again into the same folder",
        "bpo_fast/runs/folder.py",
        'if there["weights"] == here["weights"] or',
        'if there["path"] == here["path"] or',
        "tests/evaluate/test_run.py::test_an_adapter_trained_again_into_the_same_folder_is_another_run",
    ),
    Mutation(
        "responses of a model that was changed in its folder",
        "bpo_fast/answers/given.py",
        "path, weights = str(self.model), weights_fingerprint(self.model)",
        'path, weights = str(self.model), ""',
        "tests/bootstrap/test_run.py::test_a_model_or_adapter_trained_again_into_the_same_folder_is_another_run",
    ),
    Mutation(
        "responses of another data type",
        "bpo_fast/answers/given.py",
        '"dtype": str(dtype).removeprefix("torch."),',
        '"dtype": None,',
        "tests/bootstrap/test_run.py::test_a_model_or_adapter_trained_again_into_the_same_folder_is_another_run",
    ),
    Mutation(
        "a damaged line of a journal dropped with all behind it",
        "bpo_fast/runs/journal.py",
        '                if not line.endswith(b"\\n") and _is_cut_off(line):\n',
        "                if not line.startswith(_START):\n",
        "tests/runs/test_journal.py::test_any_other_damage_is_named_and_nothing_is_dropped",
    ),
    Mutation(
        "half a batch of a killed run kept, and the rest answered in another batch",
        "bpo_fast/runs/journal.py",
        "                if not left:\n",
        "                if True:\n",
        "tests/runs/test_journal.py::test_cut_at_any_byte_it_goes_on_with_whole_batches_and_ends_the_same",
    ),
    Mutation(
        "pairs of an earlier selection kept beside new responses",
        "bpo_fast/answers/batches.py",
        "                    (folder / name).unlink(missing_ok=True)\n",
        "                    pass\n",
        "tests/bootstrap/test_run.py::test_a_run_that_goes_on_is_unfinished_until_its_pairs_are_whole",
    ),
    Mutation(
        "the answer to another image of the same name",
        "bpo_fast/answers/batches.py",
        "    return fingerprint([question.id, question.image, question.question, size])\n",
        "    return fingerprint([question.id, question.image, question.question])\n",
        "tests/answers/test_batches.py::test_an_image_is_known_by_name_and_size",
    ),
    Mutation(
        "a demo of another model in the same folder is taken for this one's",
        "bpo_fast/demo/pipeline.py",
        '"model": weights_fingerprint(model_path)',
        '"model": "tiny"',
        "tests/demo/test_pipeline.py::test_a_run_is_known_by_what_its_model_holds_not_by_its_path",
    ),
    Mutation(
        "a description with words after its end counts as whole",
        "bpo_fast/demo/grade.py",
        "_DESCRIPTION.fullmatch(answer)",
        "_DESCRIPTION.match(answer)",
        "tests/demo/test_grade.py::test_broken_answers_keep_the_grades_of_what_they_say",
    ),
]

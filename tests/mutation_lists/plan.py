"""Errors of forecasts, whose fixes `tests/mutations.py` takes out."""

from mutation_lists.mutation import Mutation

MUTATIONS = [
    Mutation(
        "a forecast that forgets the memory of gradients made in one pass",
        "bpo_fast/plan/operations.py",
        "        inside += held * vocab * narrow\n",
        "        pass\n",
        "tests/plan/test_operations.py::test_the_transform_of_logits",
    ),
    Mutation(
        "a forecast that counts a view as moved bytes",
        "bpo_fast/plan/meter.py",
        '        if func.is_view or func.namespace == "prim" or ',
        "        if ",
        "tests/plan/test_meter.py::test_questions_about_a_fake_tensor_and_views_of_it_move_nothing",
    ),
    Mutation(
        "a forecast that waits for the other processes of a training",
        "bpo_fast/plan/before.py",
        " if not _LAUNCHED.fullmatch(name)}",
        "}",
        "tests/plan/test_fit.py::test_the_process_plans_what_was_trained",
    ),
]

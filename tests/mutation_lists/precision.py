"""Errors of dtypes and devices that no CPU test in one dtype shows, whose fixes `tests/mutations.py` takes out."""

from mutation_lists.mutation import Mutation

MUTATIONS = [
    Mutation(
        "logits rounded by autocast inside an op",
        "bpo_fast/ops/head_sweep.py",
        "@precise\ndef linear_token_logps_op(",
        "def linear_token_logps_op(",
        "tests/ops/test_precision.py::test_logits_from_hidden_states_are_not_rounded",
    ),
    Mutation(
        "statistics rounded by autocast inside an op",
        "bpo_fast/ops/token_logps.py",
        "@precise\ndef _sequence_logps(",
        "def _sequence_logps(",
        "tests/ops/test_precision.py::test_statistics_of_logits_have_the_same_bits",
    ),
    Mutation(
        "an adapter on the head rounded by autocast, and of two dtypes on a GPU",
        "bpo_fast/ops/linear_token_logps.py",
        "    with without_autocast(rows):\n",
        "    if True:\n",
        "tests/ops/test_precision.py::test_an_adapter_on_the_head_is_neither_rounded_nor_refused",
    ),
    Mutation(
        "the head's kernel launched on another GPU",
        "bpo_fast/ops/unit_gradient.py",
        "    with torch.cuda.device_of(logits):\n",
        "    if True:\n",
        "tests/ops/test_current_device.py::test_the_head",
    ),
    Mutation(
        "the kernels of logits launched on another GPU",
        "bpo_fast/ops/token_logps.py",
        "        with torch.cuda.device_of(logits):  # Triton launches on the current device\n",
        "        if True:\n",
        "tests/ops/test_current_device.py::test_logits_forward_and_backward",
    ),
    Mutation(
        "the loss's kernel launched on another GPU",
        "bpo_fast/ops/sigmoid_preference.py",
        "    with torch.cuda.device_of(logps):",
        "    if True:",
        "tests/ops/test_current_device.py::test_the_loss",
    ),
]

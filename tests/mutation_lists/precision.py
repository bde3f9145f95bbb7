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
        "@precise\ndef _forward(",
        "def _forward(",
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
    Mutation(
        "queries and keys in float32 under autocast, for which attention leaves FlashAttention",
        "bpo_fast/models/attention.py",
        "    query, key, value = (x.to(autocast_dtype(x)) for x in (query, key, value))\n",
        "",
        "tests/train/test_precision.py::test_training_under_autocast_computes_in_its_dtype_all_through",
    ),
    Mutation(
        "the head in float32 under autocast",
        "bpo_fast/models/packed_forward.py",
        "    rows = rows.to(autocast_dtype(rows))\n",
        "",
        "tests/train/test_precision.py::test_training_under_autocast_computes_in_its_dtype_all_through",
    ),
    Mutation(
        "a kept head that no longer is its weight",
        "bpo_fast/models/packed_forward.py",
        " and kept[1:] == made_of:",
        ":",
        "tests/models/test_autocast.py::test_a_kept_head_follows_its_weight",
    ),
    Mutation(
        "a float16 checkpoint trained in bfloat16 as it is",
        "bpo_fast/train/trainer.py",
        ", float16_as=torch.bfloat16 if args.bf16 else None)",
        ")",
        "tests/train/test_precision.py::test_training_under_autocast_computes_in_its_dtype_all_through",
    ),
    Mutation(
        "bfloat16 by default on a CPU beside a GPU",
        "bpo_fast/train/config.py",
        "torch.cuda.is_available() and not self.use_cpu",
        "torch.cuda.is_available()",
        "tests/train/test_precision.py::test_bfloat16_is_off_by_default_on_a_cpu_beside_a_gpu",
    ),
    Mutation(
        "an early flash-attn, whose mask is aligned at the top left",
        "bpo_fast/models/flash.py",
        '        if "deterministic" in inspect.signature(function).parameters:\n',
        "        if True:\n",
        "tests/models/test_flash.py::test_a_package_that_cannot_be_called_is_passed_over_with_its_reason",
    ),
    Mutation(
        "a deterministic training whose attention adds up by atomics",
        "bpo_fast/models/flash.py",
        "        with _deterministic_algorithms():\n",
        "        if True:\n",
        "tests/models/test_flash.py::test_torchs_own_is_deterministic_for_its_backward_pass_alone",
    ),
    Mutation(
        "4 bits that compute in float16 under bfloat16 autocast",
        "bpo_fast/models/load.py",
        '        dtype = options["dtype"] = float16_as\n',
        '        options["dtype"] = float16_as\n',
        "tests/models/test_load.py::test_a_float16_checkpoint_in_4_bits_computes_as_asked",
    ),
]

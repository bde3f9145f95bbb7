"""Errors of log-probs and losses, whose fixes `tests/mutations.py` takes out."""

from mutation_lists.mutation import INTERPRETED, Mutation

MUTATIONS = [
    Mutation(
        "true-class gradient rounded before the -1 (Triton)",
        "kernels/sequence_logps_backward.py",
        "tl.where(columns == target.to(tl.int32), 1.0 - p, -p) * grad",
        "tl.where(columns == target.to(tl.int32), 1.0 - p.to(tl.bfloat16).to(tl.float32), -p) * grad",
        f"{INTERPRETED}::test_gradient_of_a_nearly_certain_target_is_not_rounded_to_zero",
    ),
    Mutation(
        "true-class gradient rounded before the -1 (PyTorch)",
        "bpo_fast/ops/logit_rows.py",
        "rows.exp_().mul_(-scale / log_sum.exp())",
        "rows.exp_().mul_(-scale / log_sum.exp()).copy_(rows.to(logits.dtype))",
        "tests/ops/test_token_logps.py::test_gradient_of_a_nearly_certain_target_is_not_rounded_to_zero",
    ),
    Mutation(
        "columns past the vocabulary add exp(0)",
        "kernels/rows.py",
        'x = tl.load(logits + columns, mask=inside, other=float("-inf"))',
        "x = tl.load(logits + columns, mask=inside, other=0.0)",
        f"{INTERPRETED}::test_token_logps",
    ),
    Mutation(
        "columns past the vocabulary add exp(0) (from hidden states)",
        "kernels/rows.py",
        'x = tl.load(logits + columns, mask=inside, other=float("-inf"))',
        "x = tl.load(logits + columns, mask=inside, other=0.0)",
        f"{INTERPRETED}::test_linear_token_logps",
    ),
    Mutation(
        "finite gradient rows of a target outside the vocabulary (Triton)",
        "kernels/rows.py",
        'return tl.where((target >= 0) & (target < vocab_size), tl.log(row_sum), float("nan"))',
        "return tl.log(row_sum)",
        f"{INTERPRETED}::test_a_target_outside_the_vocabulary_gives_nan_as_log_prob_and_as_gradient",
    ),
    Mutation(
        "finite gradient rows of a target that no process holds",
        "bpo_fast/ops/vocab_parallel.py",
        "ctx.save_for_backward((logsumexp - largest - log_sum).exp(), here)",
        "ctx.save_for_backward((logsumexp - largest - sums[0].log()).exp(), here)",
        "tests/ops/test_vocab_parallel.py::test_two_shards_are_the_whole_head",
    ),
    Mutation(
        "row offsets of 32 bits",
        "kernels/sequence_logps.py",
        "    row = tl.program_id(0).to(tl.int64)\n    plane",
        "    row = tl.program_id(0)\n    plane",
        f"{INTERPRETED}::test_rows_beyond_two_to_the_31_elements",
    ),
    Mutation(
        "labels read as if they were packed and aligned",
        "bpo_fast/ops/token_logps.py",
        "        targets.contiguous(),\n",
        "        targets,\n",
        f"{INTERPRETED}::test_targets_that_are_a_view_at_an_odd_offset",
    ),
    Mutation(
        "a result that changes with the chunk (gradient of the head)",
        "bpo_fast/ops/head_products.py",
        "_multiply(gradient.t(), hidden.to(gradient.dtype), grad_weight, add=True)",
        "_multiply(gradient.t(), hidden.to(gradient.dtype), grad_weight, add=False)",
        "tests/ops/test_linear_token_logps.py::test_the_chunk_changes_nothing_beyond_rounding",
    ),
    Mutation(
        "a result that changes with the chunk (mean over each)",
        "bpo_fast/ops/head_sweep.py",
        "rows[chunk] = times_head(gradient, head.weight)",
        "rows[chunk] = times_head(gradient, head.weight) / len(gradient)",
        "tests/ops/test_linear_token_logps.py::test_the_chunk_changes_nothing_beyond_rounding",
    ),
    Mutation(
        "the loss stuck at ln 2",
        "bpo_fast/ops/head_sweep.py",
        'grads["hidden"] = (grad[:, None] * rows).to(ctx.hidden_dtype)',
        'grads["hidden"] = torch.zeros_like(rows, dtype=ctx.hidden_dtype)',
        "tests/losses/test_dpo.py::test_loss_leaves_ln_2_when_trained",
    ),
    Mutation(
        "the first loss not ln 2 (reference in another precision)",
        "bpo_fast/ops/head_sweep.py",
        "    both[:count], both[half : half + count] = hidden, ref_hidden\n",
        "    both[:count], both[half : half + count] = hidden, ref_hidden.half()\n",
        "tests/losses/test_dpo.py::test_policy_equal_to_reference_gives_ln_2_and_margins_of_exactly_zero",
    ),
    Mutation(
        "an option's text taken for true: average_logps='no'",
        "bpo_fast/losses/config.py",
        "            if not isinstance(value := getattr(self, name), bool):\n",
        "            if not isinstance(value := getattr(self, name), object):\n",
        "tests/losses/test_mistakes.py::test_errors_name_the_argument",
    ),
    Mutation(
        "a sequence without a label",
        "bpo_fast/losses/dpo.py",
        "    _check_labelled(labels)\n",
        "",
        "tests/losses/test_mistakes.py::test_errors_name_the_argument",
    ),
]

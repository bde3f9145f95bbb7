"""Errors of losses, second roots and weights of tokens, whose fixes `tests/mutations.py` takes out."""

from mutation_lists.mutation import Mutation

SECOND_ROOTS = "tests/train/test_second_roots.py"
OF_TENSORS = "tests/losses/test_weights_and_roots.py"

MUTATIONS = [
    Mutation(
        "a weakened image that is preferred to the image",
        "bpo_fast/losses/table.py",
        "config.beta * (chosen - pairs.weakened_logratios)",
        "config.beta * (pairs.weakened_logratios - chosen)",
        "tests/losses/test_table.py::test_by_hand",
    ),
    Mutation(
        "mDPO's anchor inside of beta",
        "bpo_fast/losses/table.py",
        "F.logsigmoid(config.beta * chosen - config.mdpo_anchor)",
        "F.logsigmoid(config.beta * (chosen - config.mdpo_anchor))",
        "tests/losses/test_table.py::test_by_hand",
    ),
    Mutation(
        "token weights for the policy alone",
        "bpo_fast/losses/preference.py",
        "ref_logps = ref_logps if ref_token_logps is None else sums(ref_token_logps)",
        "ref_logps = ref_logps if ref_token_logps is None else responses.sums(ref_token_logps)",
        f"{OF_TENSORS}::test_values_and_gradients_are_those_of_plain_pytorch",
    ),
    Mutation(
        "token weights at the position that predicts their token",
        "bpo_fast/losses/dpo.py",
        "F.pad(token_weights.detach()[:, 1:], ",
        "F.pad(token_weights.detach()[:, :-1], ",
        f"{OF_TENSORS}::test_values_and_gradients_are_those_of_plain_pytorch",
    ),
    Mutation(
        "a likelihood of the chosen responses that is weighed",
        "bpo_fast/losses/preference.py",
        "            return responses.sums(values if token_weights is None else values * token_weights)\n\n"
        "        logps = sums(token_logps)\n",
        "            return responses.sums(values if token_weights is None else values * token_weights)\n\n"
        "        logps = sums(token_logps)\n"
        "        nll = _mean_nll(config, logps, num_tokens)\n",
        f"{OF_TENSORS}::test_weights_of_one_change_no_bit_and_weights_of_zero_take_a_token_out",
    ),
    Mutation(
        "second roots that show the image as it is",
        "bpo_fast/models/weakened_roots.py",
        "        return torch.cat([clean, projected.reshape(-1, projected.shape[-1])])\n",
        "        return torch.cat([clean, clean])\n",
        f"{SECOND_ROOTS}::test_losses_and_gradients_are_those_of_the_models_own_forward",
    ),
    Mutation(
        "noise that goes by a pair's place in its batch",
        "bpo_fast/train/collator.py",
        "noise_ids = [int(digest(prompt, answers[0])[:15], 16) for prompt, answers in rendered]",
        "noise_ids = list(range(len(rendered)))",
        f"{SECOND_ROOTS}::test_the_noise_of_a_pair_is_the_same_in_any_batch",
    ),
    Mutation(
        "tiles of a pair that share their noise",
        "bpo_fast/models/weakened_roots.py",
        "first + torch.arange(count, device=first.device)",
        "first + 0 * torch.arange(count, device=first.device)",
        f"{SECOND_ROOTS}::test_losses_and_gradients_are_those_of_the_models_own_forward",
    ),
    Mutation(
        "noise by feature maps where a model puts them together with rows of its own",
        "bpo_fast/models/weakened_roots.py",
        "    if rows.shape != clean.shape or (rows - clean).float().norm() > 0.1 * clean.float().norm():\n",
        "    if False:\n",
        f"{SECOND_ROOTS}::test_tiles_that_are_put_together_are_refused_where_the_noise_goes_by_maps",
    ),
    Mutation(
        "the reference's log-probs of another noise",
        "bpo_fast/train/kept.py",
        "noise = [] if weakening is None else [asdict(weakening)]",
        "noise = []",
        f"{SECOND_ROOTS}::test_log_probs_kept_for_another_noise_are_never_used",
    ),
    Mutation(
        "the reference's log-probs of a second root kept for another pair",
        "bpo_fast/train/reference_cache.py",
        "torch.cat(logps[place :: len(sequence.numbers)])",
        "torch.cat(logps[place * len(logps) // len(sequence.numbers) :][: len(logps) // len(sequence.numbers)])",
        f"{SECOND_ROOTS}::test_caches_and_a_token_budget_change_nothing",
    ),
    Mutation(
        "weights of the rejected response on the chosen one of a second root",
        "bpo_fast/train/collator.py",
        "weights[: len(root.branches)]",
        "weights[-len(root.branches) :]",
        f"{SECOND_ROOTS}::test_weights_lie_where_their_tokens_do_and_are_cut_with_them",
    ),
    Mutation(
        "weights that are not one a token",
        "bpo_fast/train/collator.py",
        "    if not isinstance(values, list | tuple) or len(values) != len(ids):\n",
        "    if not isinstance(values, list | tuple):\n",
        f"{SECOND_ROOTS}::test_weights_and_images_that_do_not_fit_are_left_out_with_their_rows",
    ),
]

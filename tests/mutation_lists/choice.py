"""Errors of scoring, choosing and filtering answers, whose fixes `tests/mutations.py` takes out."""

from mutation_lists.mutation import Mutation

_SCORE, _FILTERS, _M3PO = "bpo_fast/answers/score.py", "bpo_fast/bootstrap/filters.py", "bpo_fast/bootstrap/m3po.py"
_SCORE_TESTS, _CLIP_TESTS = "tests/answers/test_score.py::test_", "tests/models/test_clip.py::test_"
_FILTER_TESTS, _M3PO_TESTS = "tests/bootstrap/test_filters.py::test_", "tests/bootstrap/test_m3po.py::test_"

MUTATIONS = [
    Mutation(
        "prompts that share a forward beyond the token budget",
        _SCORE,
        "        token_budget = max(token_budget, *lengths)\n",
        "        token_budget = None\n",
        f"{_SCORE_TESTS}a_prompt_has_a_forward_of_its_own_where_the_budget_says_so",
    ),
    Mutation(
        "image features of another prompt of the batch",
        _SCORE,
        "        shown = torch.cat([features[number] for number in members])\n",
        "        shown = torch.cat(features[: len(members)])\n",
        f"{_SCORE_TESTS}a_batch_scores_as_each_prompt_by_itself",
    ),
    Mutation(
        "scores that go to the prompts in the order of the forwards",
        _SCORE,
        "    return [found[number] for number in range(len(prompts))]\n",
        "    return list(found.values())\n",
        f"{_SCORE_TESTS}a_batch_scores_as_each_prompt_by_itself",
    ),
    Mutation(
        "earlier turns of a conversation left out of the score",
        _SCORE,
        "render(processor, prompt, texts) for prompt",
        "render(processor, [prompt[0], *prompt[3:]], texts) for prompt",
        f"{_SCORE_TESTS}eight_candidates_in_one_forward_score_as_each_by_itself",
    ),
    Mutation(
        "log-probs of a model that packed sequences are wrong for",
        "bpo_fast/bootstrap/work.py",
        "            if self._job.score_pairs:\n",
        "            if False:\n",
        "tests/bootstrap/test_work.py::test_a_model_whose_log_probs_would_be_wrong_is_refused_first",
    ),
    Mutation(
        "words of Hindi that are one without their vowel signs",
        _FILTERS,
        '        is_punctuation = unicodedata.category(letter).startswith("P") and letter not in self._MEANT\n',
        "        is_punctuation = not letter.isalnum() and letter not in self._MEANT\n",
        f"{_FILTER_TESTS}true_answers_are_kept",
    ),
    Mutation(
        "a minus that is taken for punctuation",
        _FILTERS,
        'frozenset("%#&@*/\\\\-")',
        'frozenset("%#&@*/\\\\")',
        f"{_FILTER_TESTS}true_answers_are_kept",
    ),
    Mutation(
        "a short question that its answer may not begin with",
        _FILTERS,
        "    counts = len(question.encode()) >= SHORTEST_ECHO\n",
        "    counts = True\n",
        f"{_FILTER_TESTS}a_short_question_may_be_the_first_word_of_its_answer",
    ),
    Mutation(
        "a gap of log-probs that is judged by their order",
        _FILTERS,
        "    gap = abs(chosen.mean - rejected.mean)\n",
        "    gap = chosen.mean - rejected.mean\n",
        f"{_FILTER_TESTS}log_probs_are_judged_once_they_are_known",
    ),
    Mutation(
        "a gap of log-probs that grows with the answers' length",
        _FILTERS,
        "    gap = abs(chosen.mean - rejected.mean)\n",
        "    gap = abs(chosen.logp - rejected.logp)\n",
        f"{_FILTER_TESTS}log_probs_are_judged_once_they_are_known",
    ),
    Mutation(
        "an injected error of one word that is dropped as a copy",
        _FILTERS,
        "    max_similarity: float | None = None\n",
        "    max_similarity: float | None = 0.9\n",
        f"{_FILTER_TESTS}an_injected_error_of_one_word_is_kept_unless_asked_otherwise",
    ),
    Mutation(
        "a sign in the image that is taken for a refusal",
        _FILTERS,
        'rf"\\bi {_CANNOT} (?:actually |',
        'rf"\\b(?:i )?{_CANNOT} (?:actually |',
        f"{_FILTER_TESTS}true_answers_are_kept",
    ),
    Mutation(
        "a dispreferred answer that fits the image better than the preferred one",
        _M3PO,
        "pool[best].alignment - candidate.alignment >= margin",
        "abs(pool[best].alignment - candidate.alignment) >= margin",
        f"{_M3PO_TESTS}an_answer_that_fits_better_is_never_dispreferred",
    ),
    Mutation(
        "a dispreferred answer that the model is not confident of",
        _M3PO,
        "max(wrong, key=lambda place: pool[place].confidence, default=None)",
        "min(wrong, key=lambda place: pool[place].confidence, default=None)",
        f"{_M3PO_TESTS}the_choice_by_hand",
    ),
    Mutation(
        "the annotated answer as the dispreferred one",
        _M3PO,
        "not candidate.annotated and ",
        "",
        f"{_M3PO_TESTS}the_annotated_answer_is_preferred_or_left_out",
    ),
    Mutation(
        "a pool all of whose candidates are one draw",
        _M3PO,
        "draw(self.seed, sample, self.kind, number)",
        "draw(self.seed, sample, self.kind)",
        f"{_M3PO_TESTS}a_pair_of_real_models_is_that_of_the_parts_by_hand",
    ),
    Mutation(
        "an answer that was cut in the pool",
        _M3PO,
        "    if response.truncated or check(",
        "    if check(",
        f"{_M3PO_TESTS}the_pool_leaves_out_what_is_cut_empty_or_said_before",
    ),
    Mutation(
        "a loop as the answer that the model is confident of",
        _M3PO,
        " or check(sample, Made(None, chosen=response.text), FilterOptions(max_response_words=None)):\n",
        ":\n",
        f"{_M3PO_TESTS}what_is_confident_for_no_better_reason_than_its_form_is_not_dispreferred",
    ),
    Mutation(
        "a later copy in the place of the first",
        _M3PO,
        "words not in kept and all(",
        "all(",
        f"{_M3PO_TESTS}the_pool_leaves_out_what_is_cut_empty_or_said_before",
    ),
    Mutation(
        "a confidence that falls with the answer's length",
        _M3PO,
        "Candidate(text, alignment, score.mean, ",
        "Candidate(text, alignment, score.logp, ",
        f"{_M3PO_TESTS}a_pair_of_fake_scores",
    ),
    Mutation(
        "an alignment of what CLIP reads of a long answer alone",
        "bpo_fast/models/clip.py",
        "        parts = [sentences(text) for text in texts]\n",
        "        parts = [[text] for text in texts]\n",
        f"{_CLIP_TESTS}a_text_longer_than_the_model_reads_is_worth_its_sentences",
    ),
    Mutation(
        "texts padded to the longest beside them, where the model was trained on full length",
        "bpo_fast/models/clip.py",
        'padding="max_length"',
        "padding=True",
        f"{_CLIP_TESTS}the_alignment_is_the_mean_cosine_of_the_sentences",
    ),
]

"""Errors of injected errors and of the servers asked for them, whose fixes `tests/mutations.py` takes out."""

from mutation_lists.mutation import Mutation

SERVER, INJECTED, REWRITING = (
    "bpo_fast/answers/server.py",
    "bpo_fast/bootstrap/error_injected.py",
    "bpo_fast/bootstrap/rewriting.py",
)
MUTATIONS = [
    Mutation(
        "a key that comes back in an error",
        SERVER,
        'said = said.replace(key, "***")',
        "pass",
        "tests/answers/test_server.py::test_a_refusal_is_one_sentence_at_once_without_the_key",
    ),
    Mutation(
        "a key that no header takes, told by the client library",
        SERVER,
        're.fullmatch(r"[A-Za-z0-9._~+/-]+=*", key)',
        "key",
        "tests/answers/test_server.py::test_a_key_that_is_none_is_told_without_it",
    ),
    Mutation(
        "a key shown where the name of its variable belongs",
        SERVER,
        "api_key_env: str | None = field(default=None, repr=False)",
        "api_key_env: str | None = field(default=None)",
        "tests/answers/test_server.py::test_a_key_in_place_of_its_variable_is_not_told",
    ),
    Mutation(
        "a key in an address",
        SERVER,
        'if "@" in address.netloc or address.query:',
        "if False:",
        "tests/answers/test_server.py::test_mistakes_are_one_sentence",
    ),
    Mutation(
        "another program's key sent to any server",
        SERVER,
        'api_key=self._key() or "none"',
        "api_key=self._key()",
        "tests/answers/test_server.py::test_another_programs_key_is_not_sent",
    ),
    Mutation(
        "a request that is not repeated",
        SERVER,
        '"max_retries": self.max_retries}',
        '"max_retries": 0}',
        "tests/answers/test_server.py::test_what_goes_wrong_is_asked_again_until_each_prompt_has_its_answer_once",
    ),
    Mutation(
        "JSON that was cut off taken for an answer",
        SERVER,
        'event_hooks={"response": [_check_body]}',
        "event_hooks={}",
        "tests/answers/test_server.py::test_what_goes_wrong_is_asked_again_until_each_prompt_has_its_answer_once",
    ),
    Mutation(
        "answers in the order in which they came",
        SERVER,
        "        return [task.result() for task in tasks]\n",
        "        return [task.result() for task in tasks[1:] + tasks[:1]]\n",
        "tests/answers/test_server.py::test_what_goes_wrong_is_asked_again_until_each_prompt_has_its_answer_once",
    ),
    Mutation(
        "requests without a bound",
        SERVER,
        "asyncio.Semaphore(self.max_concurrency)",
        "asyncio.Semaphore(1000)",
        "tests/answers/test_server.py::test_requests_overlap_up_to_the_bound",
    ),
    Mutation(
        "requests one after the other",
        SERVER,
        "asyncio.Semaphore(self.max_concurrency)",
        "asyncio.Semaphore(1)",
        "tests/answers/test_server.py::test_requests_overlap_up_to_the_bound",
    ),
    Mutation(
        "a server asked with one seed for all",
        SERVER,
        "messages=messages, seed=seed,",
        "messages=messages, seed=0,",
        "tests/answers/test_server.py::test_sampling_is_asked_for_with_the_seed_of_each_prompt",
    ),
    Mutation(
        "errors drawn with one seed for all samples",
        INJECTED,
        "draw(self.seed, samples[n], self.kind, error)",
        "self.seed",
        "tests/bootstrap/test_error_injected.py::test_responses_are_the_language_models_to_the_prompt_of_each_kind_of_error",
    ),
    Mutation(
        "one kind of error for all samples",
        INJECTED,
        "draw(self.seed, sample, MIXED, name)",
        "name",
        "tests/bootstrap/test_error_injected.py::test_the_kinds_of_mixed_errors_are_drawn_evenly_and_never_twice",
    ),
    Mutation(
        "an example's response taken for the sample's",
        REWRITING,
        'return "" if self._is_echo(error, text) else text',
        "return text",
        "tests/bootstrap/test_rewriting.py::test_of_a_reply_the_modified_response_is_kept",
    ),
    Mutation(
        "changed examples under the version of before",
        REWRITING,
        "fingerprint([content])",
        'fingerprint([content["version"]])',
        "tests/bootstrap/test_rewriting.py::test_changed_text_is_another_version_and_changed_layout_is_not",
    ),
    Mutation(
        "an answer's braces taken for a place of the template",
        REWRITING,
        "return _PLACEHOLDER.sub(lambda match: values[match[1]], text)",
        "return text.format(**values).format(**values)",
        "tests/bootstrap/test_rewriting.py::test_a_prompt_is_the_template_with_what_it_is_asked",
    ),
]

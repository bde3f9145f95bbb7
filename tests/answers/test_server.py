import asyncio
import logging
import time

import pytest

pytest.importorskip("openai", reason="needs openai: pip install 'openai>=3.57'")

from openai_server import FAULTS, MODEL, NO_ANSWER, Proxy, answer, completion

from bpo_fast.answers.generate import GenerationSettings, Response
from bpo_fast.answers.server import Server

KEY = "sk-not-to-be-seen-0123456789"
PROMPTS = [f"w{n} w{n + 1}" for n in range(16)]
GREEDY = GenerationSettings(max_new_tokens=4)


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("THE_KEY", KEY)


def server(proxy, **options):
    return Server(proxy.url, MODEL, **{"timeout": 20, **options})


def test_what_goes_wrong_is_asked_again_until_each_prompt_has_its_answer_once(key, caplog):
    """Every fault once, a time-out, and a server that dies half way and comes back."""
    caplog.set_level(logging.DEBUG)
    faults = dict(enumerate(FAULTS.values()))

    def fault(number, body):
        if number == len(FAULTS):
            time.sleep(2)  # longer than the client waits
        if number == len(FAULTS) + 6:
            proxy.die(1)
            time.sleep(0.5)
            return NO_ANSWER
        return faults.get(number) or answer(completion(body["messages"][0]["content"]))

    with Proxy(fault=fault) as proxy:
        asked = server(proxy, api_key_env="THE_KEY", max_concurrency=4, timeout=1)
        assert asked.answer(PROMPTS, GREEDY, range(16)) == [Response(prompt, False) for prompt in PROMPTS]
    assert len(proxy.bodies) >= len(PROMPTS) + len(FAULTS) + 2
    assert set(proxy.keys) == {f"Bearer {KEY}"}
    assert len(caplog.records) > len(PROMPTS)  # the libraries did log
    assert KEY not in caplog.text + repr(asked) + "".join(str(vars(record)) for record in caplog.records)


@pytest.mark.parametrize("most", [1, 5])
def test_requests_overlap_up_to_the_bound(most):
    with Proxy(fault=lambda *_: answer(completion("w1")), delay=0.05) as proxy:
        assert server(proxy, max_concurrency=most).answer(PROMPTS, GREEDY, range(16)) == [Response("w1", False)] * 16
    assert proxy.most == most


def test_a_server_that_says_how_long_is_not_asked_before():
    times = []

    def fault(number, body):
        times.append(time.monotonic())
        return answer(completion("w1")) if number else answer({}, 429, Retry_After="1.2")

    with Proxy(fault=fault) as proxy:
        server(proxy).answer(["w1"], GREEDY, [0])
    assert times[1] - times[0] >= 1.2


def test_sampling_is_asked_for_with_the_seed_of_each_prompt():
    settings = GenerationSettings(7, do_sample=True, temperature=0.5, top_p=0.9)
    with Proxy(fault=lambda *_: answer(completion("w1", "length"))) as proxy:
        assert server(proxy).answer(["a", "b"], settings, [3, 2**62 + 5]) == [Response("w1", True)] * 2
        server(proxy).answer(["c"], GenerationSettings(7, do_sample=True), [0])
    *both, plain = proxy.bodies
    assert {body["messages"][0]["content"]: body["seed"] for body in both} == {"a": 3, "b": 5}
    for body in both:
        assert (body["max_tokens"], body["temperature"], body["top_p"]) == (7, 0.5, 0.9)
    assert (plain["temperature"], plain.get("top_p")) == (1.0, None)


def test_what_is_said_beside_an_answer_is_none():
    with Proxy(fault=lambda *_: answer(completion(None, "content_filter"))) as proxy:
        assert server(proxy).answer(["a"], GREEDY, [0]) == [Response("", False)]


def test_a_prompt_too_long_for_the_model_concerns_itself_alone():
    def fault(number, body):
        if body["messages"][0]["content"] == "long":
            return answer({"message": "This model's maximum context length is 8 tokens."}, 400)
        return answer(completion("w1"))

    with Proxy(fault=fault) as proxy:
        assert server(proxy).answer(["a", "long"], GREEDY, [0, 0]) == [Response("w1", False), Response("", False)]


def test_it_is_asked_from_within_a_running_loop_as_of_a_notebook():
    async def cell(proxy):
        return server(proxy).answer(["a"], GREEDY, [0])

    with Proxy(fault=lambda *_: answer(completion("w1"))) as proxy:
        assert asyncio.run(cell(proxy)) == [Response("w1", False)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            answer({"error": f"wrong key {KEY}"}, 401),
            r"server_key_env: found that http.* refuses the key in THE_KEY \(401",
        ),
        (answer({}, 403), r"server_key_env: found that http://.* refuses the key in THE_KEY \(403"),
        (answer({"error": KEY}, 404), r"server_url: found that http://.*/v1 refuses a request \(404: .*mostly in /v1"),
        (answer({"error": "no seed"}, 400), r"server_url: found that .* refuses a request \(400: .*no seed"),
        (answer({"error": "x"}, 422), r"server_url: found that .* refuses a request \(422: "),
    ],
)
def test_a_refusal_is_one_sentence_at_once_without_the_key(key, fault, message):
    with Proxy(fault=lambda *_: fault) as proxy:
        with pytest.raises(ValueError, match=message) as raised:
            server(proxy, api_key_env="THE_KEY").answer(["a"], GREEDY, [0])
        with pytest.raises(ValueError, match=message):
            server(proxy, api_key_env="THE_KEY").check()
    assert len(proxy.bodies) == 2
    assert KEY not in str(raised.value)
    assert raised.value.__cause__ is raised.value.__context__ is None


def test_a_server_that_stays_away_is_one_sentence(key):
    with Proxy(fault=lambda *_: answer({"error": KEY}, 503)) as proxy:
        asked = server(proxy, api_key_env="THE_KEY", max_retries=1)
        with pytest.raises(
            ConnectionError, match=r"no answer of http.* after up to 1 more tries \(503: '\*\*\*'\), exp"
        ):
            asked.answer(["a", "b"], GREEDY, [0, 1])
    with pytest.raises(ConnectionError, match=r"server_url: found no answer of .*Connection error"):
        server(proxy, max_retries=0).check()
    with Proxy(fault=lambda *_: answer({}), delay=0.5) as proxy:
        asked = server(proxy, max_retries=0, timeout=0.2)
        with pytest.raises(ConnectionError, match=r"tries \('Request timed out\.'\), expected one; see to the server"):
            asked.answer(["a"], GREEDY, [0])


def test_a_model_that_the_server_lacks_is_told_with_those_that_it_has():
    listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in ("b", "a")]}
    with Proxy(fault=lambda *_: answer(listed)) as proxy:
        with pytest.raises(
            ValueError, match=r"server_model: found 'tiny/llama', expected one that http.* lists: 'a', "
        ):
            server(proxy).check()
        Server(proxy.url, "b").check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"base_url": "localhost:8000"},
            "server_url: found 'localhost:8000', expected an address such as http://local",
        ),
        (
            {"base_url": f"https://a:{KEY}@b/v1"},
            "server_url: found a password or a query in it, expected an address alon",
        ),
        ({"base_url": f"https://b/v1?key={KEY}"}, "server_url: found a password or a query in it"),
        ({"model": ""}, "server_model: found none, expected the name of a model that the server has"),
        ({"max_concurrency": 0}, "server_concurrency: found 0, expected a whole number of at least 1"),
        ({"timeout": 0}, "server_timeout: found 0, expected a positive number"),
        ({"max_retries": -1}, "server_retries: found -1, expected a whole number of at least 0"),
    ],
)
def test_mistakes_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        Server(**{"base_url": "http://localhost:8000/v1", "model": "m", **options})
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(("value", "found"), [("", "nothing"), (f"{KEY}\n", "characters that no key has")])
def test_a_key_that_is_none_is_told_without_it(monkeypatch, value, found):
    monkeypatch.setenv("THE_KEY", value)
    with pytest.raises(ValueError, match=f"server_key_env: found {found} in the environment variable that") as raised:
        Server("http://localhost:1/v1", "m", api_key_env="THE_KEY").check()
    assert KEY not in str(raised.value)
    assert raised.value.__cause__ is None


def test_a_key_in_place_of_its_variable_is_not_told():
    asked = Server("http://localhost:1/v1", "m", api_key_env=KEY)
    with pytest.raises(
        ValueError, match=r"server_key_env: found nothing in .*names, expected the server's key"
    ) as raised:
        asked.check()
    assert KEY not in str(raised.value) + repr(asked)


def test_another_programs_key_is_not_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Proxy(fault=lambda *_: answer(completion("w1"))) as proxy:
        server(proxy).answer(["a"], GREEDY, [0])
    assert proxy.keys == ["Bearer none"]

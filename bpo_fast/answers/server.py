"""Answers of an OpenAI-compatible server, vLLM for one: many requests at a time, each repeated until it is answered.

The key comes from an environment variable, is read when the server is asked and kept nowhere: no field, log record or
error holds it. Waiting and asking again are the client library's: exponential backoff with jitter, or as long as the
server's `Retry-After` says. What the library would take for an answer, such as JSON that was cut off, is made a failed
request here. A request that waits to be repeated keeps its place, so that a server that is overrun gets fewer.
"""

import asyncio
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from urllib.parse import urlsplit

from bpo_fast.answers.generate import GenerationSettings, Response
from bpo_fast.runs.numbers import COUNT, POSITIVE, Range, check_numbers
from bpo_fast.runs.text import printable, shown

# Of the first request, which finds out a wrong address.
_START_RETRIES, _START_TIMEOUT = 2, 30.0
_SEED_BITS = 31  # what every server takes
_RETRIES = Range("a whole number of at least 0", lambda x: x >= 0, whole=True)


@dataclass(frozen=True)
class Server:
    """A server, the model asked of it, and how it is asked.

    Args:
        base_url: address of the API, which usually ends in /v1.
        model: the model's name there.
        api_key_env: name of the environment variable that holds the key; None for a server without one.
        max_concurrency: requests at a time.
        timeout: seconds to wait for an answer before it is asked for again.
        max_retries: times that a request is asked again, waiting 0.5, 1, 2, 4 and then 8 seconds each time, or as
            long as the server says. 20 are two minutes and a half of a server that is away.

    Raises:
        ValueError: an option out of its range.
    """

    base_url: str
    model: str
    api_key_env: str | None = field(default=None, repr=False)
    max_concurrency: int = 32
    timeout: float = 300.0
    max_retries: int = 20

    def __post_init__(self):
        ranges = {"server_concurrency": COUNT, "server_timeout": POSITIVE, "server_retries": _RETRIES}
        values = self.max_concurrency, self.timeout, self.max_retries
        check_numbers(SimpleNamespace(**dict(zip(ranges, values, strict=True))), ranges)  # the command line's names
        address = urlsplit(self.base_url)
        if "@" in address.netloc or address.query:
            raise ValueError(
                "server_url: found a password or a query in it, expected an address alone; name the environment "
                "variable of the key as server_key_env."
            )
        if address.scheme not in ("http", "https") or not address.netloc:
            raise ValueError(
                f"server_url: found {shown(self.base_url)}, expected an address such as http://localhost:8000/v1."
            )
        if not self.model:
            raise ValueError("server_model: found none, expected the name of a model that the server has.")

    def check(self) -> None:
        """Refuse a server that cannot be reached, refuses the key, or does not have the model.

        Raises:
            ImportError: the client library is not installed.
            ValueError: the key is missing or refused, or the server lists other models.
            ConnectionError: the server gives no answer.
        """
        names = self._run(self._list_models)
        if self.model not in names:
            listed = ", ".join(map(shown, sorted(names)[:20])) or "none"
            raise ValueError(f"server_model: found {self.model!r}, expected one that {self.base_url} lists: {listed}.")

    def answer(self, prompts: Sequence[str], settings: GenerationSettings, seeds: Sequence[int]) -> list[Response]:
        """Answer prompts of text, each as one user turn.

        Greedy decoding is asked for as temperature 0. What else the server does by default, it does here: a top_k of
        the model's own `generation_config.json`, for one.

        Args:
            prompts: N prompts.
            settings: how to decode.
            seeds: of sampling, one a prompt; their lowest 31 bits are asked for.

        Returns:
            N answers in the order of the prompts; an empty one to a prompt that is too long for the model.

        Raises:
            ImportError, ValueError, ConnectionError: as those of `check`, or a request that is refused.
        """
        decoding = {"max_tokens": settings.max_new_tokens, "temperature": 0.0}
        if settings.do_sample:
            sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
            decoding |= {"temperature": 1.0} | {name: x for name, x in sampling.items() if x is not None}
        return self._run(self._answer, prompts, decoding, [seed % (1 << _SEED_BITS) for seed in seeds])

    def _run(self, function, *arguments):
        """What an asynchronous function of a client returns. It has a thread's own loop: a notebook runs one here."""
        try:
            from anyio.from_thread import start_blocking_portal
            from openai import APIError, AsyncOpenAI, DefaultAsyncHttpxClient
        except ImportError:
            raise ImportError("server: found no openai, which asks servers; pip install 'openai>=3.57'.") from None

        async def run():
            http = DefaultAsyncHttpxClient(event_hooks={"response": [_check_body]})
            # Without a key of ours the library would send whatever OPENAI_API_KEY holds.
            options = {"base_url": self.base_url, "timeout": self.timeout, "max_retries": self.max_retries}
            async with AsyncOpenAI(api_key=self._key() or "none", http_client=http, **options) as client:
                return await function(client, *arguments)

        try:
            with start_blocking_portal() as portal:
                return portal.call(run)
        except* APIError as group:
            error = group.exceptions[0]
        raise self._told(error)

    async def _list_models(self, client):
        quick = client.with_options(
            max_retries=min(_START_RETRIES, self.max_retries), timeout=min(_START_TIMEOUT, self.timeout)
        )
        return [model.id async for model in quick.models.list()]

    async def _answer(self, client, prompts, decoding, seeds):
        places = asyncio.Semaphore(self.max_concurrency)

        async def ask(prompt, seed):
            from openai import APIStatusError

            messages = [{"role": "user", "content": prompt}]
            async with places:
                try:
                    found = await client.chat.completions.create(
                        model=self.model, messages=messages, seed=seed, **decoding
                    )
                except APIStatusError as error:
                    if not _is_too_long(error):
                        raise
                    return Response("", False)
            choice = found.choices[0]
            return Response((choice.message.content or "").strip(), choice.finish_reason == "length")

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(*each)) for each in zip(prompts, seeds, strict=True)]
        return [task.result() for task in tasks]

    def _key(self):
        """The key, or None for a server without one."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "")
        # The letters of a bearer token (RFC 6750, section 2.1): what no header takes would come back in an error.
        if not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", key):
            found = "characters that no key has" if key else "nothing"
            # Not the name: it may be a key by mistake.
            raise ValueError(
                f"server_key_env: found {found} in the environment variable that it names, expected the server's key; "
                "export it there, or leave server_key_env out."
            )
        return key

    def _told(self, error) -> Exception:
        """One sentence for an error of the client, without the requests in it, which hold the key."""
        status = getattr(error, "status_code", None)
        said = printable(_said(error))
        if key := self._key():
            said = said.replace(key, "***")
        said = shown(said)
        if status in (401, 403):
            whose = "a request without a key" if self.api_key_env is None else f"the key in {self.api_key_env}"
            return ValueError(
                f"server_key_env: found that {self.base_url} refuses {whose} ({status}: {said}), expected the name of "
                "an environment variable whose key it takes."
            )
        if status is not None and status < 500 and status not in (408, 409, 429):
            return ValueError(
                f"server_url: found that {self.base_url} refuses a request ({status}: {said}), expected an answer; "
                "see that it ends as the server's documentation says, mostly in /v1, and that it has the model "
                f"{shown(self.model)}."
            )
        reason = said if status is None else f"{status}: {said}"
        return ConnectionError(
            f"server_url: found no answer of {self.base_url} after up to {self.max_retries} more tries ({reason}), "
            "expected one; see to the server, or raise server_retries or server_timeout, and give the same command "
            "again."
        )


async def _check_body(response) -> None:
    """Have the client ask again where a body is not what its kind of request is answered by.

    Raises:
        httpx2.DecodingError: it is cut off, no JSON, or an error in an answer's place.
    """
    if not response.is_success:
        return
    await response.aread()
    try:
        body = json.loads(response.content)
        completion = response.request.method == "POST"
        whole = [choice["message"]["role"] for choice in body["choices"]] if completion else body["data"] is not None
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        from httpx2 import DecodingError

        raise DecodingError("an answer that is not whole", request=response.request)


def _said(error) -> str:
    """What the server says of an error, or the client."""
    said = error.body
    if isinstance(said, dict):
        said = said.get("message") or said.get("detail") or said
    return str(said or error)


def _is_too_long(error) -> bool:
    """Whether a request is refused for the length of its prompt, which concerns that sample alone."""
    return error.status_code == 413 or (error.status_code == 400 and "context" in _said(error).lower())

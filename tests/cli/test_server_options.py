import pytest

from bpo_fast.answers.server import Server
from bpo_fast.bootstrap.error_injected import ErrorInjected
from bpo_fast.cli.bootstrap_options import BootstrapArguments

ASKED = {"kinds": ["error_injected"], "server_url": "http://localhost:8000/v1", "server_model": "m"}


def parsed(**options):
    return BootstrapArguments(model_name_or_path="model", annotations="data.json", **options)


def test_options_of_a_server_make_the_kind_that_asks_it():
    numbers = {"server_concurrency": 7, "server_timeout": 2.5, "server_retries": 0}
    arguments = parsed(**ASKED, **numbers, server_key_env="THE_KEY", errors=["count", "mixed"], seed=3)
    (maker,) = arguments.run_options()["kinds"]
    server = Server("http://localhost:8000/v1", "m", "THE_KEY", max_concurrency=7, timeout=2.5, max_retries=0)
    assert maker == ErrorInjected(("count", "mixed"), seed=3, server=server)
    (plain,) = parsed(**ASKED).run_options()["kinds"]
    assert plain == ErrorInjected(server=Server("http://localhost:8000/v1", "m"))
    assert parsed(kinds=["error_injected"]).run_options()["kinds"] == [ErrorInjected()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**ASKED, "server_model": None}, "server_url: found it without server_model, expected both"),
        ({**ASKED, "server_url": None}, "server_model: found it without server_url, expected both"),
        ({"kinds": ["error_injected"], "server_key_env": "K"}, "server_key_env: found it without server_url"),
        ({"kinds": ["error_injected"], "server_retries": 3}, "server_retries: found it without server_url"),
        ({"server_url": "http://a", "server_model": "m"}, "server_url: found it without the kind error_injected"),
        ({"server_timeout": 3}, "server_timeout: found it without the kind error_injected"),
        ({**ASKED, "server_retries": -1}, "server_retries: found -1, expected a whole number of at least 0"),
        ({**ASKED, "server_timeout": 0}, "server_timeout: found 0, expected a positive number"),
    ],
)
def test_mistakes_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        parsed(**options)

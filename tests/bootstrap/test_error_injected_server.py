"""Runs that ask a real server, `transformers serve` with a tiny Llama, through a proxy that puts faults in."""

import json
import logging
import random
import time
from collections import Counter

import pytest

pytest.importorskip("openai", reason="needs openai: pip install 'openai>=3.57'")

import torch
from openai_server import FAULTS, MODEL, NO_ANSWER, Proxy, answer, completion, make_llama, transformers_serve
from PIL import Image

from bpo_fast.answers.generate import GenerationSettings, Response
from bpo_fast.answers.server import Server
from bpo_fast.bootstrap import bootstrap
from bpo_fast.bootstrap.error_injected import ErrorInjected
from bpo_fast.cli.main import main
from bpo_fast.data import load_preference_dataset

KEY = "sk-not-to-be-seen-0123456789"
COUNT = 16
DECODING = GenerationSettings(max_new_tokens=4)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def served(hub):
    """Address of the server."""
    with transformers_serve(hub) as address:
        yield address


@pytest.fixture
def annotated(tmp_path):
    """(records, image folder): questions and answers of words that the served model knows."""
    (tmp_path / "images").mkdir()
    records = []
    for n in range(COUNT):
        Image.frombytes("RGB", (4, 4), random.Random(n).randbytes(48)).save(tmp_path / "images" / f"{n}.png")
        turns = [{"from": "human", "value": f"<image> w{n}"}, {"from": "gpt", "value": f"w{n + 1} w{n + 2}"}]
        records.append({"id": str(n), "image": f"{n}.png", "conversations": turns})
    return records, tmp_path / "images"


@pytest.fixture
def maker(tmp_path):
    """An ErrorInjected of a server, with a template of one line."""
    content = {"version": "1", "prompt": "{error} {question} {response}", "errors": {"w7": {}, "w8": {}}}
    (tmp_path / "template.json").write_text(json.dumps(content))

    def make(url, **options):
        server = Server(url, MODEL, **{"max_concurrency": 4, "timeout": 20, **options})
        return ErrorInjected(template=tmp_path / "template.json", decoding=DECODING, server=server)

    return make


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_real_server_answers_each_prompt_as_its_model_does(served):
    model, tokenizer = make_llama()
    prompts, expected = [f"w{n} w{n + 1}" for n in range(COUNT)], []
    for prompt in prompts:
        ids = tokenizer(f"<s> {prompt} ASSISTANT:", add_special_tokens=False, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(DECODING.max_new_tokens):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        expected.append(Response(tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip(), True))
    assert len(set(expected)) > COUNT / 2
    server = Server(served, MODEL, timeout=20)
    server.check()
    assert server.answer(prompts, DECODING, range(COUNT)) == expected


def test_a_run_through_all_faults_ends_as_one_without_and_holds_no_key(
    served, hub, annotated, maker, tmp_path, monkeypatch, caplog
):
    """Every fault once, a time-out, a server that goes away and comes back, and a run that is ended and goes on."""
    monkeypatch.setenv("THE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    options = {"batch_size": 5, "rows_per_part": 10}
    whole = bootstrap(None, None, *annotated, tmp_path / "whole", kinds=[maker(served)], **options)
    assert len(whole) == COUNT
    faults, handed_on, refused = dict(enumerate(FAULTS.values(), start=2)), [], []
    late, away = len(FAULTS) + 2, len(FAULTS) + 5

    def fault(number, body):
        if number == late:
            time.sleep(4)  # longer than the client waits
        if number == away:
            proxy.die(1)
            time.sleep(0.5)
            return NO_ANSWER
        if len(set(handed_on)) > 10 and not refused:  # in the second part
            refused.append(number)
            return answer({"error": f"{KEY} is used up"}, 403)
        if body and number not in faults:
            handed_on.append(body["messages"][0]["content"])
        return faults.get(number)

    out = tmp_path / "out"
    with Proxy(served, fault) as proxy:
        asking = [maker(proxy.url, api_key_env="THE_KEY", timeout=3)]
        with pytest.raises(
            ValueError, match=r"server_key_env: found that http.* refuses the key in THE_KEY"
        ) as raised:
            bootstrap(None, None, *annotated, out, kinds=asking, **options)
        kept = [line for path in sorted(out.glob("parts/*.jsonl")) for line in path.read_text().splitlines()]
        assert len(kept) == 10
        asked = len(proxy.bodies)
        bootstrap(None, None, *annotated, out, kinds=asking, **options)
    again = [body["messages"][0]["content"] for body in proxy.bodies[asked:] if body]
    assert len(set(again)) == COUNT - len(kept)  # what was kept is not asked twice
    assert len(set(handed_on)) == COUNT
    journals = [line for path in sorted(out.glob("parts/*.jsonl")) for line in path.read_text().splitlines()]
    assert journals[: len(kept)] == kept
    assert set(Counter(json.loads(line)["key"] for line in journals).values()) == {1}
    assert {name: data for name, data in contents(out).items() if not name.startswith(".")} == contents(
        tmp_path / "whole"
    )
    written = b"".join([*contents(out).values(), *contents(hub).values()]).decode(errors="replace")
    said = caplog.text + str(raised.value) + "".join(str(vars(record)) for record in caplog.records)
    assert "***" in str(raised.value)
    assert KEY not in written + said + repr(asking)
    assert set(proxy.keys) == {f"Bearer {KEY}"}


def test_the_command_line_loads_no_model_and_shows_no_key(annotated, maker, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("THE_KEY", KEY)
    maker("http://localhost/v1")  # writes the template
    records, images = annotated
    (tmp_path / "data.json").write_text(json.dumps(records))
    listed = answer({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
    with Proxy(fault=lambda _, body: answer(completion("w50 w51")) if body else listed) as proxy:
        asked = ["--server_url", proxy.url, "--server_model", MODEL, "--server_key_env", "THE_KEY"]
        files = ["--annotations", tmp_path / "data.json", "--image_folder", images, "--output_dir", tmp_path / "out"]
        kind = ["--kinds", "error_injected", "--error_template", tmp_path / "template.json"]
        command = ["bootstrap", "--model_name_or_path", "someone/elsewhere", *asked, *files, *kind]
        assert main([*map(str, command)]) == 0
    pairs = load_preference_dataset(tmp_path / "out")
    assert [pair["rejected"][0]["content"][0]["text"] for pair in pairs] == ["w50 w51"] * COUNT
    assert {pair["model"] for pair in pairs} == {MODEL}
    written = b"".join(contents(tmp_path / "out").values()).decode(errors="replace")
    assert KEY not in written + "".join(capsys.readouterr())
    assert set(proxy.keys) == {f"Bearer {KEY}"}

"""/v1/completions over the real engine: text and ids in, text, ids and log-probabilities out."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from scripted import Script, ScriptedEngine
from served import asgi_client
from test_chat import events

from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import Tokenizer

URL = "/v1/completions"
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_prompt_shapes(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("Hello world")
    for prompt, count in (
        ("Hello world", 1),
        (["Hello world"] * 2, 2),
        (ids, 1),
        ([ids, ids, ids], 3),
        (["Hello world", ids], 2),
    ):
        script.add(*[" and more"] * count * 2)
        response = await client.post(URL, json={"prompt": prompt, "max_tokens": 2, "n": 2, "return_token_ids": True})
        body = response.json()
        assert [c["index"] for c in body["choices"]] == list(range(2 * count))
        assert all(c["text"] == " and more" and c["finish_reason"] == "length" for c in body["choices"])
        assert all(
            c["prompt_token_ids"] == ids and c["token_ids"] == tokenizer.encode(" and more") for c in body["choices"]
        )
        assert engine.prompts[-1] == ids and body["usage"]["prompt_tokens"] == len(ids) * count
        assert body["usage"]["completion_tokens"] == 4 * count


async def test_echo_scores_the_prompt(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    text = "The quick brown fox"
    ids = tokenizer.encode(text)
    body = (await client.post(URL, json={"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 2})).json()
    [choice] = body["choices"]
    scores = choice["logprobs"]
    assert choice["text"] == text and choice["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 0
    assert "".join(scores["tokens"]) == text and len(scores["token_logprobs"]) == len(ids)
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    assert all(s < 0 for s in scores["token_logprobs"][1:]) and scores["text_offset"] == [0, 3, 9, 15]
    more = (
        await client.post(URL, json={"prompt": text, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0})
    ).json()
    scores_1 = more["choices"][0]["logprobs"]
    assert len(scores_1["tokens"]) == len(ids) + 1 and scores_1["token_logprobs"][1:-1] == scores["token_logprobs"][1:]
    for name, score, top in zip(*(scores_1[k][1:] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top[name] == score  # bit-equal
    assert scores_1["token_logprobs"][-1] == max(scores_1["top_logprobs"][-1].values())


async def test_stream_stop_and_usage(client: httpx.AsyncClient, script: Script) -> None:
    script.add("one two three four", "one two three four")
    request: dict[str, Any] = {"prompt": "x", "stop": ["e f"], "max_tokens": 50}
    whole = (await client.post(URL, json=request)).json()
    assert whole["choices"][0]["text"] == "one two thre" and whole["choices"][0]["finish_reason"] == "stop"
    chunks = events(
        await client.post(
            URL,
            json={**request, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        )
    )
    assert "".join(c["text"] for chunk in chunks for c in chunk["choices"]) == "one two thre"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["usage"] for chunk in chunks) and chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


async def test_special_tokens_end_and_stay_out_of_text(client: httpx.AsyncClient, script: Script) -> None:
    script.add("a<|end|>b<|return|>")
    body = (await client.post(URL, json={"prompt": "x", "max_tokens": 9, "logprobs": 0})).json()
    assert body["choices"][0]["text"] == "ab" and body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["logprobs"]["tokens"] == ["a", "<|end|>", "b", "<|return|>"]


async def test_same_seed_same_answer(client: httpx.AsyncClient) -> None:
    request = {"prompt": "x", "seed": 5, "n": 2, "max_tokens": 8, "return_token_ids": True}
    first, second = [(await client.post(URL, json=request)).json()["choices"] for _ in range(2)]
    assert first == second and first[0]["token_ids"] != first[1]["token_ids"]


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": 5},
        {"prompt": [1, "a"]},
        {"prompt": [201088]},
        {"prompt": [-1]},
        {"prompt": [True]},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "max_tokens": -1},
        {"prompt": "x", "logprobs": 21},
        {"prompt": "x", "best_of": 3},
        {"prompt": "x", "suffix": "y"},
        {"prompt": "x", "repetition_penalty": 1.2},
        {"prompt": [[1], 2]},
        {"prompt": [2**40]},
        {"prompt": [10**30]},
        {"prompt": ["x"] * 600, "n": 2},
    ],
)
async def test_refused(client: httpx.AsyncClient, extra: dict[str, Any]) -> None:
    response = await client.post(URL, json=extra)
    assert response.status_code == 400 and response.json()["error"]["message"], response.text


async def test_without_tokenizer(engine: ScriptedEngine, options: ServerOptions, script: Script) -> None:
    client = asgi_client(build_app(engine, None, options))
    script.add([11, 12, 13])
    body = (
        await client.post(
            URL, json={"prompt": [1, 2, 3], "max_tokens": 3, "return_token_ids": True, "echo": True, "logprobs": 1}
        )
    ).json()
    assert (
        body["choices"][0]["token_ids"] == [11, 12, 13]
        and body["choices"][0]["logprobs"]["tokens"][-1] == "token_id:13"
    )
    for url, request in (
        (URL, {"prompt": "text"}),
        (URL, {"prompt": [1], "stop": "x"}),
        ("/tokenize", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        response = await client.post(url, json=request)
        assert response.status_code == 400 and response.json()["error"]["code"] == "tokenizer_unavailable"

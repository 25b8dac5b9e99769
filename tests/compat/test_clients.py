"""Tool loops of agent frameworks and command lines against the real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compat import NODE, PYTHON, Served, need_node, need_python

CALL = (
    "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    '<|constrain|>json<|message|>{"city": "Paris"}<|call|>'
)
ANSWER = "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>It is sunny.<|return|>"


@need_python("agents")
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_openai_agents(served: Served, api: str) -> None:
    served.script.add(CALL, ANSWER, CALL, ANSWER)
    seen = served.client("agents_loop.py", api)
    assert seen["calls"] == ["Paris", "Paris"] and seen["outputs"] == ["It is sunny."] * 2
    assert "raw_response_event" in seen["kinds"] and len(served.engine.prompts) == 4
    text = served.prompt()
    assert text.count("Paris is sunny") == 2 and text.count("Look.") == 1  # the old reasoning went with its final answer


@need_node("ai")
@pytest.mark.parametrize("provider", ["compatible", "chat", "responses", "open-responses"])
def test_ai_sdk(served: Served, provider: str) -> None:
    if not (Path(NODE) / "node_modules/@ai-sdk/open-responses").is_dir() and provider == "open-responses":
        pytest.skip("@ai-sdk/open-responses is not installed")
    served.script.add(CALL, ANSWER, CALL, ANSWER)
    seen = served.client("ai_sdk.mjs", provider)
    assert seen["calls"] == ["Paris", "Paris"] and seen["outputs"] == ["It is sunny."] * 2 and seen["steps"] == [2, 2]
    assert "Paris is sunny" in served.prompt()
    assert served.prompt().count("Look.") == 1  # although the provider open-responses sends no reasoning back


@need_python("llm")
def test_llm(served: Served, tmp_path: Path) -> None:
    settings = {"model_id": "local", "model_name": "gpt-oss", "api_base": served.base, "api_key_name": "gptoss"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([{**settings, "supports_tools": True}]))
    (tmp_path / "keys.json").write_text(json.dumps({"gptoss": "key"}))
    command = [str(Path(PYTHON).parent / "llm"), "-m", "local"]
    environment = {"env": {"LLM_USER_PATH": str(tmp_path)}}
    served.script.add(ANSWER, ANSWER, CALL, ANSWER)
    assert served.run([*command, "hi"], **environment).strip() == "It is sunny."
    assert served.run([*command, "--no-stream", "-c", "again"], **environment).strip() == "It is sunny."
    assert "It is sunny." in served.prompt()
    functions = "def get_weather(city: str) -> str:\n    'Weather'\n    return city + ' is sunny'\n"
    assert served.run([*command, "--functions", functions, "Weather?"], **environment).strip() == "It is sunny."
    assert "Paris is sunny" in served.prompt() and len(served.engine.prompts) == 4


@need_node("@openai/codex")
def test_codex(served: Served, tmp_path: Path) -> None:
    """One shell command, run by Codex, whose output is in the next prompt, after the model's own reasoning."""
    (tmp_path / "config.toml").write_text(
        'model = "gpt-oss"\nmodel_provider = "local"\n[model_providers.local]\nname = "local"\n'
        f'base_url = "{served.base}"\nwire_api = "responses"\nenv_key = "GPTOSS_KEY"\n'
    )
    (tmp_path / "work").mkdir()
    run = CALL.replace("get_weather", "exec_command").replace('"city": "Paris"', '"cmd": "echo made-$((6*7)) | tee made"')
    served.script.add(run, ANSWER)
    command = [str(Path(NODE) / "node_modules/.bin/codex"), "exec", "--json", "--skip-git-repo-check"]
    output = served.run(
        [*command, "--dangerously-bypass-approvals-and-sandbox", "Make it."],
        env={"CODEX_HOME": str(tmp_path)},
        cwd=tmp_path / "work",
    )
    assert "It is sunny." in output and (tmp_path / "work/made").read_text() == "made-42\n"
    assert "made-42" in served.prompt().rpartition("<|call|>")[2] and "Look." in served.prompt()

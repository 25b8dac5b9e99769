"""Requests for structured output, and what their answers must be."""

from __future__ import annotations

import json
from typing import Any

import httpx
from jsonschema import Draft202012Validator

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
USER = [{"role": "user", "content": "Go."}]
STRING = {"type": "string"}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city"],
}
FINAL = "<|channel|>analysis<|message|>{not json}<|end|><|start|>assistant<|channel|>final<|message|>"


def formatted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def valid(text: str, schema: Any) -> bool:
    return Draft202012Validator(schema).is_valid(json.loads(text))


async def chat(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(CHAT, json={"messages": USER, "max_tokens": 600, **body}, timeout=600)
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]

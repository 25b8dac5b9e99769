"""POST /v1/responses/compact: a conversation becomes one item that holds the model's summary of it."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptoss_compile.runtime.api.errors import bad_request
from gptoss_compile.runtime.api.generation import Answers, Context, Submission
from gptoss_compile.runtime.api.harmony import STOP_IDS, HarmonyParser
from gptoss_compile.runtime.api.http import read_json, until_disconnect
from gptoss_compile.runtime.api.render import Prompt, Turn, message_tokens
from gptoss_compile.runtime.api.responses_conversation import conversation, render_input
from gptoss_compile.runtime.api.responses_run import usage
from gptoss_compile.runtime.api.responses_schema import CompactBody
from gptoss_compile.runtime.sampling_params import SamplingParams

MAX_TOKENS = 4096
_ASK = (
    "Summarise our conversation so far, so that you can go on from the summary alone. Keep what I asked for and how I "
    "want it done, every fact, name, number and decision that may matter later, the results of tools, and what remains "
    "to be done. Write the summary only."
)
_HEAD = "What we said before this, in summary:\n\n"


async def compact(request: Request) -> Response:
    context: Context = request.app.state.context
    body = await read_json(request, CompactBody, context.options)
    context.served(body.model)
    if not body.input and body.previous_response_id is None:
        raise bad_request("input is missing.", "input")
    prompt, _, _ = conversation(context, body)
    prompt = replace(prompt, turns=[*prompt.turns, Turn("user", _ASK)], tools=(), effort="low", namespaces=())
    return JSONResponse(await until_disconnect(request, _compacted(context, prompt)))


async def _compacted(context: Context, prompt: Prompt) -> dict[str, object]:
    tokenizer = context.text_tokenizer()
    ids = await render_input(context, prompt, context.prompt_limit(None))
    parser = HarmonyParser(tokenizer)
    cached = tokens = reasoning = 0
    async with Answers(context, "input") as answers:
        await answers.submit([Submission(ids, SamplingParams(max_tokens=MAX_TOKENS, stop_token_ids=STOP_IDS))])
        async for _, new in answers.outputs():
            cached, tokens = max(cached, new.cached_tokens), tokens + len(new.token_ids)
            for token in new.token_ids:
                reasoning += sum(each.from_token for each in parser.push(token) if each.message.channel == "analysis")
    parser.finish()
    context.metrics.harmony_repairs.inc(parser.repairs)
    texts = [message.text for message in parser.messages if message.channel == "final"]
    summary = "\n\n".join(texts or [message.text for message in parser.messages])
    sealed = await message_tokens(tokenizer, Turn("user", _HEAD + summary), MAX_TOKENS * 4)
    item = {
        "id": f"cmp_{secrets.token_hex(16)}",
        "type": "compaction",
        "encrypted_content": context.seal.close(tuple(sealed)),
    }
    return {
        "id": f"resp_{secrets.token_hex(16)}",
        "object": "response.compaction",
        "created_at": int(time.time()),
        "output": [item],
        "usage": usage(len(ids), cached, tokens, reasoning),
    }

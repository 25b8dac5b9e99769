"""openai-agents: two user turns, each with a tool call in between. Arguments: base URL, chat or responses."""

import asyncio
import json
import sys

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

set_tracing_disabled(True)
calls = []


@function_tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    calls.append(city)
    return f"{city} is sunny"


async def main() -> None:
    base, api = sys.argv[1:3]
    kind = OpenAIChatCompletionsModel if api == "chat" else OpenAIResponsesModel
    model = kind(model="gpt-oss", openai_client=AsyncOpenAI(base_url=base, api_key="key"))
    agent = Agent(name="Helper", instructions="Be brief.", model=model, tools=[get_weather])
    first = await Runner.run(agent, "Weather in Paris?")
    history = [*first.to_input_list(), {"role": "user", "content": "And again?"}]
    second = Runner.run_streamed(agent, history)
    kinds = [event.type async for event in second.stream_events()]
    print(json.dumps({"calls": calls, "outputs": [first.final_output, second.final_output], "kinds": sorted(set(kinds))}))


asyncio.run(main())

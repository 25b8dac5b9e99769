// The Vercel AI SDK: a tool loop, whole and streamed, then a second user turn. Arguments: base URL, provider.
import { generateText, streamText, stepCountIs, tool } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";

const [base, provider] = process.argv.slice(2);
const settings = { baseURL: base, apiKey: "key", name: "local" };
let model;
if (provider === "compatible") model = createOpenAICompatible(settings)("gpt-oss");
else if (provider === "chat") model = createOpenAI(settings).chat("gpt-oss");
else if (provider === "responses") model = createOpenAI(settings).responses("gpt-oss");
else {
  const { createOpenResponses } = await import("@ai-sdk/open-responses");
  model = createOpenResponses({ ...settings, url: `${base}/responses` })("gpt-oss");
}

const calls = [];
const tools = {
  get_weather: tool({
    description: "Weather of a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => {
      calls.push(city);
      return `${city} is sunny`;
    },
  }),
};
const common = { model, tools, stopWhen: stepCountIs(4), maxRetries: 0 };
const messages = [{ role: "user", content: "Weather in Paris?" }];
const first = await generateText({ ...common, messages });
messages.push(...first.response.messages, { role: "user", content: "And again?" });
const second = streamText({ ...common, messages, onError: ({ error }) => { throw error; } });
let streamed = "";
for await (const part of second.textStream) streamed += part;
console.log(JSON.stringify({
  calls,
  outputs: [first.text, streamed],
  steps: [first.steps.length, (await second.steps).length],
  reasoning: first.steps.map((step) => step.reasoningText ?? null),
}));

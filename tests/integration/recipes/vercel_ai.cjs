// Calls by Vercel's AI SDK: node vercel_ai.cjs NODE_MODULES URL TEST_ID QUESTION PROVIDER RETRIES [stream|tool|abort]
// PROVIDER is openai (the Responses API), chat (OpenAI's chat completions) or anthropic; RETRIES is a number, or "default".
// Prints JSON: what the caller got.
const { createRequire } = require("node:module");
const [modules, url, test, question, provider, retries, how = ""] = process.argv.slice(2);
const load = createRequire(`${modules}/`);
const { generateText, streamText, stepCountIs, tool } = load("ai");
const { z } = load("zod");

const options = { baseURL: `${url}/v1`, apiKey: "sk-1", headers: { "x-test-id": test } };
const openai = load("@ai-sdk/openai").createOpenAI(options);
const models = {
  openai: () => openai("gpt-4o"),
  chat: () => openai.chat("gpt-4o"),
  anthropic: () => load("@ai-sdk/anthropic").createAnthropic(options)("claude-sonnet-5"),
};
const asked = { model: models[provider](), prompt: question, maxOutputTokens: 50, onError: () => {} };
if (retries !== "default") asked.maxRetries = Number(retries);

async function call() {
  if (how === "tool") {
    const cities = [];
    const execute = async ({ city }) => (cities.push(city), "sunny");
    const weather = tool({ description: "of a city", inputSchema: z.object({ city: z.string() }), execute });
    const { text } = await generateText({ ...asked, tools: { weather }, stopWhen: stepCountIs(2) });
    return { text, cities };
  }
  if (how === "") {
    const { text, usage } = await generateText(asked);
    return { text, usage };
  }
  const controller = new AbortController();
  const stream = streamText({ ...asked, abortSignal: controller.signal });
  let text = "";
  for await (const part of stream.textStream) {
    text += part;
    if (how === "abort") controller.abort();
  }
  return { text };
}

call()
  .catch((error) => ({ error: error.name, status: (error.lastError ?? error).statusCode, message: String(error.message) }))
  .then((result) => console.log(JSON.stringify(result)));

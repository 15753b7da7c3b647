// Calls by OpenAI's SDK for Node: node openai_sdk.cjs NODE_MODULES BASE_URL TEST_ID QUESTION [stream|tool|abort]
// Prints JSON: what the caller got.
const { createRequire } = require("node:module");
const [modules, baseURL, test, question, how = ""] = process.argv.slice(2);
const { OpenAI } = createRequire(`${modules}/`)("openai");

const client = new OpenAI({ baseURL, apiKey: "sk-1", defaultHeaders: { "x-test-id": test } });
const asked = { model: "gpt-4o", max_tokens: 50, messages: [{ role: "user", content: question }] };
const parameters = { type: "object", properties: { city: { type: "string" } } };
const tools = [{ type: "function", function: { name: "weather", parameters } }];

async function call() {
  if (how === "tool") {
    const answer = await client.chat.completions.create({ ...asked, tools });
    return { tool: answer.choices[0].message.tool_calls[0].function };
  }
  if (how === "") {
    const answer = await client.chat.completions.create(asked);
    return { text: answer.choices[0].message.content, usage: answer.usage };
  }
  const stream = await client.chat.completions.create({ ...asked, stream: true });
  let text = "";
  for await (const part of stream) {
    text += part.choices[0]?.delta?.content ?? "";
    if (how === "abort" && text) stream.controller.abort();
  }
  return { text };
}

call()
  .catch((error) => ({ error: error.constructor.name, status: error.status, message: String(error.message) }))
  .then((result) => console.log(JSON.stringify(result)));

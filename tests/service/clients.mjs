// The official Node client against a running service, with its own defaults.
// Reads {url, model, absent, texts} from stdin and prints what it got as JSON; test_clients.py judges it.

import { readFileSync } from "node:fs";
import OpenAI, { APIError } from "openai";

const { url, model, absent, texts } = JSON.parse(readFileSync(0, "utf8"));
const sent = []; // every body as it left the client
const client = new OpenAI({
  baseURL: `${url}/v1`,
  apiKey: "none",
  fetch: (to, init) => {
    if (init.body) sent.push(JSON.parse(init.body));
    return fetch(to, init);
  },
});

async function failure(call) {
  try {
    await call;
  } catch (error) {
    if (!(error instanceof APIError)) throw error;
    const { status, type, param, code, message, requestID } = error;
    return { name: error.constructor.name, status, type, param, code, message, requestID };
  }
  throw new Error("the call was expected to fail, and did not");
}

const vectorsOf = (answer) => answer.data.map((item) => item.embedding);

const { data: all, response, request_id } = await client.embeddings
  .create({ model, input: texts }, { headers: { "x-request-id": "from-node" } })
  .withResponse();
const defaultsSent = { ...sent[0], input: sent[0].input.length };
const parts = await Promise.all(
  Array.from({ length: 10 }, (_, part) => texts.slice(part * 30, (part + 1) * 30)).map((input) =>
    client.embeddings.create({ model, input }),
  ),
);
const floats = await client.embeddings.create({ model, input: texts[0], encoding_format: "float" });
const cut = await client.embeddings.create({ model, input: texts[0], dimensions: 8 });
const listed = [];
for await (const each of client.models.list()) listed.push(each.id);

const answers = {
  defaultsSent,
  vectors: vectorsOf(all),
  indices: all.data.map((item) => item.index),
  usage: all.usage,
  named: all.model,
  requestId: request_id,
  headers: Object.fromEntries(response.headers),
  inParts: parts.flatMap(vectorsOf),
  floats: vectorsOf(floats)[0],
  cut: vectorsOf(cut)[0],
  listed,
  retrieved: await client.models.retrieve(model),
  failures: {
    absent: await failure(client.embeddings.create({ model: absent, input: "x" })),
    unknown: await failure(client.embeddings.create({ model: "nobody/nothing", input: "x" })),
    retrieved: await failure(client.models.retrieve(absent)),
    empty: await failure(client.embeddings.create({ model, input: "" })),
    foreignId: await failure(client.embeddings.create({ model, input: [[101, 30522, 102]] })),
  },
};
process.stdout.write(JSON.stringify(answers));

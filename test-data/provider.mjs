// A stand-in for a provider of models: answers OpenAI's chat completions on 127.0.0.1 without
// any model. `node provider.mjs DIRECTORY` prints its port. The answer is `you said: ` and the
// last message of the user. When that says `hold`, the answer is begun, and its rest comes once
// the file DIRECTORY/release is there. Every request is a line in DIRECTORY/completions.

import { appendFileSync, existsSync } from "node:fs";
import { createServer } from "node:http";

const directory = process.argv[2];

/** The text of a message, which is a string or parts. */
function text({ content }) {
  return typeof content === "string" ? content : content.map((part) => part.text ?? "").join("");
}

async function released(response) {
  while (!existsSync(`${directory}/release`) && !response.destroyed) {
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

const server = createServer(async (request, response) => {
  let body = "";
  for await (const piece of request) body += piece;
  const { model, messages = [], tools } = JSON.parse(body || "{}");
  const said = text(messages.findLast(({ role }) => role === "user") ?? { content: "" });
  // A title is asked for beside the answer, without tools, and is never held.
  const holds = tools !== undefined && said.includes("hold");
  appendFileSync(`${directory}/completions`, JSON.stringify({ path: request.url, said, holds }) + "\n");

  const send = (delta, finish_reason = null) => {
    const choices = [{ index: 0, delta, finish_reason }];
    response.write(`data: ${JSON.stringify({ id: "1", object: "chat.completion.chunk", created: 0, model, choices })}\n\n`);
  };
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  send({ role: "assistant", content: "you said: " });
  if (holds) await released(response);
  send({ content: said });
  send({}, "stop");
  response.end("data: [DONE]\n\n");
});

server.listen(0, "127.0.0.1", () => console.log(server.address().port));
// Whoever has started it holds the other end.
process.stdin.on("end", () => process.exit()).resume();

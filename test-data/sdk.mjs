// What a program does that uses OpenCode's SDK with one URL per workspace. It says what it has
// done in lines of JSON; before `killed` it waits for a line, so that opencode can be killed.

import assert from "node:assert/strict";
import { createInterface } from "node:readline";
import { createOpencodeClient } from "@opencode-ai/sdk/client";

const { URL_A, URL_B, DIRECTORY_A, DIRECTORY_B, CREDENTIALS } = process.env;
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const report = (step, rest = {}) => console.log(JSON.stringify({ step, ...rest }));

class Workspace {
  constructor(baseUrl, directory) {
    // Directory is what the SDK itself sends along; which one is meant is said by the URL.
    const config = { baseUrl, directory, headers: { Authorization: CREDENTIALS }, throwOnError: true };
    this.client = createOpencodeClient(config);
    this.errors = [];
    this.seen = [];
  }

  async listen() {
    const onSseError = (error) => this.errors.push(String(error));
    const { stream } = await this.client.event.subscribe({ sseDefaultRetryDelay: 100, onSseError });
    this.stream = stream;
    await this.event(({ type }) => type === "server.connected");
  }

  /** The next event for which this holds. All that came are kept. */
  async event(holds) {
    for (;;) {
      const { value, done } = await this.stream.next();
      assert(!done, `the stream has ended; before: ${JSON.stringify(this.seen)}`);
      this.seen.push(value);
      if (holds(value)) return value;
    }
  }

  /** Makes a session, and sees that made in the stream. */
  async session(title) {
    const { data } = await this.client.session.create({ body: { title } });
    const created = await this.event(({ type, properties }) => type === "session.created" && properties.info.id === data.id);
    return { ...data, created };
  }

  async sessions() {
    return (await this.client.session.list()).data.map(({ title }) => title).sort();
  }

  heard() {
    const created = this.seen.filter(({ type }) => type === "session.created");
    return created.map(({ properties }) => properties.info.title);
  }
}

const a = new Workspace(URL_A, DIRECTORY_A);
// This one says that it is elsewhere.
const b = new Workspace(URL_B, DIRECTORY_A);

for (const [workspace, directory] of [[a, DIRECTORY_A], [b, DIRECTORY_B]]) {
  const { data } = await workspace.client.path.get();
  assert.deepEqual([data.directory, data.worktree], [directory, directory]);
}
const projects = await Promise.all([a, b].map(({ client }) => client.project.current()));
assert.notEqual(projects[0].data.id, projects[1].data.id);
report("paths");

await Promise.all([a.listen(), b.listen()]);
for (const [workspace, title, directory] of [[a, "one", DIRECTORY_A], [b, "two", DIRECTORY_B], [a, "three", DIRECTORY_A]]) {
  assert.equal((await workspace.session(title)).directory, directory);
}
await b.session("four");
// Each has seen what came after the others': theirs would have come before.
assert.deepEqual([a.heard(), b.heard()], [["one", "three"], ["two", "four"]]);
assert.deepEqual([await a.sessions(), await b.sessions()], [["one", "three"], ["four", "two"]]);

// Many events in a row: none is lost, and they come in order.
const titles = Array.from({ length: 50 }, (_, at) => `many ${at}`);
for (const title of titles) await a.client.session.create({ body: { title } });
await a.event(({ type, properties }) => type === "session.created" && properties.info.title === titles.at(-1));
assert.deepEqual(a.heard(), ["one", "three", ...titles]);
report("streams");

await lines.next();
// The same iterators: it is the SDK that connects again, to the same URL.
await Promise.all([a, b].map((workspace) => workspace.event(({ type }) => type === "server.connected")));
assert.deepEqual([a.seen, b.seen].map((seen) => seen.filter(({ type }) => type === "server.connected").length), [2, 2]);
await a.session("five");
await b.session("six");
assert.deepEqual(await b.sessions(), ["four", "six", "two"]);
report("again", { errors: { a: a.errors, b: b.errors } });
process.exit();

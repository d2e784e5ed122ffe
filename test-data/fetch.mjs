// How long a call takes directly and through a workspace's URL, as JavaScript makes it: node's fetch, and
// OpenCode's SDK, which uses it. Both keep their connections. In turns, so that a machine that is busy for a
// while is so for both; prints medians in milliseconds as JSON.

import { createOpencodeClient } from "@opencode-ai/sdk/client";

const { DIRECT_URL, ROUTED_URL, DIRECTORY, CREDENTIALS } = process.env;
const headers = { Authorization: CREDENTIALS, "x-opencode-directory": encodeURIComponent(DIRECTORY) };
const IN_A_ROW = 300;
const AT_ONCE = 8;

const urls = [DIRECT_URL, ROUTED_URL];
const byFetch = urls.map((url) => async () => {
  const reply = await fetch(`${url}/path`, { headers });
  if (reply.status !== 200) throw new Error(`${url}: ${reply.status}`);
  await reply.json();
});
const bySdk = urls.map((baseUrl) => {
  const config = { baseUrl, directory: DIRECTORY, headers: { Authorization: CREDENTIALS }, throwOnError: true };
  const client = createOpencodeClient(config);
  return () => client.path.get();
});

const time = async (what) => {
  const start = performance.now();
  await what();
  return performance.now() - start;
};
const median = (samples) => samples.sort((a, b) => a - b)[Math.floor(samples.length / 2)];

/** The medians of both, each done so many times in a turn. */
const inTurns = async (times, what) => {
  const samples = [[], []];
  for (let turn = 0; turn < times; turn++) {
    for (const way of [0, 1]) samples[way].push(await time(what[way]));
  }
  return samples.map(median);
};
const atOnce = (what) => what.map((ask) => () => Promise.all(Array.from({ length: AT_ONCE }, ask)));

const results = {};
for (const [name, ways] of [["fetch", byFetch], ["sdk", bySdk]]) {
  // node compiles what is called often.
  await inTurns(200, ways);
  results[name] = { inARow: await inTurns(IN_A_ROW, ways), atOnce: await inTurns(IN_A_ROW, atOnce(ways)) };
}
console.log(JSON.stringify(results));

// How long a call takes directly, through a forwarder that only copies bytes, and through a workspace's URL,
// as JavaScript makes it: node's fetch, and OpenCode's SDK, which uses it. All keep their connections. In
// turns, so that a machine that is busy for a while is so for all; prints medians in milliseconds as JSON.

import { createOpencodeClient } from "@opencode-ai/sdk/client";

const { DIRECT_URL, FORWARDED_URL, ROUTED_URL, DIRECTORY, CREDENTIALS } = process.env;
const headers = { Authorization: CREDENTIALS, "x-opencode-directory": encodeURIComponent(DIRECTORY) };
// node and opencode compile what is called often: opencode takes half as long after some thousand calls.
const WARM_UP = 2500;
const IN_A_ROW = 3000;
const AT_ONCE = 8;
// In a third of the batches of eight, opencode collects garbage, which takes three times as long as the rest: only
// the mean of many batches compares.
const TOGETHER = { samples: 40, calls: 25 };

const urls = [DIRECT_URL, FORWARDED_URL, ROUTED_URL];
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

/** The mean of so many calls in a row. */
const time = async (calls, what) => {
  const start = performance.now();
  for (let call = 0; call < calls; call++) await what();
  return (performance.now() - start) / calls;
};
const median = (samples) => samples.sort((a, b) => a - b)[Math.floor(samples.length / 2)];

/** The medians of so many samples of each, taken in turns. */
const inTurns = async (samples, calls, what) => {
  const taken = what.map(() => []);
  for (let turn = 0; turn < samples; turn++) {
    for (const way of what.keys()) taken[way].push(await time(calls, what[way]));
  }
  return taken.map(median);
};
const atOnce = (what) => what.map((ask) => () => Promise.all(Array.from({ length: AT_ONCE }, ask)));

const results = {};
for (const [name, ways] of [["fetch", byFetch], ["sdk", bySdk]]) {
  await inTurns(WARM_UP, 1, ways);
  const inARow = await inTurns(IN_A_ROW, 1, ways);
  results[name] = { inARow, atOnce: await inTurns(TOGETHER.samples, TOGETHER.calls, atOnce(ways)) };
}
console.log(JSON.stringify(results));

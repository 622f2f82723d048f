/**
 * npm clients that put numbers, several at a time, and say on standard output what they send and what they hear:
 * `{"client": 4, "sent": 0}`, `{"client": 4, "answered": 0, "position": 17, "count": 17}`. The count is what the client's
 * own subscription shows when the answer comes.
 *
 * node ledger.mjs ADDRESS CLIENT…        with THROTTLED set, timers fire once a second, as those of a background tab do
 *
 * On standard input: `online` (a browser's word that the network is back), `finish` (put nothing new).
 */

import { createInterface } from "node:readline";

if (process.env.THROTTLED) {
  const { setTimeout } = globalThis;
  const nextTick = (delay) => Math.ceil((performance.now() + (delay ?? 0)) / 1000) * 1000 - performance.now();
  globalThis.setTimeout = (run, delay, ...rest) => setTimeout(run, nextTick(delay), ...rest);
}
globalThis.window = new EventTarget(); // before the clients are made: they listen there, as in a browser
const { ConvexClient } = await import("convex/browser");
const { anyApi: api } = await import("convex/server");

const IN_FLIGHT_COUNT = 4;
const [address, ...clients] = process.argv.slice(2);
let isFinishing = false;

const say = (client, what) => process.stdout.write(`${JSON.stringify({ client, ...what })}\n`);

async function put(client) {
  const convex = new ConvexClient(address, { logger: false, unsavedChangesWarning: false });
  let [sent, count] = [0, null];
  convex.onUpdate(api.puts.count, {}, (news) => {
    if (count !== null && news < count) say(client, { error: `the count went back from ${count} to ${news}` });
    count = news;
  });
  const lane = async () => {
    while (!isFinishing) {
      const number = sent++;
      say(client, { sent: number });
      const position = await convex.mutation(api.puts.put, { client, number });
      say(client, { answered: number, position, count });
    }
  };
  await Promise.all(Array.from({ length: IN_FLIGHT_COUNT }, lane));
  await convex.close();
}

createInterface({ input: process.stdin }).on("line", (word) => {
  if (word === "online") globalThis.window.dispatchEvent(new Event("online"));
  if (word === "finish") isFinishing = true;
});
await Promise.all(clients.map((client) => put(Number(client))));
process.exit(0);

/** The server is killed and started again under its clients. */

import assert from "node:assert/strict";
import { after } from "node:test";
import type { ConvexClient } from "convex/browser";
import { api } from "./api.ts";
import { Backend } from "./backend.ts";
import { connected, disconnected, failureOf, open, test, texts, watch } from "./clients.ts";

const backend = await Backend.start();
after(() => backend.close());

const numbered = (count: number, name: string): string[] => Array.from({ length: count }, (_, n) => `${name} ${n}`);

/** Send writes until told to stop, a few at a time; gives what was sent once all of it is acknowledged. */
async function writeUntil(
  client: ConvexClient,
  board: string,
  name: string,
  stopped: () => boolean,
): Promise<string[]> {
  const sent: string[] = [];
  const write = async (): Promise<void> => {
    while (!stopped()) {
      const text = `${name} ${sent.length}`;
      sent.push(text);
      await client.mutation(api.notes.add, { board, text });
    }
  };
  await Promise.all([write(), write(), write(), write()]);
  return sent;
}

test("mutations in flight while the server is killed are applied exactly once", async (t) => {
  const board = "killed";
  const names = ["ann", "ben", "cid"];
  const clients = names.map(() => open(t, backend));
  const watcher = open(t, backend);
  const seen = watch(watcher, api.notes.count, { board });
  let isOver = false;
  const writers = clients.map((client, n) => writeUntil(client, board, names[n]!, () => isOver));

  let countBefore = 0;
  for (let kill = 0; kill < 3; kill++) {
    await seen.until((count) => typeof count === "number" && count > countBefore + 30, "writes to go on");
    await backend.kill();
    countBefore = seen.last as number;
    await backend.resume();
  }
  await seen.until((count) => typeof count === "number" && count > countBefore + 30, "writes after the last kill");
  isOver = true;
  const sent = (await Promise.all(writers)).flat();

  const stored = (await open(t, backend).query(api.notes.list, { board })).map((note) => note.text);
  assert.deepEqual(stored.toSorted(), sent.toSorted());
});

test("who is gone when the server comes back has left", async (t) => {
  const seen = texts(open(t, backend), "died");
  const [leaving, watcher] = [open(t, backend), open(t, backend)];
  await leaving.mutation(api.visits.enter, { board: "died", name: "ann" });
  await watcher.mutation(api.notes.add, { board: "died", text: "a note" });
  await seen.untilEqual(["ann", "a note"]);
  await backend.kill();
  await leaving.close();
  await backend.resume();
  await seen.untilEqual(["a note"]);
});

test("what a client sent into the dead server is applied once it is back, in order", async (t) => {
  const client = open(t, backend);
  const seen = texts(client, "outage");
  await client.mutation(api.notes.add, { board: "outage", text: "before" });
  await backend.kill();
  const sent = numbered(20, "during");
  const answers = Promise.all(sent.map((text) => client.mutation(api.notes.add, { board: "outage", text })));
  await disconnected(client);
  await backend.resume();
  const ids = await answers;
  assert.deepEqual(seen.last, ["before", ...sent]);
  assert.equal(new Set(ids).size, sent.length);
});

test("results stay over an outage, and the first one after it has all that happened meanwhile", async (t) => {
  const client = open(t, backend);
  const seen = texts(client, "kept");
  const slow = watch(client, api.notes.countPatiently, { board: "kept", rounds: 500 });
  await client.mutation(api.notes.add, { board: "kept", text: "before" });
  await Promise.all([seen.untilEqual(["before"]), slow.untilEqual(1)]);
  const viewCount = seen.all.length;

  await backend.kill();
  await disconnected(client);
  const list = client.onUpdate(api.notes.list, { board: "kept" }, () => {});
  assert.deepEqual(
    list.getCurrentValue()?.map((note) => note.text),
    ["before"],
  );
  await backend.resume();
  await open(t, backend).mutation(api.notes.add, { board: "kept", text: "meanwhile" });
  await connected(client);
  await Promise.all([seen.untilEqual(["before", "meanwhile"]), slow.untilEqual(2)]);
  for (const view of seen.all.slice(viewCount)) assert((view as string[]).includes("before"));
});

test("a client is still signed in after the server was killed", async (t) => {
  const client = open(t, backend);
  client.setAuth(() => backend.token({ subject: "alice" }));
  const seen = watch(client, api.callers.whoami, {});
  await seen.until((view) => view !== null && "subject" in view && view.subject === "alice", "to be signed in");
  const viewCount = seen.all.length;
  await backend.kill();
  await disconnected(client);
  await backend.resume();
  assert.equal((await client.mutation(api.callers.whoamiAsMutation, {}))?.subject, "alice");
  for (const view of seen.all.slice(viewCount)) assert(view !== null, "signed out for a moment");
});

test("an action in flight fails when the connection is lost, and is not run again", async (t) => {
  const client = open(t, backend);
  const seen = texts(client, "cut off");
  const lost = failureOf(client.action(api.errands.linger, { board: "cut off" }));
  await seen.untilEqual(["lingering"]);
  await backend.kill();
  await backend.resume();
  assert.match((await lost).message, /Connection lost while action was in flight/);
  await client.mutation(api.notes.add, { board: "cut off", text: "after" });
  await seen.untilEqual(["lingering", "after"]);
});

test("a graceful stop loses no acknowledged write, and clients come back quietly", async (t) => {
  const client = open(t, backend);
  const complaints: string[] = [];
  const quiet = open(t, backend, { onServerDisconnectError: (message) => complaints.push(message) });
  const watched = texts(quiet, "stopped");
  let isOver = false;
  const writer = writeUntil(client, "stopped", "note", () => isOver);
  await watched.until((view) => Array.isArray(view) && view.length > 20, "writes to go on");
  await backend.stop();
  await disconnected(quiet);
  await backend.resume();
  isOver = true;
  const sent = await writer;
  await watched.until((view) => Array.isArray(view) && view.length === sent.length, "all writes");
  assert.deepEqual((watched.last as string[]).toSorted(), sent.toSorted());
  assert.deepEqual(complaints, []);
});

test("a write scheduled for later is made once, though the server is killed before its time", async (t) => {
  const client = open(t, backend);
  const seen = texts(client, "later");
  await seen.untilEqual([]);
  await client.mutation(api.notes.addLater, { board: "later", text: "at once", delayMs: 0 });
  await seen.untilEqual(["at once"]);
  await client.mutation(api.notes.addLater, { board: "later", text: "after the crash", delayMs: 200 });
  await backend.kill();
  await backend.resume();
  await seen.untilEqual(["at once", "after the crash"]);
  assert.equal(seen.all.length, 3);
});

/** `ConvexClient` against `engine dev`: what a developer sees that users must not. */

import assert from "node:assert/strict";
import { after } from "node:test";
import { ConvexError } from "convex/values";
import { api } from "./api.ts";
import { Backend } from "./backend.ts";
import { Lines, open, test, watch } from "./clients.ts";

const backend = await Backend.start("dev");
after(() => backend.close());

test("log lines of queries and mutations are printed by the client", async (t) => {
  const lines = new Lines();
  const client = open(t, backend, { logger: lines });
  await client.query(api.chatter.speak, { word: "hello" });
  await client.mutation(api.chatter.speakUp, { word: "hello" });
  const printed = lines.all.filter((line) => /heard.*hello/.test(line));
  assert.equal(printed.length, 2, lines.all.join("\n"));
  assert.match(printed[0]!, /\[CONVEX Q\(chatter:speak\)\] \[LOG\]/);
  assert.match(printed[1]!, /\[CONVEX M\(chatter:speakUp\)\] \[INFO\]/);
  assert(!lines.all.some((line) => line.includes("Could not parse")));
});

test("an error of a function shows its message", async (t) => {
  const client = open(t, backend);
  for (const asked of [
    client.query(api.faults.breakQuery, {}),
    client.mutation(api.faults.breakMutation, {}),
    client.action(api.faults.breakAction, {}),
  ]) {
    await assert.rejects(asked, (failure: unknown) => {
      assert(failure instanceof Error && !(failure instanceof ConvexError));
      assert.match(failure.message, /the combination is 1234/);
      return true;
    });
  }
});

test("saving a file re-runs its queries on the same connection, and a broken file leaves the old code", async (t) => {
  const client = open(t, backend);
  const file = "functions/chatter.py";
  const seen = watch(client, api.chatter.greet, {});
  await seen.untilEqual("hello");
  await backend.edit(file, { old: 'return "hello"', new: 'return "good morning"' });
  await seen.untilEqual("good morning");

  await backend.edit(file, { old: 'return "good morning"', new: "return (" });
  while (!(await backend.log()).includes("SyntaxError"))
    assert(!t.signal.aborted, "the log says nothing of the mistake");
  assert.equal(await client.query(api.chatter.greet, {}), "good morning");
  await backend.edit(file, { old: "return (", new: 'return "good evening"' });
  await seen.untilEqual("good evening");
  assert.deepEqual(seen.all, ["hello", "good morning", "good evening"]);
  assert.equal(client.connectionState().connectionCount, 1);
});

/** `ConvexHttpClient`: requests without a socket. */

import assert from "node:assert/strict";
import { after } from "node:test";
import { ConvexHttpClient } from "convex/browser";
import { ConvexError } from "convex/values";
import { api, REFUSAL } from "./api.ts";
import { Backend } from "./backend.ts";
import { open, test, texts } from "./clients.ts";

const backend = await Backend.start();
after(() => backend.close());

const client = (): ConvexHttpClient => new ConvexHttpClient(backend.address, { logger: false });

test("a write over HTTP reaches a subscriber on a socket", async (t) => {
  const seen = texts(open(t, backend), "http");
  await seen.untilEqual([]);
  const http = client();
  await http.mutation(api.notes.add, { board: "http", text: "posted" });
  assert.equal((await http.query(api.notes.list, { board: "http" }))[0]?.text, "posted");
  assert.equal(await http.action(api.errands.addTwice, { board: "http", text: "done" }), 3);
  await seen.untilEqual(["posted", "done 1", "done 2"]);
});

test("a rate limit says when to try again, and what needs a connection says so", async () => {
  const http = client();
  await http.mutation(api.visits.knock, { board: "limited over HTTP" });
  await assert.rejects(http.mutation(api.visits.knock, { board: "limited over HTTP" }), (failure: unknown) => {
    assert(failure instanceof ConvexError);
    assert(failure.data.retry_after_ms > 3_500_000 && failure.data.retry_after_ms <= 3_600_000);
    return true;
  });
  await assert.rejects(
    http.mutation(api.visits.enter, { board: "http", name: "nobody" }),
    /SessionRequired: .* WebSocket/,
  );
});

test("consistent queries of one client all see the moment of the first", async () => {
  const [http, writer] = [client(), client()];
  await writer.mutation(api.notes.add, { board: "consistent", text: "before" });
  assert.equal(await http.consistentQuery(api.notes.count, { board: "consistent" }), 1);
  await writer.mutation(api.notes.add, { board: "consistent", text: "after" });
  assert.equal((await http.consistentQuery(api.notes.list, { board: "consistent" })).length, 1);
  assert.equal(await http.query(api.notes.count, { board: "consistent" }), 2);
  assert.equal(await client().consistentQuery(api.notes.count, { board: "consistent" }), 2);
});

test("an app's error has its data, any other error is redacted", async () => {
  const http = client();
  for (const asked of [
    () => http.query(api.faults.refuseQuery, {}),
    () => http.mutation(api.faults.refuseMutation, {}),
    () => http.action(api.faults.refuseAction, {}),
  ]) {
    await assert.rejects(asked, (failure: unknown) => {
      assert(failure instanceof ConvexError);
      assert.deepStrictEqual(failure.data, REFUSAL);
      return true;
    });
  }
  for (const asked of [
    () => http.query(api.faults.breakQuery, {}),
    () => http.mutation(api.faults.breakMutation, {}),
    () => http.action(api.faults.breakAction, {}),
  ]) {
    await assert.rejects(asked, (failure: unknown) => {
      assert(failure instanceof Error && !(failure instanceof ConvexError));
      assert.match(failure.message, /Server Error/);
      assert.doesNotMatch(failure.message, /combination/);
      return true;
    });
  }
});

test("wrong arguments and unknown functions are errors that say so", async () => {
  const http = client();
  await assert.rejects(http.query(api.notes.list, { board: 1 } as never), /board/);
  await assert.rejects(http.query(api.faults.missing, {}), /Could not find public query function/);
  await assert.rejects(http.query(api.faults.hidden, {}), /Could not find public query function/);
});

test("a token makes the caller known, a forged one is refused, and signing out forgets it", async () => {
  const http = client();
  http.setAuth(await backend.token({ subject: "alice" }));
  assert.equal((await http.query(api.callers.whoami, {}))?.subject, "alice");
  assert.equal((await http.mutation(api.callers.whoamiAsMutation, {}))?.subject, "alice");
  assert.equal((await http.action(api.callers.whoamiAsAction, {}))?.subject, "alice");
  http.setAuth(await backend.token({ is_forged: true }));
  await assert.rejects(http.query(api.callers.whoami, {}), /"code"/);
  http.clearAuth();
  assert.equal(await http.query(api.callers.whoami, {}), null);
});

test("special values come back as they were sent", async () => {
  const http = client();
  const value = [-0, Number.NaN, Number.NEGATIVE_INFINITY, -(2n ** 63n), new Uint8Array([0, 255]).buffer, "👋", 1, 1.5];
  assert.deepStrictEqual(await http.query(api.samples.echo, { value }), value);
  assert.deepStrictEqual(await http.action(api.samples.echoByAction, { value }), value);
  assert.equal(await http.query(api.samples.echoInt64, { value: 7n }), 7n);
});

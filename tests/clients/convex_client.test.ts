/** `ConvexClient` against a server in production: subscribing, writing, failing, values. */

import assert from "node:assert/strict";
import { after } from "node:test";
import { ConvexClient } from "convex/browser";
import { makeFunctionReference } from "convex/server";
import { ConvexError } from "convex/values";
import { api, type Note, REFUSAL } from "./api.ts";
import { Backend } from "./backend.ts";
import { failureOf, Lines, open, test, texts, watch } from "./clients.ts";
import { Views } from "./views.ts";

const backend = await Backend.start();
after(() => backend.close());

test("two clients see each other's writes", async (t) => {
  const [alice, bob] = [open(t, backend), open(t, backend)];
  const [aliceSees, bobSees] = [texts(alice, "shared"), texts(bob, "shared")];
  await Promise.all([aliceSees.untilEqual([]), bobSees.untilEqual([])]);

  await alice.mutation(api.notes.add, { board: "shared", text: "from alice" });
  await bobSees.untilEqual(["from alice"]);
  await bob.mutation(api.notes.add, { board: "shared", text: "from bob" });
  await Promise.all([aliceSees.untilEqual(["from alice", "from bob"]), bobSees.untilEqual(["from alice", "from bob"])]);
});

test("a mutation's promise resolves once its caller's queries show the write", async (t) => {
  const client = open(t, backend);
  const seen = texts(client, "own writes");
  await seen.untilEqual([]);
  for (let count = 1; count <= 20; count++) {
    await client.mutation(api.notes.add, { board: "own writes", text: String(count) });
    assert.equal((seen.last as string[]).length, count);
  }
});

test("mutations of one client run in the order in which it made them", async (t) => {
  const client = open(t, backend);
  const sent = Array.from({ length: 100 }, (_, position) => `note ${position}`);
  await Promise.all(sent.map((text) => client.mutation(api.notes.add, { board: "ordered", text })));
  assert.deepEqual(
    (await client.query(api.notes.list, { board: "ordered" })).map((note) => note.text),
    sent,
  );
});

test("patches and deletions reach the subscriber", async (t) => {
  const client = open(t, backend);
  const seen = texts(client, "changing");
  const first = await client.mutation(api.notes.add, { board: "changing", text: "first" });
  await client.mutation(api.notes.add, { board: "changing", text: "second" });
  await client.mutation(api.notes.rename, { noteId: first, text: "renamed" });
  await seen.untilEqual(["renamed", "second"]);
  await client.mutation(api.notes.remove, { noteId: first });
  await seen.untilEqual(["second"]);
});

test("all queries of one client change together", async (t) => {
  const [client, writer] = [open(t, backend), open(t, backend)];
  const both = new Views<[listed: number | undefined, counted: number | undefined]>();
  const args = { board: "together" };
  const look = (): void => {
    const list = client.client.localQueryResult("notes:listNotes", args) as Note[] | undefined;
    const count = client.client.localQueryResult("notes:countNotes", args) as number | undefined;
    both.add([list?.length, count]);
  };
  client.onUpdate(api.notes.list, args, look);
  client.onUpdate(api.notes.count, args, look);
  await both.untilEqual([0, 0]);
  await Promise.all(
    Array.from({ length: 50 }, (_, n) => writer.mutation(api.notes.add, { board: "together", text: String(n) })),
  );
  await both.untilEqual([50, 50]);
  for (const [listed, counted] of both.all) assert.equal(listed, counted);
});

test("a slow query delays neither the result of another client nor its own", async (t) => {
  const [patient, quick] = [open(t, backend), open(t, backend)];
  for (let n = 0; n < 20; n++) await quick.mutation(api.notes.add, { board: "slow", text: String(n) });
  const slow = watch(patient, api.notes.countPatiently, { board: "slow", rounds: 1000 });
  await quick.mutation(api.notes.add, { board: "beside", text: "not held up" });
  assert.equal(await quick.query(api.notes.count, { board: "beside" }), 1);
  await slow.untilEqual(20);
});

test("snake_case and camelCase name the same function and arguments", async (t) => {
  const client = open(t, backend);
  const noteId = await client.mutation(api.notes.add, { board: "names", text: "old" });
  const rename = makeFunctionReference<"mutation", { note_id: string; text: string }, null>("notes:rename");
  const list = makeFunctionReference<"query", { board: string }, { text: string }[]>("notes:list_notes");
  await client.mutation(rename, { note_id: noteId, text: "new" });
  assert.deepEqual(
    (await client.query(list, { board: "names" })).map((note) => note.text),
    ["new"],
  );
});

test("an unsubscribed query is left alone, and subscribing again shows what it is now", async (t) => {
  const client = open(t, backend);
  const args = { board: "left" };
  const views = new Views<number>();
  const subscription = client.onUpdate(api.notes.count, args, (count) => views.add(count));
  await views.untilEqual(0);
  subscription.unsubscribe();
  await client.mutation(api.notes.add, { board: "left", text: "unseen" });
  assert.deepEqual(views.all, [0]);
  await watch(client, api.notes.count, args).untilEqual(1);
});

test("an address that ends in a slash works", async () => {
  const client = new ConvexClient(`${backend.address}/`, { logger: false });
  assert.equal(await client.query(api.notes.count, { board: "slash" }), 0);
  await client.close();
});

// -- errors

const isRefusal = (failure: unknown): boolean => {
  assert(failure instanceof ConvexError);
  assert.deepStrictEqual(failure.data, REFUSAL);
  return true;
};

const isRedacted = (failure: unknown): boolean => {
  assert(failure instanceof Error && !(failure instanceof ConvexError));
  assert.match(failure.message, /Server Error/);
  assert.doesNotMatch(failure.message, /combination|1234|RuntimeError|Traceback/);
  return true;
};

test("an app's error reaches the caller with its data, also in production", async (t) => {
  const client = open(t, backend);
  await assert.rejects(client.query(api.faults.refuseQuery, {}), isRefusal);
  await assert.rejects(client.mutation(api.faults.refuseMutation, {}), isRefusal);
  await assert.rejects(client.action(api.faults.refuseAction, {}), isRefusal);
});

test("who does something too often is told when to try again", async (t) => {
  const client = open(t, backend);
  await client.mutation(api.visits.knock, { board: "limited" });
  const failure = await failureOf(client.mutation(api.visits.knock, { board: "limited" }));
  assert(failure instanceof ConvexError);
  assert.deepEqual(Object.keys(failure.data).toSorted(), ["code", "name", "retry_after_ms"]);
  assert.equal(failure.data.code, "RateLimited");
  assert(failure.data.retry_after_ms > 3_500_000 && failure.data.retry_after_ms <= 3_600_000);
});

test("a client that closes has left, and one that stays has not", async (t) => {
  const seen = texts(open(t, backend), "visited");
  const [leaving, staying] = [open(t, backend), open(t, backend)];
  await leaving.mutation(api.visits.enter, { board: "visited", name: "ann" });
  await staying.mutation(api.visits.enter, { board: "visited", name: "ben" });
  await seen.untilEqual(["ann", "ben"]);
  await leaving.close();
  await seen.untilEqual(["ben"]);
});

test("any other error is redacted in production, and its request id finds it in the log", async (t) => {
  const client = open(t, backend);
  await assert.rejects(client.query(api.faults.breakQuery, {}), isRedacted);
  await assert.rejects(client.action(api.faults.breakAction, {}), isRedacted);
  const failure = await failureOf(client.mutation(api.faults.breakMutation, {}));
  assert(isRedacted(failure));
  const requestId = /\[Request ID: (\w+)\]/.exec(failure.message)?.[1];
  assert(requestId, `no request id in ${failure.message}`);
  const log = await backend.log();
  assert.match(log, new RegExp(requestId));
  assert.match(log, /RuntimeError: the combination is 1234/);
});

test("a subscribed query goes from its error to a result and back", async (t) => {
  const client = open(t, backend);
  const seen = watch(client, api.faults.refuseWhileEmpty, { board: "empty at first" });
  const isEmpty = (view: unknown): boolean => view instanceof ConvexError && view.data === "EMPTY";
  await seen.until(isEmpty, "the error");
  const noteId = await client.mutation(api.notes.add, { board: "empty at first", text: "something" });
  await seen.untilEqual(1);
  await client.mutation(api.notes.remove, { noteId });
  await seen.until(isEmpty, "the error again");
});

test("a mutation that fails leaves nothing, and nobody sees what it wrote", async (t) => {
  const [client, other] = [open(t, backend), open(t, backend)];
  const [own, others] = [texts(client, "rolled back"), texts(other, "rolled back")];
  await Promise.all([own.untilEqual([]), others.untilEqual([])]);
  const text = "never there";
  await assert.rejects(client.mutation(api.notes.addThenRefuse, { board: "rolled back", text }), (failure: unknown) => {
    assert(failure instanceof ConvexError);
    assert.deepEqual(failure.data, { code: "REFUSED", text });
    return true;
  });
  await client.mutation(api.notes.add, { board: "rolled back", text: "there" });
  await Promise.all([own.untilEqual(["there"]), others.untilEqual(["there"])]);
  for (const view of [...own.all, ...others.all]) assert(!JSON.stringify(view).includes(text));
});

test("a wrong argument is an error that names it", async (t) => {
  const client = open(t, backend);
  const wrong = (args: object) => client.mutation(api.notes.add, args as never);
  await assert.rejects(wrong({ board: 7, text: "hi" }), /board/);
  await assert.rejects(wrong({ board: "arguments" }), /text/);
  await assert.rejects(wrong({ board: "arguments", text: "hi", colour: "red" }), /colour/);
  await assert.rejects(client.query(api.notes.list, { board: null } as never), /board/);
  assert.deepEqual(await client.query(api.notes.list, { board: "arguments" }), []);
});

test("missing, internal and wrong-kind functions are one error", async (t) => {
  const client = open(t, backend);
  const outline = async (asked: Promise<unknown>): Promise<string> => {
    const { message } = await failureOf(asked);
    return message.replace(/\[CONVEX.*?\)\]|\[Request ID: \w+\]|'[^']*'/g, "");
  };
  const missing = await outline(client.query(api.faults.missing, {}));
  assert.match(missing, /Could not find public query function/);
  assert.equal(await outline(client.query(api.faults.hidden, {})), missing);
  assert.equal(
    await outline(client.query(makeFunctionReference<"query">("notes:add"), { board: "b", text: "t" })),
    missing,
  );
  await assert.rejects(
    client.mutation(makeFunctionReference<"mutation">("notes:listNotes"), { board: "b" }),
    /Could not find public mutation/,
  );
  await assert.rejects(
    client.action(makeFunctionReference<"action">("notes:listNotes"), { board: "b" }),
    /Could not find public action/,
  );
});

test("a result that clients cannot read is the function's error and harms no other query", async (t) => {
  const client = open(t, backend);
  const healthy = texts(client, "healthy");
  const unreadable = watch(client, api.faults.returnForbiddenKey, {});
  await unreadable.until((view) => view instanceof Error, "an error");
  await client.mutation(api.notes.add, { board: "healthy", text: "still here" });
  await healthy.untilEqual(["still here"]);
});

// -- actions

test("an action writes through mutations, and subscribers see it", async (t) => {
  const [client, other] = [open(t, backend), open(t, backend)];
  const seen = texts(other, "errand");
  assert.equal(await client.action(api.errands.addTwice, { board: "errand", text: "milk" }), 2);
  await seen.untilEqual(["milk 1", "milk 2"]);
});

test("an action that takes long holds up nothing else of its client", async (t) => {
  const client = open(t, backend);
  const seen = texts(client, "lingering");
  void client.action(api.errands.linger, { board: "lingering" }).catch(() => {}); // ends with the client
  await seen.untilEqual(["lingering"]);
  await client.mutation(api.notes.add, { board: "lingering", text: "meanwhile" });
  assert.equal(await client.action(api.errands.addTwice, { board: "lingering", text: "also" }), 4);
});

// -- values

const bytes = (...values: number[]): ArrayBuffer => new Uint8Array(values).buffer;
const SPECIAL_VALUES = [
  null,
  true,
  0,
  -0,
  1,
  1.5,
  -1e-300,
  2 ** 53,
  1e300,
  Number.NaN,
  Number.POSITIVE_INFINITY,
  Number.NEGATIVE_INFINITY,
  // through `Any`, an integer that a double holds comes back as a number: see the test of int64 below
  2n ** 63n - 1n,
  -(2n ** 63n),
  "",
  'grüße 👋🏽 \u0000 \u2028 "quoted" \\',
  bytes(),
  bytes(0, 1, 127, 128, 255),
  [],
  {},
  [[-0], { deep: [Number.NaN, 2n ** 60n, { bytes: bytes(7) }] }],
  { "a key with spaces": 1, _private: -0, "": "empty key" },
];

test("every value comes back as it was sent", async (t) => {
  const client = open(t, backend);
  for (const value of SPECIAL_VALUES) {
    assert.deepStrictEqual(await client.query(api.samples.echo, { value }), value);
    assert.deepStrictEqual(await client.action(api.samples.echoByAction, { value }), value);
  }
  assert.deepStrictEqual(await client.query(api.samples.echo, { value: SPECIAL_VALUES }), SPECIAL_VALUES);
});

test("values come back from the database as they were stored", async (t) => {
  const client = open(t, backend);
  const anything = {
    zero: -0,
    none: Number.NaN,
    whole: -(2n ** 60n),
    payload: bytes(1, 2),
    list: [Number.POSITIVE_INFINITY, null],
  };
  for (const whole of [0n, -1n, 2n ** 63n - 1n, -(2n ** 63n)]) {
    const sample = { whole, payload: bytes(0, 255), ratio: Number.NEGATIVE_INFINITY, anything };
    const sampleId = await client.mutation(api.samples.keep, sample);
    const { _id, _creationTime, ...kept } = (await client.query(api.samples.kept, { sampleId }))!;
    assert.equal(_id, sampleId);
    assert.equal(typeof _creationTime, "number");
    assert.deepStrictEqual(kept, sample);
  }
});

test("int64 where the annotation says so, a number where a double holds it exactly", async (t) => {
  const client = open(t, backend);
  for (const value of [0n, 3n, -1n, 2n ** 63n - 1n])
    assert.equal(await client.query(api.samples.echoInt64, { value }), value);
  assert.equal(await client.query(api.samples.echo, { value: 3n }), 3);
  assert.equal(await client.query(api.samples.doubleInteger, { value: 21 }), 42);
  assert.equal(await client.query(api.samples.doubleInteger, { value: 2 ** 53 }), 2n ** 54n);
  await assert.rejects(client.query(api.samples.doubleInteger, { value: 1.5 }), /value/);
});

test("megabytes arrive whole, in arguments and in results", async (t) => {
  const client = open(t, backend);
  const value = "é".repeat(3_000_000); // 6 MB on the wire
  assert.equal(await client.query(api.samples.echo, { value }), value);
  const [first, second, third] = ["a", "b", "c"].map((letter) =>
    watch(client, api.samples.pad, { letter, size: 7_000_000 }),
  );
  await first!.until((view) => view === "a".repeat(7_000_000), "7 MB of a");
  await second!.until((view) => view === "b".repeat(7_000_000), "7 MB of b");
  await third!.until((view) => view === "c".repeat(7_000_000), "7 MB of c");
  assert.equal(client.connectionState().connectionCount, 1);
});

// -- log lines

test("log lines stay on the server in production", async (t) => {
  const lines = new Lines();
  const client = open(t, backend, { logger: lines });
  assert.equal(await client.query(api.chatter.speak, { word: "hush" }), "hush");
  assert.equal(await client.mutation(api.chatter.speakUp, { word: "hush" }), "HUSH");
  assert(!lines.all.some((line) => line.includes("heard")), lines.all.join("\n"));
});

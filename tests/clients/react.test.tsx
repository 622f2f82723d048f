/** `ConvexReactClient` and its hooks: what a page shows, view by view. */

import { openReact, show, showBare, useRecord } from "./browser.tsx";

import assert from "node:assert/strict";
import { after } from "node:test";
import {
  Authenticated,
  AuthLoading,
  ConvexProviderWithAuth,
  type ConvexReactClient,
  Unauthenticated,
  useAction,
  useMutation,
  useQuery,
} from "convex/react";
import { ConvexError } from "convex/values";
import { Component, type ReactNode, useCallback, useMemo, useState } from "react";
import { api, REFUSAL } from "./api.ts";
import { Backend } from "./backend.ts";
import { open, test } from "./clients.ts";
import { announceNetwork } from "./page.ts";
import { Views } from "./views.ts";

const backend = await Backend.start();
after(() => backend.close());

type Shown = string[] | undefined; // undefined: loading

/** The texts of a board. */
function Board({ board, views }: { board: string; views: Views<Shown> }): ReactNode {
  const texts = useQuery(api.notes.list, { board })?.map((note) => note.text);
  useRecord(views, texts);
  return texts?.map((text) => <p key={text}>{text}</p>);
}

/** Hands a mutation that shows its note at once, marked as on its way, to the test. */
function Sender({
  onReady,
}: {
  onReady: (send: (args: { board: string; text: string }) => Promise<unknown>) => void;
}): null {
  const send = useMutation(api.notes.add).withOptimisticUpdate((store, { board, text }) => {
    const notes = store.getQuery(api.notes.list, { board }) ?? [];
    const sending = { _id: `sending ${text}`, _creationTime: Date.now(), board, text: `${text}…`, author: null };
    store.setQuery(api.notes.list, { board }, [...notes, sending]);
  });
  onReady(send);
  return null;
}

type Send = (args: { board: string; text: string }) => Promise<unknown>;

/** A page with a board and a way to write on it. */
async function showBoard(
  client: ConvexReactClient,
  board: string,
): Promise<[Views<Shown>, (text: string) => Promise<unknown>]> {
  const views = new Views<Shown>();
  const ready = new Views<Send>();
  show(
    client,
    <Board key="board" board={board} views={views} />,
    <Sender key="sender" onReady={(send) => ready.add(send)} />,
  );
  await views.until((view) => view !== undefined, "the board to be loaded");
  return [views, (text) => ready.last({ board, text })];
}

test("a page follows what others write", async (t) => {
  const writer = open(t, backend);
  const [views] = await showBoard(openReact(t, backend), "followed");
  await writer.mutation(api.notes.add, { board: "followed", text: "one" });
  await views.untilEqual(["one"]);
  await writer.mutation(api.notes.add, { board: "followed", text: "two" });
  await views.untilEqual(["one", "two"]);
  assert.deepEqual(views.all, [undefined, [], ["one"], ["one", "two"]]);
  assert.match(document.body.textContent ?? "", /one.*two/);
});

test("an optimistic update gives way to the write without a flicker", async (t) => {
  const [views, send] = await showBoard(openReact(t, backend), "optimistic");
  await send("a");
  await views.untilEqual(["a"]);
  await send("b");
  await views.untilEqual(["a", "b"]);
  assert.deepEqual(views.all, [undefined, [], ["a…"], ["a"], ["a", "b…"], ["a", "b"]]);
});

test("optimistic updates of many writes at once, while others write too, never flicker", async (t) => {
  const board = "busy";
  const others = [open(t, backend), open(t, backend)];
  const [views, send] = await showBoard(openReact(t, backend), board);
  const texts = Array.from({ length: 25 }, (_, n) => `mine ${n}`);
  await Promise.all([
    ...texts.map((text) => send(text)),
    ...others.map(async (client, n) => {
      for (let k = 0; k < 25; k++) await client.mutation(api.notes.add, { board, text: `other ${n} ${k}` });
    }),
  ]);
  await views.until((view) => view?.length === 75, "all writes");
  assertNoFlicker(views);
});

/** What was once shown, on its way or stored, is shown in every later view, and never twice. */
function assertNoFlicker(views: Views<Shown>): void {
  let before = new Set<string>();
  for (const view of views.all.slice(1)) {
    assert(view !== undefined, "back to loading");
    const now = new Set(view.map((text) => text.replace("…", "")));
    assert.equal(now.size, view.length, `shown twice: ${view}`);
    for (const text of before) assert(now.has(text), `${text} has gone from ${view}`);
    before = now;
  }
}

test("an optimistic update goes when its mutation fails", async (t) => {
  const views = new Views<Shown>();
  const ready = new Views<Send>();
  function Refused(): null {
    const send = useMutation(api.notes.addThenRefuse).withOptimisticUpdate((store, { board, text }) => {
      const note = { _id: text, _creationTime: 0, board, text, author: null };
      store.setQuery(api.notes.list, { board }, [note]);
    });
    ready.add(send);
    return null;
  }
  show(openReact(t, backend), <Board key="board" board="refused" views={views} />, <Refused key="sender" />);
  await views.untilEqual([]);
  await assert.rejects(ready.last({ board: "refused", text: "hope" }), ConvexError);
  await views.untilEqual([]);
  assert.deepEqual(views.all, [undefined, [], ["hope"], []]);
});

test("an optimistic update survives the server's death and becomes one write", async (t) => {
  const [views, send] = await showBoard(openReact(t, backend), "survivor");
  await send("first");
  await backend.kill();
  const sent = Promise.all(["second", "third"].map(send));
  await views.untilEqual(["first", "second…", "third…"]);
  await backend.resume();
  announceNetwork();
  await sent;
  await views.untilEqual(["first", "second", "third"]);
  assertNoFlicker(views);
  const kept = await open(t, backend).query(api.notes.count, { board: "survivor" });
  assert.equal(kept, 3);
});

test("all hooks of a page show one moment", async (t) => {
  const writer = open(t, backend);
  const views = new Views<[number | undefined, number | undefined]>();
  function Both(): null {
    const list = useQuery(api.notes.list, { board: "moment" });
    const count = useQuery(api.notes.count, { board: "moment" });
    useRecord(views, [list?.length, count]);
    return null;
  }
  show(openReact(t, backend), <Both key="both" />);
  await views.untilEqual([0, 0]);
  await Promise.all(
    Array.from({ length: 30 }, (_, n) => writer.mutation(api.notes.add, { board: "moment", text: `${n}` })),
  );
  await views.untilEqual([30, 30]);
  for (const [listed, counted] of views.all) assert.equal(listed, counted);
});

test("a query that fails throws where it is shown, with the app's data", async (t) => {
  const failures = new Views<unknown>();
  class Boundary extends Component<{ children: ReactNode }, { isBroken: boolean }> {
    override state = { isBroken: false };
    static getDerivedStateFromError = (): { isBroken: boolean } => ({ isBroken: true });
    override componentDidCatch(failure: unknown): void {
      failures.add(failure);
    }
    override render = (): ReactNode => (this.state.isBroken ? "broken" : this.props.children);
  }
  function Refused(): ReactNode {
    return useQuery(api.faults.refuseQuery, {});
  }
  t.mock.method(console, "error", () => {}); // React prints what a boundary catches
  const client = openReact(t, backend);
  show(
    client,
    <Boundary key="boundary">
      <Refused />
    </Boundary>,
  );
  const failure = await failures.until(() => true, "the failure");
  assert(failure instanceof ConvexError);
  assert.deepStrictEqual(failure.data, REFUSAL);
});

test("an action called from a page writes", async (t) => {
  const views = new Views<Shown>();
  const ready = new Views<(args: { board: string; text: string }) => Promise<number>>();
  function Errand(): null {
    ready.add(useAction(api.errands.addTwice));
    return null;
  }
  show(openReact(t, backend), <Board key="board" board="page errand" views={views} />, <Errand key="errand" />);
  await views.untilEqual([]);
  assert.equal(await ready.last({ board: "page errand", text: "bread" }), 2);
  await views.untilEqual(["bread 1", "bread 2"]);
});

test("a page keeps its values over an outage and then shows what happened meanwhile", async (t) => {
  const client = openReact(t, backend);
  const [views, send] = await showBoard(client, "outage");
  await send("before");
  await backend.kill();
  await backend.resume();
  await open(t, backend).mutation(api.notes.add, { board: "outage", text: "meanwhile" });
  announceNetwork();
  await views.untilEqual(["before", "meanwhile"]);
  assertNoFlicker(views);
});

test("signing in and out switches what a page shows", async (t) => {
  const client = openReact(t, backend);
  const states = new Views<string>();
  const control = new Views<(isSignedIn: boolean) => void>();
  function useTestAuth() {
    const [isAuthenticated, setAuthenticated] = useState(false);
    control.add(setAuthenticated);
    const fetchAccessToken = useCallback(() => backend.token({ subject: "alice" }), []);
    return useMemo(
      () => ({ isLoading: false, isAuthenticated, fetchAccessToken }),
      [isAuthenticated, fetchAccessToken],
    );
  }
  function State({ name }: { name: string }): null {
    useRecord(states, name);
    return null;
  }
  function Name(): null {
    const caller = useQuery(api.callers.whoami, {});
    useRecord(states, caller === undefined ? "signed in, loading" : `signed in as ${caller?.subject}`);
    return null;
  }
  showBare(
    <ConvexProviderWithAuth client={client} useAuth={useTestAuth}>
      <AuthLoading>
        <State name="checking" />
      </AuthLoading>
      <Unauthenticated>
        <State name="signed out" />
      </Unauthenticated>
      <Authenticated>
        <Name />
      </Authenticated>
    </ConvexProviderWithAuth>,
  );
  await states.untilEqual("signed out");
  control.last(true);
  await states.untilEqual("signed in as alice");
  control.last(false);
  await states.untilEqual("signed out");
  assert(!states.all.includes("signed in as undefined"));
});

/** `usePaginatedQuery` while others insert and delete: no row is lost, none is shown twice. */

import { openReact, show, useRecord } from "./browser.tsx";

import assert from "node:assert/strict";
import { after, type TestContext } from "node:test";
import type { ConvexClient } from "convex/browser";
import {
  type ConvexReactClient,
  insertAtPosition,
  type PaginationStatus,
  useMutation,
  usePaginatedQuery,
} from "convex/react";
import { api, type Entry } from "./api.ts";
import { Backend } from "./backend.ts";
import { open, test } from "./clients.ts";
import { announceNetwork, sentFrames } from "./page.ts";
import { Views } from "./views.ts";

const PAGE_SIZE = 10;

const backend = await Backend.start();
after(() => backend.close());

type Shown = { numbers: number[]; status: PaginationStatus };

/** What a test holds of one list on the page. */
class List {
  readonly views = new Views<Shown>();
  loadMore: (count: number) => void = () => {}; // the newest one of the hook

  /** Load pages until so many numbers, or all there are, are shown. */
  async load(count: number): Promise<void> {
    for (;;) {
      const { numbers, status } = await this.views.until(({ status }) => !status.startsWith("Loading"), "a page");
      if (numbers.length >= count || status === "Exhausted") return;
      this.loadMore(PAGE_SIZE);
      await this.views.until(
        (view) => view.status.startsWith("Loading") || view.numbers.length > numbers.length,
        "more",
      );
    }
  }

  untilShown(numbers: number[]): Promise<Shown> {
    const wanted = numbers.join();
    return this.views.until(
      (view) => view.numbers.join() === wanted,
      `exactly the ${numbers.length} numbers: ${wanted}`,
    );
  }

  /** Check every view so far: in order, nothing twice, and these numbers never missing once they were shown. */
  assertGapless({ lasting = [], descending = false }: { lasting?: number[]; descending?: boolean }): void {
    const once = new Set<number>();
    for (const { numbers, status } of this.views.all.slice(1)) {
      assert.notEqual(status, "LoadingFirstPage", "started again");
      const shown = new Set(numbers);
      assert.equal(shown.size, numbers.length, `a number twice in ${numbers}`);
      assert.deepEqual(
        numbers,
        numbers.toSorted((a, b) => (descending ? b - a : a - b)),
      );
      for (const number of lasting) {
        if (shown.has(number)) once.add(number);
        else assert(!once.has(number), `${number} has gone from ${numbers}`);
      }
    }
  }
}

type ListProps = { board: string; list: List; descending?: boolean };

function Entries({ board, list, descending = false }: ListProps): null {
  const query = descending ? api.entries.listBackwards : api.entries.list;
  const { results, status, loadMore } = usePaginatedQuery(query, { board }, { initialNumItems: PAGE_SIZE });
  list.loadMore = loadMore;
  useRecord(list.views, { numbers: results.map((entry) => entry.number), status });
  return null;
}

function showList(client: ConvexReactClient, board: string): List {
  const list = new List();
  show(client, <Entries key={board} board={board} list={list} />);
  return list;
}

const upTo = (count: number): number[] => Array.from({ length: count }, (_, n) => n);

async function writerOf(t: TestContext, board: string, numbers: number[]): Promise<ConvexClient> {
  const writer = open(t, backend);
  await writer.mutation(api.entries.change, { board, insert: numbers, delete: [] });
  return writer;
}

/** Numbers from 0 to 1, the same for the same seed (mulberry32). */
function seeded(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Insert and delete at random among the numbers below `end`; whole numbers stay. Gives the numbers that there are then. */
async function churn(
  writer: ConvexClient,
  board: string,
  { end, rounds, seed }: { end: number; rounds: number; seed: number },
): Promise<number[]> {
  const random = seeded(seed);
  const fractions = new Set<number>();
  const pending: Promise<unknown>[] = [];
  for (let round = 0; round < rounds; round++) {
    const gone = [...fractions].filter(() => random() < 0.3);
    for (const number of gone) fractions.delete(number);
    const added = new Set<number>();
    for (let n = 0; n < 3; n++) {
      const number = Math.floor(random() * end) + (1 + Math.floor(random() * 62)) / 64;
      if (!fractions.has(number) && !gone.includes(number)) added.add(number);
    }
    for (const number of added) fractions.add(number);
    pending.push(writer.mutation(api.entries.change, { board, insert: [...added], delete: gone }));
    if (round % 4 === 3) await Promise.all(pending.splice(0)); // some rounds one by one, some in one commit
  }
  await Promise.all(pending);
  return writer.query(api.entries.numbers, { board });
}

test("pages follow one another to the end, in both directions", async (t) => {
  await writerOf(t, "plain", upTo(35));
  const [forwards, backwards] = [new List(), new List()];
  show(
    openReact(t, backend),
    <Entries key="forwards" board="plain" list={forwards} />,
    <Entries key="backwards" board="plain" list={backwards} descending />,
  );
  await forwards.load(15);
  assert.deepEqual(forwards.views.last, { numbers: upTo(20), status: "CanLoadMore" });
  await Promise.all([forwards.load(100), backwards.load(100)]);
  assert.deepEqual(forwards.views.last, { numbers: upTo(35), status: "Exhausted" });
  assert.deepEqual(backwards.views.last, { numbers: upTo(35).reverse(), status: "Exhausted" });
  backwards.assertGapless({ lasting: upTo(35), descending: true });
});

test("an empty list is exhausted, and rows appended to an exhausted list appear", async (t) => {
  const writer = open(t, backend);
  const list = showList(openReact(t, backend), "growing");
  await list.views.untilEqual({ numbers: [], status: "Exhausted" });
  await writer.mutation(api.entries.change, { board: "growing", insert: upTo(3), delete: [] });
  await list.views.untilEqual({ numbers: upTo(3), status: "Exhausted" });
  await writer.mutation(api.entries.change, { board: "growing", insert: [3, 4], delete: [0] });
  await list.views.untilEqual({ numbers: [1, 2, 3, 4], status: "Exhausted" });
});

test("a row inserted into a loaded page pushes no other row out", async (t) => {
  const writer = await writerOf(t, "pushed", upTo(40));
  const list = showList(openReact(t, backend), "pushed");
  await list.load(20);
  await writer.mutation(api.entries.change, { board: "pushed", insert: [4.5], delete: [] });
  await list.untilShown([...upTo(20), 4.5].toSorted((a, b) => a - b));
  await writer.mutation(api.entries.change, { board: "pushed", insert: [], delete: [9, 10] });
  await list.untilShown([...upTo(20), 4.5].filter((n) => n !== 9 && n !== 10).toSorted((a, b) => a - b));
  list.assertGapless({ lasting: [...upTo(9), 11, 12, 13, 14, 15, 16, 17, 18, 19] });
});

test("a page whose rows are all deleted leaves its neighbours whole", async (t) => {
  const writer = await writerOf(t, "emptied", upTo(40));
  const list = showList(openReact(t, backend), "emptied");
  await list.load(30);
  await writer.mutation(api.entries.change, { board: "emptied", insert: [], delete: upTo(20).slice(10) });
  await list.untilShown([...upTo(10), ...upTo(30).slice(20)]);
  await writer.mutation(api.entries.change, { board: "emptied", insert: [15], delete: [] });
  await list.untilShown([...upTo(10), 15, ...upTo(30).slice(20)]);
  await list.load(100);
  await list.untilShown([...upTo(10), 15, ...upTo(40).slice(20)]);
});

test("pages stay gapless while others insert and delete all over them", async (t) => {
  const writer = await writerOf(t, "churned", upTo(60));
  const list = showList(openReact(t, backend), "churned");
  await list.load(30);
  const numbers = await churn(writer, "churned", { end: 60, rounds: 60, seed: 1 });
  await list.load(1000);
  await list.untilShown(numbers);
  list.assertGapless({ lasting: upTo(60) });
});

test("a page that grows too long is split, and the list goes on being gapless", async (t) => {
  const board = "split";
  const writer = await writerOf(t, board, upTo(40));
  const list = showList(openReact(t, backend), board);
  await list.load(20);
  const fractions = upTo(50).map((n) => 3 + (n + 1) / 64);
  for (const number of fractions) await writer.mutation(api.entries.change, { board, insert: [number], delete: [] });
  await list.untilShown([...upTo(20), ...fractions].toSorted((a, b) => a - b));
  const splits = sentFrames.filter((frame) => frame.includes(`"board":"${board}"`) && frame.includes(`"endCursor":"`));
  assert(splits.length > 0, "no page was split");

  await writer.mutation(api.entries.change, { board, insert: [0.5], delete: fractions.slice(5) });
  await list.load(100);
  await list.untilShown([...upTo(40), 0.5, ...fractions.slice(0, 5)].toSorted((a, b) => a - b));
  list.assertGapless({ lasting: [...upTo(40), ...fractions.slice(0, 5)] });
});

test("several lists on one page each stay gapless", async (t) => {
  const boards = ["first", "second", "third"];
  const writers = await Promise.all(boards.map((board) => writerOf(t, board, upTo(30))));
  const lists = [...boards, "third"].map(() => new List());
  show(
    openReact(t, backend),
    ...boards.map((board, n) => <Entries key={board} board={board} list={lists[n]!} />),
    <Entries key="backwards" board="third" list={lists[3]!} descending />,
  );
  await Promise.all(lists.map((list) => list.load(20)));
  const churns = boards.map((board, n) => churn(writers[n]!, board, { end: 30, rounds: 20, seed: 10 + n }));
  const [first, second, third] = await Promise.all(churns);
  await Promise.all(lists.map((list) => list.load(1000)));
  const expected = [first!, second!, third!, third!.toReversed()];
  for (const [n, list] of lists.entries()) {
    await list.untilShown(expected[n]!);
    list.assertGapless({ lasting: upTo(30), descending: n === 3 });
  }
});

test("an optimistic row in a page gives way to the stored one without a flicker", async (t) => {
  const board = "optimistic page";
  const writer = await writerOf(t, board, upTo(40));
  const list = new List();
  const ready = new Views<(number: number) => Promise<unknown>>();
  function Inserter(): null {
    const change = useMutation(api.entries.change).withOptimisticUpdate((localQueryStore, { insert }) => {
      const item = { _id: `sending ${insert[0]}`, _creationTime: 0, board, number: insert[0]! };
      const sortKeyFromItem = (entry: Entry): number => entry.number;
      const paginatedQuery = api.entries.list;
      insertAtPosition({
        paginatedQuery,
        argsToMatch: { board },
        sortOrder: "asc",
        sortKeyFromItem,
        localQueryStore,
        item,
      });
    });
    ready.add((number) => change({ board, insert: [number], delete: [] }));
    return null;
  }
  show(openReact(t, backend), <Entries key="list" board={board} list={list} />, <Inserter key="inserter" />);
  await list.load(20);
  const mine = [3.5, 7.5, 12.5, 17.5];
  const others = [4.5, 13.5].map((number) =>
    writer.mutation(api.entries.change, { board, insert: [number], delete: [] }),
  );
  await Promise.all([...mine.map((number) => ready.last(number)), ...others]);
  await list.untilShown([...upTo(20), ...mine, 4.5, 13.5].toSorted((a, b) => a - b));
  list.assertGapless({ lasting: [...upTo(20), ...mine] });
});

test("pages keep their rows and their ranges over the server's death", async (t) => {
  const board = "outlived";
  const writer = await writerOf(t, board, upTo(40));
  const list = showList(openReact(t, backend), board);
  await list.load(20);
  await writer.mutation(api.entries.change, { board, insert: [2.5, 3.5], delete: [] });
  const before = [...upTo(20), 2.5, 3.5].toSorted((a, b) => a - b);
  await list.untilShown(before);
  await backend.kill();
  await backend.resume();
  await open(t, backend).mutation(api.entries.change, { board, insert: [12.5], delete: [] });
  announceNetwork();
  await list.untilShown([...before, 12.5].toSorted((a, b) => a - b));
  await list.load(100);
  await list.untilShown([...upTo(40), 2.5, 3.5, 12.5].toSorted((a, b) => a - b));
  list.assertGapless({ lasting: [...upTo(20), 2.5, 3.5] });
});

test("lists of the plain client are gapless too", async (t) => {
  const board = "without react";
  const writer = await writerOf(t, board, upTo(30));
  const views = new Views<number[]>();
  const reader = open(t, backend);
  // Its types ask for `paginationOpts`, which the client itself adds.
  const args = { board } as typeof api.entries.list._args;
  const list = reader.onPaginatedUpdate_experimental(
    api.entries.list,
    args,
    { initialNumItems: PAGE_SIZE },
    (result) => {
      views.add((result as unknown as { results: { number: number }[] }).results.map((entry) => entry.number));
    },
  );
  t.after(() => list.unsubscribe());
  await views.untilEqual(upTo(10));
  list.getCurrentValue()?.loadMore(PAGE_SIZE);
  await views.untilEqual(upTo(20));
  await writer.mutation(api.entries.change, { board, insert: [1.5, 11.5], delete: [5] });
  await views.untilEqual([...upTo(20), 1.5, 11.5].filter((n) => n !== 5).toSorted((a, b) => a - b));
});

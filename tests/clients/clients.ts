/** Official clients, opened for one test and closed with it. */

import assert from "node:assert/strict";
import * as node from "node:test";
import { ConvexClient, type ConvexClientOptions } from "convex/browser";
import type { FunctionArgs, FunctionReference, FunctionReturnType } from "convex/server";
import { api } from "./api.ts";
import type { Backend } from "./backend.ts";
import { Views } from "./views.ts";

const TEST_SECONDS_MAX = 40;

/** A test that fails, by its name, when it does not end: clients wait for ever for what does not come. */
export function test(name: string, run: (t: node.TestContext) => Promise<void>): void {
  void node.test(name, { timeout: TEST_SECONDS_MAX * 1000 }, run);
}

/** Collects what a client would print on the console. */
export class Lines {
  readonly all: string[] = [];
  readonly log = (...parts: unknown[]): void => void this.all.push(parts.map(String).join(" "));
  readonly warn = this.log;
  readonly error = this.log;
  readonly logVerbose = (): void => {};
}

export function open(t: node.TestContext, backend: Backend, options: ConvexClientOptions = {}): ConvexClient {
  const client = new ConvexClient(backend.address, { logger: false, ...options });
  t.after(() => client.close());
  return client;
}

/** Subscribe, and keep every result; a failure of the query is a view too. */
export function watch<Query extends FunctionReference<"query">>(
  client: ConvexClient,
  query: Query,
  args: FunctionArgs<Query>,
): Views<FunctionReturnType<Query> | Error> {
  const views = new Views<FunctionReturnType<Query> | Error>();
  client.onUpdate(
    query,
    args,
    (result) => views.add(result),
    (failure) => views.add(failure),
  );
  return views;
}

export function connected(client: ConvexClient): Promise<unknown> {
  return stateOf(client).until((isConnected) => isConnected, "a connection");
}

export function disconnected(client: ConvexClient): Promise<unknown> {
  return stateOf(client).until((isConnected) => !isConnected, "a lost connection");
}

function stateOf(client: ConvexClient): Views<boolean> {
  const views = new Views<boolean>();
  views.add(client.connectionState().isWebSocketConnected);
  client.subscribeToConnectionState((state) => views.add(state.isWebSocketConnected));
  return views;
}

/** The texts on a board, result by result. */
export function texts(client: ConvexClient, board: string): Views<string[] | Error> {
  const views = new Views<string[] | Error>();
  client.onUpdate(
    api.notes.list,
    { board },
    (notes) => views.add(notes.map((note) => note.text)),
    (failure) => views.add(failure),
  );
  return views;
}

/** What the request failed with. */
export function failureOf(request: Promise<unknown>): Promise<Error> {
  return request.then(
    () => assert.fail("the request succeeded"),
    (reason) => reason as Error,
  );
}

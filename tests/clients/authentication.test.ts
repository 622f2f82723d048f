/** `ConvexClient` signing in, refreshing, being refused and signing out. */

import assert from "node:assert/strict";
import { after } from "node:test";
import type { AuthTokenFetcher, ConvexClient } from "convex/browser";
import { ConvexError } from "convex/values";
import { api, type Caller } from "./api.ts";
import { Backend, type TokenOptions } from "./backend.ts";
import { open, test, watch } from "./clients.ts";
import { Views } from "./views.ts";

const backend = await Backend.start();
after(() => backend.close());

const caller = (subject: string, edition: number | null = null): Caller => ({
  subject,
  token_identifier: `https://login.clients.test|${subject}`,
  edition,
});

/** Sign in with these tokens, one after the other; the last one is given again and again. */
function signIn(client: ConvexClient, ...tokens: TokenOptions[]) {
  const states = new Views<boolean>();
  const fetches: boolean[] = []; // forceRefreshToken of each fetch
  const fetchToken: AuthTokenFetcher = ({ forceRefreshToken }) => {
    fetches.push(forceRefreshToken);
    return backend.token(tokens.length > 1 ? tokens.shift()! : tokens[0]!);
  };
  client.setAuth(fetchToken, (isAuthenticated) => states.add(isAuthenticated));
  return { states, fetches };
}

test("queries, mutations and actions know the caller", async (t) => {
  const client = open(t, backend);
  const { states } = signIn(client, { subject: "alice", edition: 1 });
  await states.untilEqual(true);
  for (const known of [
    await client.query(api.callers.whoami, {}),
    await client.mutation(api.callers.whoamiAsMutation, {}),
    await client.action(api.callers.whoamiAsAction, {}),
  ]) {
    assert.deepEqual(known, caller("alice", 1));
  }
  await client.mutation(api.notes.add, { board: "signed", text: "mine" });
  const [note] = await client.query(api.notes.list, { board: "signed" });
  assert.equal(note?.author, caller("alice").token_identifier);
});

test("two callers of one query get each their own result", async (t) => {
  const [alice, bob, nobody] = [open(t, backend), open(t, backend), open(t, backend)];
  signIn(alice, { subject: "alice" });
  signIn(bob, { subject: "bob" });
  await watch(alice, api.callers.whoami, {}).untilEqual(caller("alice"));
  await watch(bob, api.callers.whoami, {}).untilEqual(caller("bob"));
  await watch(nobody, api.callers.whoami, {}).untilEqual(null);
});

test("a token that is about to expire is replaced, and queries see the new one", async (t) => {
  const client = open(t, backend, { authRefreshTokenLeewaySeconds: 59 }); // refresh one second after it was issued
  const editions = [1, 2, 3].map((edition) => ({ edition, lifetime_seconds: 60 }));
  const { states, fetches } = signIn(client, ...editions, { edition: 4 });
  const seen = watch(client, api.callers.whoami, {});
  await seen.untilEqual(caller("alice", 3));
  assert(!states.all.includes(false));
  assert.deepEqual(fetches.slice(0, 3), [false, true, true]);
});

test("a client may keep its first token and replace it in time by the server's clock", async (t) => {
  const client = open(t, backend, { initialAuthTokenReuse: true, authRefreshTokenLeewaySeconds: 58 });
  const { fetches } = signIn(client, { edition: 1, lifetime_seconds: 60 }, { edition: 2 });
  const seen = watch(client, api.callers.whoami, {});
  await seen.untilEqual(caller("alice", 1));
  assert.deepEqual(fetches, [false]);
  await seen.untilEqual(caller("alice", 2));
  assert.deepEqual(fetches, [false, true]);
});

test("a refused token is replaced by a fresh one", async (t) => {
  const client = open(t, backend);
  const seen = watch(client, api.callers.whoami, {});
  const { states, fetches } = signIn(client, { is_forged: true }, { edition: 2 });
  await states.untilEqual(true);
  await seen.untilEqual(caller("alice", 2));
  assert.deepEqual(fetches.slice(0, 2), [false, true]);
});

test("a client whose tokens are all refused goes on signed out", async (t) => {
  const client = open(t, backend);
  const { states } = signIn(client, { is_forged: true });
  await states.untilEqual(false);
  assert.deepEqual(states.all, [false]);
  assert.equal(await client.query(api.callers.whoami, {}), null);
  assert.equal(await client.mutation(api.callers.whoamiAsMutation, {}), null);
});

test("an expired token is refused", async (t) => {
  const client = open(t, backend);
  const { states } = signIn(client, { age_seconds: 7200 });
  await states.untilEqual(false);
  assert.equal(await client.query(api.callers.whoami, {}), null);
});

test("a token that expires while connected is replaced by a fresh one", async (t) => {
  const client = open(t, backend);
  // It ended 27 seconds ago, of which the server forgives 30; the client counts its hour from when it got it.
  const expiring = { edition: 1, lifetime_seconds: 3600, age_seconds: 3627 };
  const { states, fetches } = signIn(client, {}, expiring, { edition: 2 });
  const seen = watch(client, api.callers.whoami, {});
  await seen.untilEqual(caller("alice", 1));
  await seen.untilEqual(caller("alice", 2));
  assert.deepEqual(fetches, [false, true, true]);
  assert(!states.all.includes(false));
});

test("signing out reaches queries and mutations", async (t) => {
  const client = open(t, backend);
  const [seen, secret] = [watch(client, api.callers.whoami, {}), watch(client, api.callers.secret, {})];
  signIn(client, { edition: 1 }, { edition: 2 });
  await seen.untilEqual(caller("alice", 2)); // the second token: the client fetches no other one meanwhile
  await secret.untilEqual("for signed-in callers");

  client.client.clearAuth();
  await seen.untilEqual(null);
  const isSignedOut = (view: unknown) =>
    view instanceof ConvexError && (view.data as { code: string }).code === "SIGNED_OUT";
  await secret.until(isSignedOut, "the app's refusal");
  assert.equal(await client.mutation(api.callers.whoamiAsMutation, {}), null);
});

test("another user on the same client sees nothing of the one before", async (t) => {
  const client = open(t, backend);
  signIn(client, { subject: "alice" });
  const seen = watch(client, api.callers.whoami, {});
  await seen.untilEqual(caller("alice"));
  signIn(client, { subject: "bob" });
  await seen.untilEqual(caller("bob"));
  assert.deepEqual(await client.mutation(api.callers.whoamiAsMutation, {}), caller("bob"));
});

test("a client that waits for its token asks nothing before", async (t) => {
  const client = open(t, backend, { expectAuth: true });
  const seen = watch(client, api.callers.whoami, {});
  const { states } = signIn(client, { subject: "late" });
  await states.untilEqual(true);
  await seen.untilEqual(caller("late"));
  assert.deepEqual(seen.all, [caller("late")]);
});

/** The demo app on several screens: watch progress, presence and chat, as a newcomer meets them with `make run`. */

import assert from "node:assert/strict";
import { after, type TestContext } from "node:test";
import type { ConvexClient } from "convex/browser";
import { makeFunctionReference } from "convex/server";
import { ConvexError } from "convex/values";
import { Backend } from "./backend.ts";
import { failureOf, open, test, watch } from "./clients.ts";
import { Views } from "./views.ts";

type Message = { _id: string; message: string; user_name: string; status: "active" | "hidden" | "deleted" };
type Progress = {
  position_seconds: number;
  completion_percentage: number;
  completed: boolean;
  device_type: string | null;
};
type Update = { contentId: string; positionSeconds: number; durationSeconds: number; deviceType?: string };
type Page = { page: Message[]; isDone: boolean };
type PageOptions = { gameId: string; paginationOpts: { numItems: number; cursor: string | null } };
type Join = { gameId: string; sessionId: string; deviceType: string };

const api = {
  games: makeFunctionReference<"query", Record<string, never>, { _id: string; status: string }[]>("games:list"),
  content: makeFunctionReference<"query", Record<string, never>, { _id: string }[]>("content:list"),
  store: makeFunctionReference<"mutation", Record<string, never>, string>("users:store"),
  me: makeFunctionReference<"query", Record<string, never>, { _id: string } | null>("users:me"),
  deleteAccount: makeFunctionReference<"mutation", Record<string, never>, null>("users:deleteAccount"),
  send: makeFunctionReference<"mutation", { gameId: string; message: string }, string>("chat:sendMessage"),
  messages: makeFunctionReference<"query", { gameId: string; limit?: number }, Message[]>("chat:getMessages"),
  allMessages: makeFunctionReference<"query", PageOptions, Page>("chat:listMessages"),
  moderate: makeFunctionReference<"mutation", { messageId: string; status: string }, null>("chat:moderateMessage"),
  update: makeFunctionReference<"mutation", Update, string>("watchProgress:updateProgress"),
  progress: makeFunctionReference<"query", { contentId: string }, Progress | null>("watchProgress:getProgress"),
  continue: makeFunctionReference<"query", { limit?: number }, Progress[]>("watchProgress:getContinueWatching"),
  join: makeFunctionReference<"mutation", Join, null>("presence:join"),
  heartbeat: makeFunctionReference<"mutation", { sessionId: string; gameId: string }, null>("presence:heartbeat"),
  leave: makeFunctionReference<"mutation", { sessionId: string }, null>("presence:leave"),
  viewers: makeFunctionReference<"query", { gameId: string }, { viewerCount: number }>("presence:getViewerCount"),
};

const backend = await Backend.start("demo");
after(() => backend.close());

/** A screen on which this demo user has signed in. */
async function signedIn(t: TestContext, subject: string): Promise<ConvexClient> {
  const client = open(t, backend);
  const states = new Views<boolean>();
  const fetchToken = async (): Promise<string> => {
    const answer = await fetch(`${backend.address}/dev/token`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ subject }),
    });
    return ((await answer.json()) as { token: string }).token;
  };
  client.setAuth(fetchToken, (isAuthenticated) => states.add(isAuthenticated));
  await states.untilEqual(true);
  await client.mutation(api.store, {});
  return client;
}

/** The game with the demo chat, and one in which nobody has said anything yet. */
const gameThatIs = async (status: "live" | "scheduled", client: ConvexClient): Promise<string> =>
  (await client.query(api.games, {})).find((game) => game.status === status)!._id;

const hasCode =
  (code: string) =>
  (failure: unknown): boolean => {
    assert(failure instanceof ConvexError);
    assert.equal(failure.data.code, code);
    return true;
  };

const isForbidden = /Server Error: Forbidden: /;

const textsIn = (messages: Message[]): string[] => messages.map((message) => message.message);

test("a chat message is on every screen, and moderation hides it from all but moderators", async (t) => {
  const [tomas, sam] = await Promise.all([signedIn(t, "tomas"), signedIn(t, "sam")]);
  const guest = open(t, backend);
  const gameId = await gameThatIs("scheduled", guest);
  const screens = [tomas, sam, guest].map((client) => watch(client, api.messages, { gameId, limit: 3 }));
  const paginationOpts = { numItems: 10, cursor: null };
  const lists = [tomas, sam, guest].map((client) => watch(client, api.allMessages, { gameId, paginationOpts }));
  const [ofTomas, ofSam, ofGuest] = lists;
  const shown = async (views: Views<Message[] | Page | Error>[], expected: string[]): Promise<void> => {
    for (const view of views) {
      await view.until((now) => {
        if (now instanceof Error) throw now;
        return textsIn("page" in now ? now.page : now).join("|") === expected.join("|");
      }, `[${expected}]`);
    }
  };
  const messageId = await tomas.mutation(api.send, { gameId, message: "  That was offside!  " });
  await shown([...screens, ...lists], ["That was offside!"]);
  await sam.mutation(api.moderate, { messageId, status: "hidden" });
  await shown([...screens, ofTomas!, ofGuest!], []);
  await shown([ofSam!], ["That was offside!"]);
  await assert.rejects(tomas.mutation(api.moderate, { messageId, status: "active" }), hasCode("MESSAGE_NOT_FOUND"));
  await sam.mutation(api.moderate, { messageId, status: "active" });
  await shown([...screens, ...lists], ["That was offside!"]);

  await assert.rejects(tomas.mutation(api.moderate, { messageId, status: "deleted" }), isForbidden);
  await assert.rejects(guest.mutation(api.moderate, { messageId, status: "deleted" }), isForbidden);
  await assert.rejects(tomas.mutation(api.send, { gameId, message: "   " }), hasCode("EMPTY_MESSAGE"));
  await assert.rejects(guest.mutation(api.send, { gameId, message: "hi" }), hasCode("UNAUTHENTICATED"));
});

test("a user who sends too fast is told when to go on, and others send meanwhile", async (t) => {
  const [aiko, tomas] = await Promise.all([signedIn(t, "aiko"), signedIn(t, "tomas")]);
  const gameId = await gameThatIs("live", aiko);
  const sends = Array.from({ length: 6 }, (_, n) => aiko.mutation(api.send, { gameId, message: `goal ${n}` }));
  const last = await failureOf(sends.pop()!);
  await Promise.all(sends);
  assert(last instanceof ConvexError);
  assert.equal(last.data.code, "RateLimited");
  assert(last.data.retry_after_ms > 0 && last.data.retry_after_ms <= 2_000);
  await tomas.mutation(api.send, { gameId, message: "calm down" });
});

test("progress on one device shows on the others of the same user only", async (t) => {
  const [phone, television, other] = await Promise.all(["aiko", "aiko", "tomas"].map((name) => signedIn(t, name)));
  const contentId = (await phone!.query(api.content, {}))[0]!._id;
  const [onTelevision, onOther] = [television!, other!].map((client) => watch(client, api.progress, { contentId }));
  const toContinue = watch(television!, api.continue, {});
  await Promise.all([onTelevision!.untilEqual(null), onOther!.untilEqual(null), toContinue.untilEqual([])]);

  await phone!.mutation(api.update, { contentId, positionSeconds: 30, durationSeconds: 120, deviceType: "mobile" });
  const isAt = (percentage: number) => (view: Progress | Error | null) =>
    view !== null && "completed" in view && view.completion_percentage === percentage;
  await onTelevision!.until(isAt(25), "a quarter");
  await toContinue.until((view) => Array.isArray(view) && view.length === 1, "one to continue");
  await television!.mutation(api.update, { contentId, positionSeconds: 120, durationSeconds: 120 });
  await onTelevision!.until(isAt(100), "the end");
  await toContinue.untilEqual([]);
  assert.deepEqual(onOther!.all, [null]);
});

test("the viewer count follows who comes and goes, and a heartbeat wakes no screen", async (t) => {
  const [screen, player] = [open(t, backend), open(t, backend)];
  const gameId = await gameThatIs("live", screen);
  const count = watch(screen, api.viewers, { gameId });
  await count.untilEqual({ viewerCount: 0 });
  await player.mutation(api.join, { gameId, sessionId: "one", deviceType: "desktop" });
  await count.untilEqual({ viewerCount: 1 });
  await player.mutation(api.heartbeat, { gameId, sessionId: "one" });
  await player.mutation(api.join, { gameId, sessionId: "two", deviceType: "tablet" });
  await count.untilEqual({ viewerCount: 2 });
  await player.mutation(api.leave, { sessionId: "one" });
  await count.untilEqual({ viewerCount: 1 });
  await player.mutation(api.heartbeat, { gameId, sessionId: "one" });
  await count.untilEqual({ viewerCount: 2 });
  assert.deepEqual(
    count.all.map((view) => (view as { viewerCount: number }).viewerCount),
    [0, 1, 2, 1, 2],
  );
});

test("a screen that closes leaves the viewer count within seconds, by whatever it had joined", async (t) => {
  const [screen, staying, leaving] = [open(t, backend), open(t, backend), await signedIn(t, "tomas")];
  const gameId = await gameThatIs("scheduled", screen);
  const count = watch(screen, api.viewers, { gameId });
  await staying.mutation(api.join, { gameId, sessionId: "stays", deviceType: "desktop" });
  for (const sessionId of ["a tab", "another tab"]) {
    await leaving.mutation(api.join, { gameId, sessionId, deviceType: "mobile" });
  }
  await count.untilEqual({ viewerCount: 3 });
  await leaving.close();
  await count.untilEqual({ viewerCount: 1 });
});

test("a user who deletes the account is gone from every screen", async (t) => {
  const [zoe, screen] = [await signedIn(t, "zoe"), open(t, backend)];
  const gameId = await gameThatIs("live", screen);
  const isThere = (view: Message[] | Error): boolean =>
    Array.isArray(view) && view.some((message) => message.user_name === "zoe");
  const [me, chat] = [watch(zoe, api.me, {}), watch(screen, api.messages, { gameId, limit: 200 })];
  await zoe.mutation(api.send, { gameId, message: "hi and bye" });
  await chat.until(isThere, "a message");
  await zoe.mutation(api.deleteAccount, {});
  await chat.until((view) => !isThere(view), "no message");
  await me.untilEqual(null);
  await assert.rejects(zoe.mutation(api.send, { gameId, message: "still here" }), hasCode("USER_NOT_STORED"));
});

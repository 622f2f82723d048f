/** The demo app on several screens: watch progress, presence and chat, as a newcomer meets them with `make run`. */

import assert from "node:assert/strict";
import { after, type TestContext } from "node:test";
import type { ConvexClient } from "convex/browser";
import { makeFunctionReference } from "convex/server";
import { ConvexError } from "convex/values";
import { Backend } from "./backend.ts";
import { open, test, watch } from "./clients.ts";
import { Views } from "./views.ts";

type Message = { _id: string; message: string; user_name: string; status: "active" | "hidden" | "deleted" };
type Progress = {
  position_seconds: number;
  completion_percentage: number;
  completed: boolean;
  device_type: string | null;
};
type Update = { contentId: string; positionSeconds: number; durationSeconds: number; deviceType?: string };
type Join = { gameId: string; sessionId: string; deviceType: string };

const api = {
  games: makeFunctionReference<"query", Record<string, never>, { _id: string; status: string }[]>("games:list"),
  content: makeFunctionReference<"query", Record<string, never>, { _id: string }[]>("content:list"),
  store: makeFunctionReference<"mutation", Record<string, never>, string>("users:store"),
  send: makeFunctionReference<"mutation", { gameId: string; message: string }, string>("chat:sendMessage"),
  messages: makeFunctionReference<"query", { gameId: string; limit?: number }, Message[]>("chat:getMessages"),
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

const liveGame = async (client: ConvexClient): Promise<string> =>
  (await client.query(api.games, {})).find((game) => game.status === "live")!._id;

const hasCode =
  (code: string) =>
  (failure: unknown): boolean => {
    assert(failure instanceof ConvexError);
    assert.equal(failure.data.code, code);
    return true;
  };

test("a chat message is on every screen, and moderation hides it from all but moderators", async (t) => {
  const [tomas, sam] = await Promise.all([signedIn(t, "tomas"), signedIn(t, "sam")]);
  const guest = open(t, backend);
  const gameId = await liveGame(guest);
  const screens = [tomas, sam, guest].map((client) => watch(client, api.messages, { gameId, limit: 3 }));
  const newest = async (text: string, status: string): Promise<void> => {
    for (const screen of screens) {
      await screen.until((view) => {
        const last = Array.isArray(view) ? view.at(-1) : undefined;
        return last?.message === text && last.status === status;
      }, `${status} '${text}' as the newest message`);
    }
  };
  const messageId = await tomas.mutation(api.send, { gameId, message: "  That was offside!  " });
  await newest("That was offside!", "active");
  await sam.mutation(api.moderate, { messageId, status: "hidden" });
  await newest("", "hidden");
  await sam.mutation(api.moderate, { messageId, status: "active" });
  await newest("That was offside!", "active");

  await assert.rejects(tomas.mutation(api.moderate, { messageId, status: "deleted" }), hasCode("FORBIDDEN"));
  await assert.rejects(tomas.mutation(api.send, { gameId, message: "   " }), hasCode("EMPTY_MESSAGE"));
  await assert.rejects(guest.mutation(api.send, { gameId, message: "hi" }), hasCode("UNAUTHENTICATED"));
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
  const gameId = await liveGame(screen);
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

/** Files, as the official clients handle them: an address from a mutation, `fetch`, and addresses from a query. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { after } from "node:test";
import { ConvexHttpClient } from "convex/browser";
import { api } from "./api.ts";
import { Backend } from "./backend.ts";
import { open, test, watch } from "./clients.ts";

const backend = await Backend.start();
after(() => backend.close());

const bytes = (size: number): Uint8Array<ArrayBuffer> => Uint8Array.from({ length: size }, (_, index) => index % 251);
const read = async (response: Response): Promise<Uint8Array> => new Uint8Array(await response.arrayBuffer());

async function upload(url: string, body: BodyInit, headers: Record<string, string> = {}): Promise<string> {
  const response = await fetch(url, { method: "POST", headers, body });
  assert.equal(response.status, 200);
  const { storageId } = (await response.json()) as { storageId: string };
  return storageId;
}

test("a picture is uploaded, shown to whoever watches, read in parts, and gone when it is deleted", async (t) => {
  const [painter, visitor] = [open(t, backend), open(t, backend)];
  const gallery = watch(visitor, api.pictures.shown, { board: "gallery" });
  const content = bytes(300_000);
  const file = await upload(
    await painter.mutation(api.pictures.uploadUrl, {}),
    new Blob([content], { type: "image/png" }),
  );
  await painter.mutation(api.pictures.add, { board: "gallery", file });
  const shown = await gallery.until((view) => !(view instanceof Error) && view.length === 1, "a picture");
  assert(!(shown instanceof Error));
  const url = shown[0]!.url!;
  assert.match(url, new RegExp(`^${backend.address}/api/storage/`));

  const whole = await fetch(url);
  assert.equal(whole.headers.get("content-type"), "image/png");
  assert.equal(whole.headers.get("digest"), `sha-256=${createHash("sha256").update(content).digest("base64")}`);
  assert.deepStrictEqual(await read(whole), content);
  const part = await fetch(url, { headers: { Range: "bytes=100000-100099" } });
  assert.equal(part.status, 206);
  assert.equal(part.headers.get("content-range"), "bytes 100000-100099/300000");
  assert.deepStrictEqual(await read(part), content.slice(100_000, 100_100));
  const etag = whole.headers.get("etag")!;
  assert.equal((await fetch(url, { headers: { "If-None-Match": etag } })).status, 304);
  assert.equal((await fetch(url, { method: "HEAD" })).headers.get("content-length"), "300000");

  await painter.mutation(api.pictures.removeFile, { file });
  await gallery.until((view) => !(view instanceof Error) && view[0]?.url === null, "a picture that is gone");
  assert.equal((await fetch(url)).status, 404);
});

test("files outlive the server", async () => {
  const client = new ConvexHttpClient(backend.address, { logger: false });
  const file = await upload(await client.mutation(api.pictures.uploadUrl, {}), "kept", {
    "Content-Type": "text/plain",
  });
  const copy = await client.action(api.pictures.copy, { file });
  assert(copy !== null && copy !== file);
  for (const kept of [file, copy]) await client.mutation(api.pictures.add, { board: "kept", file: kept });
  await backend.kill();
  await backend.resume();
  const shown = await client.query(api.pictures.shown, { board: "kept" });
  assert.equal(shown.length, 2);
  for (const { url } of shown) assert.equal(await (await fetch(url!)).text(), "kept");
});

test("an address that nobody gave takes and shows nothing", async () => {
  for (const address of ["/api/storage/upload?token=1-0", "/api/storage/upload"]) {
    const response = await fetch(backend.address + address, { method: "POST", body: "x" });
    assert.equal(response.status, 403);
  }
  assert.equal((await fetch(`${backend.address}/api/storage/nothing`)).status, 404);
});

/**
 * A web page without a browser, as globals. React looks for a document when it is loaded: import this before it.
 */

import { JSDOM } from "jsdom";

const { window } = new JSDOM("<!doctype html><body></body>", { url: "http://127.0.0.1:3000" });

/** Every frame that clients of this page have sent, oldest first. */
export const sentFrames: string[] = [];

class RecordedSocket extends window.WebSocket {
  override send(frame: string): void {
    sentFrames.push(frame);
    super.send(frame);
  }
}

const globals = { window, document: window.document, navigator: window.navigator, WebSocket: RecordedSocket };
for (const [name, value] of Object.entries(globals)) {
  Object.defineProperty(globalThis, name, { value, configurable: true }); // newer Nodes have a `navigator` of their own
}

/** The browser notices that the network is back: clients that wait before they reconnect do it now. */
export function announceNetwork(): void {
  window.dispatchEvent(new window.Event("online"));
}

/** React components on a page, and a record of every view that they committed. */

import "./page.ts";

import type { TestContext } from "node:test";
import { isDeepStrictEqual } from "node:util";
import { ConvexProvider, ConvexReactClient } from "convex/react";
import { type ReactNode, useLayoutEffect } from "react";
import { createRoot, type Root } from "react-dom/client";
import type { Backend } from "./backend.ts";
import { Views } from "./views.ts";

const roots: Root[] = []; // on the page now

/** A client as a web page has it, closed with the test, after what the page shows is taken away. */
export function openReact(t: TestContext, backend: Backend): ConvexReactClient {
  const client = new ConvexReactClient(backend.address, { logger: false });
  t.after(() => {
    for (const root of roots.splice(0)) root.unmount();
    return client.close();
  });
  return client;
}

/** Show components on the page until the test ends. */
export function show(client: ConvexReactClient, ...components: ReactNode[]): void {
  showBare(<ConvexProvider client={client}>{components}</ConvexProvider>);
}

/** As `show`, for components that bring their own provider. */
export function showBare(content: ReactNode): void {
  const root = createRoot(document.body.appendChild(document.createElement("main")));
  roots.push(root);
  root.render(content);
}

/** Record what a component shows, when React has put it on the page and before a browser would paint it. */
export function useRecord<View>(views: Views<View>, view: View): void {
  useLayoutEffect(() => {
    if (views.all.length === 0 || !isDeepStrictEqual(views.last, view)) views.add(view);
  });
}

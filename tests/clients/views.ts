/** What somebody was shown, view by view, and waiting for what is to be shown. */

import assert from "node:assert/strict";
import { inspect } from "node:util";

const WAIT_SECONDS_MAX = 15;

export class Views<View> {
  readonly all: View[] = []; // oldest first; only `add` appends
  readonly #waiting = new Set<() => void>();

  add(view: View): void {
    this.all.push(view);
    for (const look of [...this.#waiting]) look();
  }

  get last(): View {
    assert(this.all.length > 0, "nothing was shown yet");
    return this.all.at(-1)!;
  }

  /** The newest view, as soon as it fits; fails when none has fitted in time. */
  until(fits: (view: View) => boolean, what: string): Promise<View> {
    return new Promise((resolve, reject) => {
      const settle = (finish: () => void): void => {
        clearTimeout(deadline);
        this.#waiting.delete(look);
        finish();
      };
      const look = (): void => {
        try {
          if (this.all.length > 0 && fits(this.last)) settle(() => resolve(this.last));
        } catch (failure) {
          settle(() => reject(failure));
        }
      };
      const expire = (): void => {
        const shown = inspect(this.all.slice(-3), { depth: 6, breakLength: 120 });
        settle(() => reject(new Error(`waited for ${what}; ${this.all.length} views, the last ones: ${shown}`)));
      };
      const deadline = setTimeout(expire, WAIT_SECONDS_MAX * 1000);
      this.#waiting.add(look);
      look();
    });
  }

  /** As `until`, for a view that equals `expected`. */
  untilEqual(expected: View): Promise<View> {
    const equals = (view: View): boolean => {
      try {
        assert.deepStrictEqual(view, expected);
        return true;
      } catch {
        return false;
      }
    };
    return this.until(equals, inspect(expected, { depth: 6, breakLength: 120 }));
  }
}

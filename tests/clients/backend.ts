/**
 * The server process of one test file, held by `server.py`, which obeys one command a line.
 *
 * `server.py` ends the server when this process ends, however it ends: its standard input closes.
 */

import { type ChildProcess, spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

export type Mode = "serve" | "dev" | "demo";
export type TokenOptions = {
  subject?: string;
  lifetime_seconds?: number;
  age_seconds?: number;
  is_forged?: boolean;
  edition?: number;
};

type Reply = { result: unknown } | { error: string };

export class Backend {
  readonly #process: ChildProcess;
  readonly #waiting: { resolve: (result: unknown) => void; reject: (failure: Error) => void }[] = []; // oldest first
  #address = "";

  private constructor(mode: Mode) {
    const script = fileURLToPath(new URL("server.py", import.meta.url));
    this.#process = spawn(process.env["PYTHON"] ?? "python3", [script, mode], { stdio: ["pipe", "pipe", "inherit"] });
    createInterface({ input: this.#process.stdout! }).on("line", (line) => {
      const reply = JSON.parse(line) as Reply;
      const { resolve, reject } = this.#waiting.shift()!;
      if ("error" in reply) reject(new Error(reply.error));
      else resolve(reply.result);
    });
    this.#process.on("exit", (code) => {
      for (const { reject } of this.#waiting.splice(0)) reject(new Error(`server.py ended with code ${code}`));
    });
  }

  static async start(mode: Mode = "serve"): Promise<Backend> {
    const backend = new Backend(mode);
    backend.#address = (await backend.#reply()) as string;
    return backend;
  }

  /** The deployment URL; it stays the same over restarts. */
  get address(): string {
    return this.#address;
  }

  /** SIGKILL. */
  async kill(): Promise<void> {
    await this.#command("kill");
  }

  /** SIGTERM. */
  async stop(): Promise<void> {
    await this.#command("stop");
  }

  /** Start again on the same port and database. */
  async resume(): Promise<void> {
    await this.#command("start");
  }

  /** Change the source of the app. */
  async edit(file: string, change: { old: string; new: string }): Promise<void> {
    await this.#command("edit", { file, ...change });
  }

  async token(options: TokenOptions = {}): Promise<string> {
    return (await this.#command("token", options)) as string;
  }

  async log(): Promise<string> {
    return (await this.#command("log")) as string;
  }

  /** End the server and its keeper. */
  async close(): Promise<void> {
    const ended = new Promise((resolve) => this.#process.once("exit", resolve));
    this.#process.stdin!.end();
    await ended;
  }

  #command(command: string, options: object = {}): Promise<unknown> {
    this.#process.stdin!.write(`${JSON.stringify({ command, options })}\n`);
    return this.#reply();
  }

  #reply(): Promise<unknown> {
    return new Promise((resolve, reject) => this.#waiting.push({ resolve, reject }));
  }
}

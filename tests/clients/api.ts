/** The functions of the test app, with the types that their Python annotations have for a client. */

import {
  type DefaultFunctionArgs,
  makeFunctionReference,
  type PaginationOptions,
  type PaginationResult,
} from "convex/server";
import type { Value } from "convex/values";

export type Note = { _id: string; _creationTime: number; board: string; text: string; author: string | null };
export type Entry = { _id: string; _creationTime: number; board: string; number: number };
export type Caller = { subject: string; token_identifier: string; edition: Value };
export type Special = { whole: bigint; payload: ArrayBuffer; ratio: number; anything: Record<string, Value> };
export type Sample = Special & { _id: string; _creationTime: number };

type Board = { board: string };
type PageOfBoard = Board & { paginationOpts: PaginationOptions };

const query = <Args extends DefaultFunctionArgs, Result>(path: string) =>
  makeFunctionReference<"query", Args, Result>(path);
const mutation = <Args extends DefaultFunctionArgs, Result>(path: string) =>
  makeFunctionReference<"mutation", Args, Result>(path);
const action = <Args extends DefaultFunctionArgs, Result>(path: string) =>
  makeFunctionReference<"action", Args, Result>(path);

type None = Record<string, never>;

export const api = {
  notes: {
    list: query<Board, Note[]>("notes:listNotes"),
    count: query<Board, number>("notes:countNotes"),
    countPatiently: query<Board & { rounds: number }, number>("notes:countPatiently"),
    add: mutation<Board & { text: string }, string>("notes:add"),
    addThenRefuse: mutation<Board & { text: string }, null>("notes:addThenRefuse"),
    addLater: mutation<Board & { text: string; delayMs: number }, string>("notes:addLater"),
    rename: mutation<{ noteId: string; text: string }, null>("notes:rename"),
    remove: mutation<{ noteId: string }, null>("notes:remove"),
  },
  entries: {
    numbers: query<Board, number[]>("entries:numbers"),
    list: query<PageOfBoard, PaginationResult<Entry>>("entries:listEntries"),
    listBackwards: query<PageOfBoard, PaginationResult<Entry>>("entries:listBackwards"),
    change: mutation<Board & { insert: number[]; delete: number[] }, null>("entries:change"),
  },
  faults: {
    refuseQuery: query<None, null>("faults:refuseQuery"),
    refuseMutation: mutation<None, null>("faults:refuseMutation"),
    refuseAction: action<None, null>("faults:refuseAction"),
    refuseWhileEmpty: query<Board, number>("faults:refuseWhileEmpty"),
    breakQuery: query<None, null>("faults:breakQuery"),
    breakMutation: mutation<None, null>("faults:breakMutation"),
    breakAction: action<None, null>("faults:breakAction"),
    returnForbiddenKey: query<None, null>("faults:returnForbiddenKey"),
    hidden: query<None, null>("faults:hidden"),
    missing: query<None, null>("faults:missing"),
  },
  callers: {
    whoami: query<None, Caller | null>("callers:whoami"),
    whoamiAsMutation: mutation<None, Caller | null>("callers:whoamiAsMutation"),
    whoamiAsAction: action<None, Caller | null>("callers:whoamiAsAction"),
    secret: query<None, string>("callers:secret"),
  },
  samples: {
    echo: query<{ value: Value }, Value>("samples:echo"),
    echoInt64: query<{ value: bigint }, bigint>("samples:echoInt64"),
    doubleInteger: query<{ value: number }, number | bigint>("samples:doubleInteger"),
    pad: query<{ letter: string; size: number }, string>("samples:pad"),
    echoByAction: action<{ value: Value }, Value>("samples:echoByAction"),
    keep: mutation<Special, string>("samples:keep"),
    kept: query<{ sampleId: string }, Sample | null>("samples:kept"),
  },
  errands: {
    addTwice: action<Board & { text: string }, number>("errands:addTwice"),
    linger: action<Board, null>("errands:linger"),
  },
  visits: {
    enter: mutation<Board & { name: string }, null>("visits:enter"),
    knock: mutation<Board, null>("visits:knock"),
  },
  pictures: {
    uploadUrl: mutation<None, string>("pictures:uploadUrl"),
    add: mutation<Board & { file: string }, string>("pictures:add"),
    shown: query<Board, { picture_id: string; url: string | null }[]>("pictures:shown"),
    removeFile: mutation<{ file: string }, null>("pictures:removeFile"),
    copy: action<{ file: string }, string | null>("pictures:copy"),
  },
  chatter: {
    greet: query<None, string>("chatter:greet"),
    speak: query<{ word: string }, string>("chatter:speak"),
    speakUp: mutation<{ word: string }, string>("chatter:speakUp"),
  },
};

/** What `faults.py` refuses with, as a client sees it. */
export const REFUSAL = {
  code: "FULL",
  limit: 3,
  retry: null,
  payload: new Uint8Array([0x00, 0xff]).buffer,
  seats: [1, 2.5],
};

// A connection to mlxd over any transport: requests, streams, events. See node.ts and tauri.ts for the transports.

import { Backoff } from "./backoff.js";
import { Events } from "./events.js";
import { BEHIND, Link, MlxdError, moved, type Transport } from "./link.js";
import { Queue } from "./queue.js";
import type { Completion, Methods, Since, Stream } from "./types.js";

export * from "./types.js";
export { Events, MlxdError, type Transport };

type Method = keyof Methods;
type Streaming = "process" | "chat";
export interface CallOptions {
  /** Cancels the request; it then fails with the kind `cancelled`. */
  signal?: AbortSignal;
}

/** How a client gets to the daemon again, once it has lost it. */
export interface Way {
  /** Rejects with a NobodyListens where it is worth another attempt. */
  dial(): Promise<Transport>;
  /** Whether that may start a daemon, which is not done for those who merely watch. */
  starts: boolean;
}

/** Nobody is behind the socket at the moment: the daemon may be just restarting. */
export class NobodyListens extends MlxdError {
  constructor(message: string) {
    super("connect_failed", message);
  }
}

// Daemons that may take over one after the other while one request is being asked.
const MOST_MOVES = 5;
// A daemon that restarts has this long to listen.
const RECONNECT_MS = 5000;

/** An answer as it grows: iterate over its pieces, then await `result`. Leaving the loop early cancels it. */
export class Answer implements AsyncIterable<Stream> {
  readonly result: Promise<Completion>;
  #pieces = new Queue<Stream>();
  #cancel: () => void;

  constructor(begin: (piece: (piece: Stream) => void) => Promise<Completion>, cancel: () => void) {
    this.#cancel = cancel;
    this.result = begin((piece) => this.#pieces.push(piece));
    this.result.then(
      () => this.#pieces.end(),
      (error: Error) => this.#pieces.end(error),
    );
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Stream> {
    let whole = false;
    try {
      yield* this.#pieces;
      whole = true;
    } finally {
      if (!whole) this.#cancel();
    }
  }

  /** Only the text, as it comes. */
  async *text(): AsyncGenerator<string> {
    for await (const piece of this) if (piece.text) yield piece.text;
  }
}

/** Requests, streams and events. With a `way`, a lost connection is replaced for the next request; one that was in
 *  flight then rejects with `connection_lost`, since it may have run. Where another daemon takes over, what the old one
 *  had accepted is answered by that, and what it says it has not done goes to the new one. */
export class Client {
  #link: Link;
  #links = new Set<Link>(); // also those to daemons that others took over from
  #opening: Promise<Link> | undefined;
  #closed: MlxdError | undefined;

  constructor(
    transport: Transport,
    private readonly name = "typescript",
    private readonly way?: Way,
  ) {
    this.#link = this.#begin(transport);
  }

  /** Ask for one thing. Rejects with an MlxdError. */
  call<M extends Method>(method: M, params: Methods[M]["params"], options: CallOptions = {}): Promise<Methods[M]["result"]> {
    return this.#ask((link) => link.send(method, params, options.signal)) as Promise<Methods[M]["result"]>;
  }

  /** Ask for an answer that comes in pieces. */
  stream<M extends Streaming>(method: M, params: Omit<Methods[M]["params"], "stream">, options: CallOptions = {}): Answer {
    const leave = new AbortController();
    const signal = options.signal ? AbortSignal.any([options.signal, leave.signal]) : leave.signal;
    return new Answer(
      (piece) => this.#ask((link) => link.send(method, { ...params, stream: true }, signal, piece)) as Promise<Completion>,
      () => leave.abort(),
    );
  }

  /** Watch the daemon. `since` goes on where the last event of an earlier run was. */
  async events(params: Methods["events.subscribe"]["params"] = {}): Promise<Events> {
    const again = async (since: Since, error: Error) => {
      if (!this.#follows(error)) throw error;
      return this.#ask((link) => link.subscribe({ ...params, since }));
    };
    return new Events(await this.#ask((link) => link.subscribe(params), lost), again);
  }

  close(): void {
    const reason = "this client was closed";
    this.#closed ??= new MlxdError("connection_lost", reason);
    for (const link of this.#links) link.close(reason);
  }

  #begin(transport: Transport): Link {
    const link = new Link(transport, this.name, (ended) => this.#links.delete(ended));
    this.#links.add(link);
    return link;
  }

  /** What comes of `use` with a connection, and where it fails as `again` says, with the next one. */
  async #ask<T>(use: (link: Link) => Promise<T>, again = moved): Promise<T> {
    for (let moves = 1; ; moves++) {
      const link = this.#link.usable ? this.#link : await this.#open();
      try {
        return await use(link);
      } catch (error) {
        if (!this.way || this.#closed || moves === MOST_MOVES || !again(error)) throw error;
        link.leave(error as MlxdError);
      }
    }
  }

  /** Whether events go on after `error` ended them. A daemon that was stopped on purpose is not started by who watches. */
  #follows(error: Error): boolean {
    if (this.#closed) return false;
    return error === BEHIND || (this.way !== undefined && (moved(error) || (lost(error) && !this.way.starts)));
  }

  #open(): Promise<Link> {
    this.#opening ??= this.#dialled().finally(() => (this.#opening = undefined));
    return this.#opening;
  }

  async #dialled(): Promise<Link> {
    if (!this.way) throw this.#link.lost;
    const backoff = new Backoff(1000);
    for (const until = Date.now() + RECONNECT_MS; ; await backoff.pause()) {
      if (this.#closed) throw this.#closed;
      try {
        this.#link = this.#begin(await this.way.dial());
        if (this.#closed) this.close();
        return this.#link;
      } catch (error) {
        if (error instanceof NobodyListens && Date.now() < until) continue;
        throw error instanceof MlxdError ? error : new MlxdError("connect_failed", String(error));
      }
    }
  }
}

/** Whether the connection ended, or none could be had, so that asking for events, which does nothing, may go on. */
function lost(error: unknown): boolean {
  return error instanceof MlxdError && ["connection_lost", "connect_failed", "shutting_down"].includes(error.kind);
}

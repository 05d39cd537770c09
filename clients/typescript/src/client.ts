// A connection to mlxd over any transport: requests, streams, events. See node.ts and tauri.ts for the transports.

import { Decoder, frame, type Message } from "./codec.js";
import type { Completion, ErrorKind, Event, Methods, Snapshot, Stream, SubscribeResult } from "./types.js";

export * from "./types.js";

/** Carries bytes. `onData` and `onClose` are set by the client before anything else happens. */
export interface Transport {
  write(bytes: Uint8Array): void;
  close(): void;
  onData: (bytes: Uint8Array) => void;
  onClose: (reason?: Error) => void;
}

/** The daemon refused or failed; `kind` is stable, the message is for people. */
export class MlxdError extends Error {
  constructor(
    readonly kind: ErrorKind | "connection_lost",
    message: string,
    readonly code: number = 0,
    readonly details: Record<string, unknown> = {},
  ) {
    super(message);
    this.name = "MlxdError";
  }
}

type Method = keyof Methods;
type Streaming = "process" | "chat";
export interface CallOptions {
  /** Cancels the request; it then fails with the kind `cancelled`. */
  signal?: AbortSignal;
}

interface Pending {
  resolve(result: unknown): void;
  reject(error: Error): void;
  piece?: (piece: Stream) => void;
}

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

/** Events in order. `snapshot` is the state they change, absent where `since` was honoured. */
export class Events implements AsyncIterable<Event> {
  constructor(
    readonly snapshot: Snapshot | undefined,
    readonly resync: boolean,
    readonly epoch: string,
    readonly rev: number,
    private readonly queue: Queue<Event>,
    private readonly stop: () => Promise<void>,
  ) {}

  async *[Symbol.asyncIterator](): AsyncGenerator<Event> {
    try {
      yield* this.queue;
    } finally {
      await this.stop();
    }
  }
}

export class Client {
  #pending = new Map<number, Pending>();
  #events = new Map<number, Queue<Event>>();
  #early = new Map<number, Event[]>(); // of subscriptions whose answer is read, and not yet taken
  #decoder = new Decoder();
  #last = 0;
  #lost: MlxdError | undefined;

  constructor(
    private readonly transport: Transport,
    name = "typescript",
  ) {
    transport.onData = (bytes) => this.#received(bytes);
    transport.onClose = (reason) => this.#end(reason?.message ?? "mlxd closed the connection");
    void this.call("hello", { protocol: [1, 1], client: { name } }).catch(() => {}); // its loss shows in every call
  }

  /** Ask for one thing. Rejects with an MlxdError. */
  call<M extends Method>(method: M, params: Methods[M]["params"], options: CallOptions = {}): Promise<Methods[M]["result"]> {
    return this.#send(method, params, options.signal) as Promise<Methods[M]["result"]>;
  }

  /** Ask for an answer that comes in pieces. */
  stream<M extends Streaming>(method: M, params: Omit<Methods[M]["params"], "stream">, options: CallOptions = {}): Answer {
    const leave = new AbortController();
    const signal = options.signal ? AbortSignal.any([options.signal, leave.signal]) : leave.signal;
    return new Answer(
      (piece) => this.#send(method, { ...params, stream: true }, signal, piece) as Promise<Completion>,
      () => leave.abort(),
    );
  }

  /** Watch the daemon. After a lost connection, `since` goes on where the last event was. */
  async events(params: Methods["events.subscribe"]["params"] = {}): Promise<Events> {
    const made = (await this.call("events.subscribe", params)) as SubscribeResult;
    const queue = new Queue<Event>();
    for (const event of this.#early.get(made.subscription) ?? []) queue.push(event);
    this.#early.delete(made.subscription);
    this.#events.set(made.subscription, queue);
    if (this.#lost) queue.end(this.#lost);
    const stop = async () => {
      this.#events.delete(made.subscription);
      await this.call("events.unsubscribe", { subscription: made.subscription }).catch(() => {});
    };
    return new Events(made.snapshot, made.resync ?? false, made.epoch, made.rev, queue, stop);
  }

  close(): void {
    this.transport.close();
    this.#end("this client was closed");
  }

  #send(method: string, params: object, signal?: AbortSignal, piece?: (piece: Stream) => void): Promise<unknown> {
    if (this.#lost) return Promise.reject(this.#lost);
    const id = ++this.#last;
    return new Promise((resolve, reject) => {
      if (signal?.aborted) return reject(new MlxdError("cancelled", "the request was cancelled"));
      const cancel = () => this.#write({ jsonrpc: "2.0", method: "cancel", params: { id } });
      const done = () => signal?.removeEventListener("abort", cancel);
      this.#pending.set(id, {
        resolve: (result) => (done(), resolve(result)),
        reject: (error) => (done(), reject(error)),
        piece,
      });
      signal?.addEventListener("abort", cancel, { once: true });
      try {
        this.#write({ jsonrpc: "2.0", id, method, params });
      } catch (error) {
        this.#pending.delete(id);
        done();
        reject(error as Error);
      }
    });
  }

  #write(message: object): void {
    if (!this.#lost) this.transport.write(frame(message));
  }

  #received(bytes: Uint8Array): void {
    try {
      for (const message of this.#decoder.feed(bytes)) this.#take(message);
    } catch (error) {
      this.transport.close();
      this.#end(`what came is no message: ${(error as Error).message}`);
    }
  }

  #take(message: Message): void {
    if (message.method === "stream") {
      const piece = message.params as Stream;
      this.#pending.get(piece.id as number)?.piece?.(piece);
    } else if (message.method === "event") {
      const event = message.params as Event;
      const queue = this.#events.get(event.subscription);
      if (queue) queue.push(event);
      else this.#early.set(event.subscription, [...(this.#early.get(event.subscription) ?? []), event]);
    } else if (message.id === null && message.error) {
      // The connection as a whole is refused. With `details.reconnect`, what is not answered was not begun either: a
      // new connection finds the daemon that does it.
      const { code, message: told, data } = message.error;
      this.#end(told, new MlxdError((data?.kind ?? "internal_error") as ErrorKind, told, code, data?.details));
    } else if (typeof message.id === "number") {
      const pending = this.#pending.get(message.id);
      this.#pending.delete(message.id);
      if (message.error) {
        const { code, message: told, data } = message.error;
        pending?.reject(new MlxdError((data?.kind ?? "internal_error") as ErrorKind, told, code, data?.details));
      } else pending?.resolve(message.result);
    }
  }

  #end(reason: string, error = new MlxdError("connection_lost", reason)): void {
    if (this.#lost) return;
    this.#lost = error;
    for (const pending of this.#pending.values()) pending.reject(this.#lost);
    for (const queue of this.#events.values()) queue.end(this.#lost);
    this.#pending.clear();
  }
}

/** What is pushed comes out in order, whoever is first. */
class Queue<T> implements AsyncIterable<T> {
  #held: T[] = [];
  #wake: (() => void) | undefined;
  #over = false;
  #error: Error | undefined;

  push(value: T): void {
    this.#held.push(value);
    this.#wake?.();
  }

  end(error?: Error): void {
    this.#over = true;
    this.#error = error;
    this.#wake?.();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<T> {
    for (;;) {
      while (this.#held.length > 0) yield this.#held.shift()!;
      if (this.#error) throw this.#error;
      if (this.#over) return;
      await new Promise<void>((resolve) => (this.#wake = resolve));
    }
  }
}

// One connection: its requests, streams and subscriptions, from `hello` until it is lost. Nothing here connects anew.

import { Decoder, frame, type Message } from "./codec.js";
import { Queue } from "./queue.js";
import type { ErrorKind, Event, Stream, SubscribeResult } from "./types.js";

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
    readonly kind: ErrorKind | "connection_lost" | "connect_failed",
    message: string,
    readonly code: number = 0,
    readonly details: Record<string, unknown> = {},
  ) {
    super(message);
    this.name = "MlxdError";
  }
}

/** Whether nothing was done of what failed so, and a new connection finds the daemon that does it. */
export function moved(error: unknown): boolean {
  return error instanceof MlxdError && error.kind === "shutting_down" && error.details.reconnect === true;
}

/** Ends a queue of events that nobody took for too long: what came after those is asked for again. */
export const BEHIND = new Error("events wait to be taken");
const MOST_EVENTS = 1024;

/** A subscription on one connection. */
export interface Subscribed extends SubscribeResult {
  queue: Queue<Event>;
  stop(): Promise<void>;
}

interface Pending {
  resolve(result: unknown): void;
  reject(error: Error): void;
  piece?: (piece: Stream) => void;
}

export class Link {
  /** Why nothing comes through it any more. */
  lost: MlxdError | undefined;
  #pending = new Map<number, Pending>();
  #events = new Map<number, Queue<Event>>();
  #decoder = new Decoder();
  #last = 0;
  #left: MlxdError | undefined;

  constructor(
    private readonly transport: Transport,
    name: string,
    private readonly onEnd: (link: Link) => void = () => {},
  ) {
    transport.onData = (bytes) => this.#received(bytes);
    transport.onClose = (reason) => this.#end(new MlxdError("connection_lost", reason?.message ?? "mlxd closed the connection"));
    void this.send("hello", { protocol: [1, 1], client: { name } }).catch(() => {}); // its loss shows in every call
  }

  /** Whether new requests may go there. */
  get usable(): boolean {
    return !this.lost && !this.#left;
  }

  /** Another daemon takes over, as `error` says: what this one has accepted is still answered here. */
  leave(error: MlxdError): void {
    this.#left = error;
    for (const queue of this.#events.values()) queue.end(error);
    this.#events.clear();
  }

  /**
   * @param piece takes the pieces of a stream.
   * @param taken takes the result where it is read.
   */
  send(
    method: string,
    params: object,
    signal?: AbortSignal,
    piece?: (piece: Stream) => void,
    taken: (result: unknown) => void = () => {},
  ): Promise<unknown> {
    if (this.lost) return Promise.reject(this.lost);
    if (signal?.aborted) return Promise.reject(new MlxdError("cancelled", "the request was cancelled"));
    const id = ++this.#last;
    return new Promise((resolve, reject) => {
      const cancel = () => this.#write({ jsonrpc: "2.0", method: "cancel", params: { id } });
      const done = () => signal?.removeEventListener("abort", cancel);
      this.#pending.set(id, {
        resolve: (result) => (done(), taken(result), resolve(result)),
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

  async subscribe(params: object): Promise<Subscribed> {
    const queue = new Queue<Event>();
    const place = (result: unknown) => this.#events.set((result as SubscribeResult).subscription, queue);
    const made = (await this.send("events.subscribe", params, undefined, undefined, place)) as SubscribeResult;
    return { ...made, queue, stop: () => this.#unsubscribe(made.subscription) };
  }

  close(reason: string): void {
    this.transport.close();
    this.#end(new MlxdError("connection_lost", reason));
  }

  #write(message: object): void {
    if (!this.lost) this.transport.write(frame(message));
  }

  #received(bytes: Uint8Array): void {
    try {
      for (const message of this.#decoder.feed(bytes)) this.#take(message);
    } catch (error) {
      this.close(`what came is no message: ${(error as Error).message}`);
    }
  }

  #take(message: Message): void {
    if (message.method === "stream") {
      const piece = message.params as Stream;
      this.#pending.get(piece.id as number)?.piece?.(piece);
    } else if (message.method === "event") {
      this.#event(message.params as Event);
    } else if (message.id === null && message.error) {
      // The connection as a whole is refused. Where another daemon takes over, what is not answered was not begun.
      this.#end(failure(message.error));
    } else if (typeof message.id === "number") {
      const pending = this.#pending.get(message.id);
      this.#pending.delete(message.id);
      if (message.error) return pending?.reject(failure(message.error));
      pending?.resolve(message.result);
    }
  }

  #event(event: Event): void {
    const queue = this.#events.get(event.subscription);
    if (!queue) return; // of a subscription that was just left
    if (queue.length < MOST_EVENTS) return queue.push(event);
    queue.end(BEHIND);
    void this.#unsubscribe(event.subscription);
  }

  async #unsubscribe(subscription: number): Promise<void> {
    this.#events.delete(subscription);
    await this.send("events.unsubscribe", { subscription }).catch(() => {}); // its end does the same
  }

  #end(error: MlxdError): void {
    if (this.lost) return;
    this.lost = error;
    for (const pending of this.#pending.values()) pending.reject(error);
    for (const queue of this.#events.values()) queue.end(error);
    this.#pending.clear();
    this.#events.clear();
    this.onEnd(this);
  }
}

function failure({ code, message, data }: NonNullable<Message["error"]>): MlxdError {
  return new MlxdError((data?.kind ?? "internal_error") as ErrorKind, message, code, data?.details);
}

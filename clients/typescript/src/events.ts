// Events in order, over lost connections and restarts of the daemon.

import { Backoff } from "./backoff.js";
import { BEHIND, type Subscribed } from "./link.js";
import type { Event, Since, Snapshot } from "./types.js";

/** Events in order, none lost or repeated. `snapshot` is the state they change, absent where `since` was honoured.
 *
 *  After a lost connection they go on from the last one taken. Where that cannot be (the daemon was started anew, or
 *  was away for too long) there comes an event named `resync`, made here, whose `snapshot` replaces all that was known;
 *  so does a `lagged` event of the daemon's. */
export class Events implements AsyncIterable<Event> {
  #rev: number;
  #backoff = new Backoff(2000);

  /**
   * @param again asks for another subscription; where that makes no sense after `error`, it rejects with it.
   */
  constructor(
    private subscribed: Subscribed,
    private readonly again: (since: Since, error: Error) => Promise<Subscribed>,
  ) {
    this.#rev = subscribed.rev;
  }

  get snapshot(): Snapshot | undefined {
    return this.subscribed.snapshot;
  }

  get resync(): boolean {
    return this.subscribed.resync ?? false;
  }

  /** Which run of the daemon `rev` counts in. */
  get epoch(): string {
    return this.subscribed.epoch;
  }

  /** The last event that was taken, or where the subscription began: with `epoch`, what `since` takes. */
  get rev(): number {
    return this.#rev;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Event> {
    try {
      for (;;) {
        const error = yield* this.#taken();
        if (!error) return;
        await this.#resume(error);
        const { subscription, rev, snapshot } = this.subscribed;
        if (snapshot) yield { subscription, rev, name: "resync", at: Date.now() / 1000, snapshot };
      }
    } finally {
      await this.subscribed.stop();
    }
  }

  /** What comes until the connection ends; returns why it did. */
  async *#taken(): AsyncGenerator<Event, Error | undefined> {
    const events = this.subscribed.queue[Symbol.asyncIterator]();
    for (;;) {
      let next: IteratorResult<Event>;
      try {
        next = await events.next();
      } catch (error) {
        return error as Error;
      }
      if (next.done) return undefined;
      this.#rev = next.value.rev;
      this.#backoff.reset();
      yield next.value;
    }
  }

  async #resume(error: Error): Promise<void> {
    for (;;) {
      if (error !== BEHIND) await this.#backoff.pause();
      try {
        this.subscribed = await this.again({ epoch: this.epoch, rev: this.#rev }, error);
        this.#rev = this.subscribed.rev;
        return;
      } catch (failed) {
        if (failed === error) throw error;
        error = failed as Error;
      }
    }
  }
}

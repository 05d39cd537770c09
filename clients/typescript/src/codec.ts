// Frames: a 4-byte big-endian length, then one msgpack map. Bytes in, messages out; no IO.

import { decode, encode } from "@msgpack/msgpack";

/** What a daemon sends: an answer (`id` with `result` or `error`) or a notification (`method` with `params`). */
export interface Message {
  id?: number | string | null;
  method?: string;
  params?: unknown;
  result?: unknown;
  error?: { code: number; message: string; data?: { kind?: string; details?: Record<string, unknown> } };
}

/** Larger frames are neither sent nor taken. */
export const MAX_FRAME_BYTES = 16 * 1024 * 1024;

export class FrameError extends Error {}

export function frame(message: object): Uint8Array {
  const body = encode(message, { ignoreUndefined: true });
  if (body.length > MAX_FRAME_BYTES) {
    throw new FrameError(`a message of ${body.length} bytes is over the limit of ${MAX_FRAME_BYTES}`);
  }
  const made = new Uint8Array(4 + body.length);
  new DataView(made.buffer).setUint32(0, body.length);
  made.set(body, 4);
  return made;
}

/** Takes bytes in pieces of any size, and gives whole messages. */
export class Decoder {
  #pieces: Uint8Array[] = [];
  #held = 0;

  *feed(bytes: Uint8Array): Generator<Message> {
    this.#pieces.push(bytes);
    this.#held += bytes.length;
    while (this.#held >= 4) {
      const head = this.#peek(4);
      const size = new DataView(head.buffer, head.byteOffset).getUint32(0);
      if (size > MAX_FRAME_BYTES) throw new FrameError(`a frame of ${size} bytes is over the limit`);
      if (this.#held < 4 + size) return;
      this.#take(4);
      yield decode(this.#take(size)) as Message;
    }
  }

  #peek(count: number): Uint8Array {
    if (this.#pieces[0]!.length < count) this.#pieces = [join(this.#pieces)];
    return this.#pieces[0]!;
  }

  #take(count: number): Uint8Array {
    if (count === 0) return new Uint8Array();
    if (this.#pieces[0]!.length < count) this.#pieces = [join(this.#pieces)];
    const first = this.#pieces[0]!;
    if (first.length === count) this.#pieces.shift();
    else this.#pieces[0] = first.subarray(count);
    this.#held -= count;
    return first.subarray(0, count);
  }
}

function join(pieces: Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}

// What is pushed comes out in order, whoever is first.

export class Queue<T> implements AsyncIterable<T> {
  #held: T[] = [];
  #wake: (() => void) | undefined;
  #over = false;
  #error: Error | undefined;

  /** How many were pushed and not taken. */
  get length(): number {
    return this.#held.length;
  }

  push(value: T): void {
    this.#held.push(value);
    this.#wake?.();
  }

  /** Nothing else comes. What was pushed is still taken; then `error` is thrown, where there is one. */
  end(error?: Error): void {
    if (this.#over) return;
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

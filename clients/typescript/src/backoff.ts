// Pauses between attempts: exponential with full jitter, so that many clients do not return in step.

const FIRST_MS = 20;

export class Backoff {
  #bound = FIRST_MS;

  constructor(private readonly most: number) {}

  async pause(): Promise<void> {
    const ms = Math.random() * this.#bound;
    this.#bound = Math.min(this.most, this.#bound * 2);
    await new Promise((resolve) => setTimeout(resolve, ms));
  }

  reset(): void {
    this.#bound = FIRST_MS;
  }
}

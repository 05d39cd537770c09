// Tauri: over the shell plugin, which runs mlxd as a sidecar. Not run in this repository's tests, which have no Tauri.
//
//     import { Command } from "@tauri-apps/plugin-shell";
//     import { overShell } from "mlxd-client/tauri";
//     const words = ["serve", "--stdio", "--join"];
//     const client = await overShell(() => Command.sidecar("binaries/mlxd", words, { encoding: "raw" }));
//
// The app's capabilities must allow that sidecar with those arguments, `shell:allow-stdin-write` and `shell:allow-kill`:
// see docs/sidecar.md.

import { Client, type Transport } from "./client.js";

export * from "./client.js";

/** As much of the shell plugin's Command as is needed; its `encoding` must be `raw`. */
export interface ShellCommand {
  stdout: { on(event: "data", take: (bytes: Uint8Array | number[]) => void): unknown };
  on(event: "close", take: (ended: { code: number | null }) => void): unknown;
  on(event: "error", take: (message: string) => void): unknown;
  spawn(): Promise<{ write(data: Uint8Array | number[]): Promise<void>; kill(): Promise<void> }>;
}

/** Run the command that `make` makes, and another one for the next request where it has ended. */
export async function overShell(make: () => ShellCommand, name = "tauri"): Promise<Client> {
  const dial = () => spawned(make());
  return new Client(await dial(), name, { dial, starts: true });
}

async function spawned(command: ShellCommand): Promise<Transport> {
  let written: Promise<unknown> = Promise.resolve(); // writes go through asynchronous calls, and must keep their order
  const transport: Transport = {
    write: (bytes) => {
      written = written.then(() => child.write(bytes)).catch((error) => transport.onClose(error));
    },
    close: () => void child.kill(),
    onData: () => {},
    onClose: () => {},
  };
  command.stdout.on("data", (bytes) => transport.onData(bytes instanceof Uint8Array ? bytes : Uint8Array.from(bytes)));
  command.on("close", ({ code }) => transport.onClose(new Error(`mlxd ended with ${code ?? "a signal"}`)));
  command.on("error", (message) => transport.onClose(new Error(message)));
  const child = await command.spawn();
  return transport;
}

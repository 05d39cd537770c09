// Node: over the daemon's socket, or over the pipes of a sidecar.

import { spawn } from "node:child_process";
import { connect as dial, type Socket } from "node:net";
import { homedir, platform } from "node:os";
import { join, resolve } from "node:path";
import { Client, type Transport } from "./client.js";

export * from "./client.js";

/** Where the daemon listens: MLXD_SOCKET, else mlxd.sock in MLXD_HOME or the platform's place. */
export function socketPath(env: NodeJS.ProcessEnv = process.env): string {
  if (env.MLXD_SOCKET) return resolve(env.MLXD_SOCKET);
  if (env.MLXD_HOME) return join(resolve(env.MLXD_HOME), "mlxd.sock");
  if (platform() === "darwin") return join(homedir(), "Library", "Application Support", "mlxd", "mlxd.sock");
  const data = env.XDG_DATA_HOME;
  return join(data?.startsWith("/") ? data : join(homedir(), ".local", "share"), "mlxd", "mlxd.sock");
}

/** Connect to a daemon that runs, or that a service manager starts. Rejects where nobody listens. */
export function connect(path: string = socketPath(), name?: string): Promise<Client> {
  return new Promise((resolve, reject) => {
    const socket = dial(path);
    socket.once("error", reject);
    socket.once("connect", () => {
      socket.off("error", reject);
      resolve(new Client(overSocket(socket), name));
    });
  });
}

/** Start `mlxd serve --stdio` with further arguments: `--join` leads to the user's daemon, `--home` has one of its own. */
export function sidecar(args: string[] = ["--join"], command = "mlxd", name?: string): Client {
  const child = spawn(command, ["serve", "--stdio", ...args], { stdio: ["pipe", "pipe", "inherit"] });
  const transport: Transport = {
    write: (bytes) => void child.stdin.write(bytes),
    close: () => void child.stdin.end(),
    onData: () => {},
    onClose: () => {},
  };
  child.stdout.on("data", (bytes: Buffer) => transport.onData(bytes));
  child.stdout.on("close", () => transport.onClose());
  child.on("error", (error) => transport.onClose(error));
  child.stdin.on("error", () => {}); // its end shows on the other pipe
  return new Client(transport, name);
}

function overSocket(socket: Socket): Transport {
  const transport: Transport = {
    write: (bytes) => void socket.write(bytes),
    close: () => void socket.end(),
    onData: () => {},
    onClose: () => {},
  };
  socket.setNoDelay(true);
  socket.on("data", (bytes: Buffer) => transport.onData(bytes));
  socket.on("error", (error) => transport.onClose(error));
  socket.on("close", () => transport.onClose());
  return transport;
}

// Node: over the daemon's socket, or over the pipes of a sidecar.

import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { connect as dial, type Socket } from "node:net";
import { homedir, platform } from "node:os";
import { join, resolve } from "node:path";
import { Client, type Transport } from "./client.js";

export * from "./client.js";

/** Where the daemon listens: MLXD_SOCKET, else mlxd.sock in MLXD_HOME or the platform's place; where that is too long a
 *  path for a socket, a short one in /tmp that the home's path makes. */
export function socketPath(env: NodeJS.ProcessEnv = process.env): string {
  if (env.MLXD_SOCKET) return resolve(env.MLXD_SOCKET);
  const folder = home(env);
  const path = join(folder, "mlxd.sock");
  if (Buffer.byteLength(path) <= (platform() === "linux" ? 107 : 103)) return path;
  const short = createHash("sha256").update(folder).digest("hex").slice(0, 16);
  return `/tmp/mlxd-${process.getuid?.()}/${short}.sock`;
}

function home(env: NodeJS.ProcessEnv): string {
  const chosen = env.MLXD_HOME;
  if (chosen) return chosen === "~" || chosen.startsWith("~/") ? join(homedir(), chosen.slice(1)) : resolve(chosen);
  if (platform() === "darwin") return join(homedir(), "Library", "Application Support", "mlxd");
  const data = env.XDG_DATA_HOME;
  return join(data?.startsWith("/") ? data : join(homedir(), ".local", "share"), "mlxd");
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

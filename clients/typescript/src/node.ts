// Node: over the daemon's socket, or over the pipes of a sidecar.

import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { statSync } from "node:fs";
import { connect as open } from "node:net";
import { homedir, platform } from "node:os";
import { dirname, join, resolve } from "node:path";
import { Client, MlxdError, NobodyListens, type Transport } from "./client.js";

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
export async function connect(path: string = socketPath(), name?: string): Promise<Client> {
  const dial = () => dialled(path);
  return new Client(await dial(), name, { dial, starts: false });
}

/** Start `mlxd serve --stdio` with further arguments: `--join` leads to the user's daemon, `--home` has one of its own.
 *  Where it has ended, the next request starts it again. */
export function sidecar(args: string[] = ["--join"], command = "mlxd", name?: string): Client {
  const start = () => overPipes(command, ["serve", "--stdio", ...args]);
  return new Client(start(), name, { dial: async () => start(), starts: true });
}

/** Node cannot ask who listens. Whoever owns the socket and the folder that it is in is the one who can. */
function refuseOthers(path: string): void {
  for (const each of [dirname(path), path]) {
    const owner = statSync(each, { throwIfNoEntry: false })?.uid;
    if (owner !== undefined && owner !== 0 && owner !== process.getuid?.()) {
      throw new MlxdError("connect_failed", `${each} belongs to another user (uid ${owner})`);
    }
  }
}

function dialled(path: string): Promise<Transport> {
  return new Promise((resolve, reject) => {
    refuseOthers(path);
    const socket = open(path);
    const transport: Transport = {
      write: (bytes) => void socket.write(bytes),
      close: () => void socket.end(),
      onData: () => {},
      onClose: () => {},
    };
    socket.setNoDelay(true);
    socket.on("data", (bytes: Buffer) => transport.onData(bytes));
    socket.on("connect", () => resolve(transport));
    socket.on("error", (error: NodeJS.ErrnoException) => {
      const nobody = ["ENOENT", "ECONNREFUSED", "EAGAIN"].includes(error.code ?? "");
      reject(nobody ? new NobodyListens(`no mlxd listens at ${path}`) : new MlxdError("connect_failed", error.message));
      transport.onClose(error);
    });
    socket.on("close", () => transport.onClose());
  });
}

function overPipes(command: string, args: string[]): Transport {
  const child = spawn(command, args, { stdio: ["pipe", "pipe", "inherit"] });
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
  return transport;
}

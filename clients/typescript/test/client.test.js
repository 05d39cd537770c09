// Against a real daemon: MLXD_SOCKET says where it is, MLXD_COMMAND how to start another one as a sidecar.

import assert from "node:assert/strict";
import { once } from "node:events";
import { chownSync, mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { Client, connect, MlxdError, sidecar, socketPath } from "../dist/node.js";
import { Decoder, frame } from "../dist/codec.js";

const said = "so um can you send the report to maria by friday no wait by thursday";

test("frames come out whole, however they were cut", () => {
  const messages = [{ id: 1, result: {} }, { id: 2, result: { text: "ü".repeat(5000) } }, { method: "event", params: {} }];
  const bytes = Buffer.concat(messages.map((message) => frame(message)));
  for (const size of [1, 3, 7, 1000, bytes.length]) {
    const decoder = new Decoder();
    const found = [];
    for (let at = 0; at < bytes.length; at += size) found.push(...decoder.feed(bytes.subarray(at, at + size)));
    assert.deepEqual(found, messages);
  }
});

test("a request is answered", async () => {
  const client = await connect();
  const { text, usage } = await client.call("process", { prompt: said, temperature: 0 });
  assert.match(text, /Thursday/i);
  assert.ok(usage.prompt_tokens > 0);
  client.close();
});

test("a stream's pieces make its result", async () => {
  const client = await connect();
  const answer = client.stream("process", { prompt: said, temperature: 0 });
  let text = "";
  for await (const piece of answer.text()) text += piece;
  assert.equal(text, (await answer.result).text);
  client.close();
});

test("leaving a stream, or aborting, cancels it", async () => {
  const client = await connect();
  const answer = client.stream("process", { prompt: said, max_tokens: 1000, temperature: 5, top_p: 1 });
  for await (const piece of answer) if (piece.text) break;
  await assert.rejects(answer.result, (error) => error instanceof MlxdError && error.kind === "cancelled");
  const abort = new AbortController();
  const called = client.call("process", { prompt: said, max_tokens: 1000, temperature: 5, top_p: 1 }, { signal: abort.signal });
  setImmediate(() => abort.abort());
  await assert.rejects(called, (error) => error.kind === "cancelled");
  assert.deepEqual(await client.call("ping", {}), {});
  client.close();
});

test("refusals have their kind and details", async () => {
  const client = await connect();
  await assert.rejects(client.call("process", { prompt: "x", model: "/no/such/model" }), (error) => error.kind === "model_not_found");
  await assert.rejects(client.call("process", { prompt: "x", top_p: 7 }), (error) => error.kind === "invalid_params" && error.code === -32602);
  client.close();
});

test("events follow a snapshot", async () => {
  const client = await connect();
  await client.call("models.unload", { model: "mlxd/cleanup" });
  const events = await client.events({ topics: ["models"] });
  assert.equal(events.snapshot.models.find((model) => model.id === "mlxd/cleanup").state, "Downloaded");
  const names = [];
  await client.call("models.load", { model: "mlxd/cleanup" });
  for await (const event of events) {
    names.push(event.name);
    if (event.name === "loading_completed") break;
  }
  assert.ok(names.includes("loading_started"));
  client.close();
});

test("a lost connection ends what waits", async () => {
  const client = await connect();
  const waiting = client.call("jobs.wait", { job: "none" }).catch((error) => error);
  client.close();
  assert.ok((await waiting) instanceof MlxdError);
  await assert.rejects(client.call("ping", {}), (error) => error.kind === "connection_lost");
});

test("a daemon that another replaces says so, and what it has not begun may be asked again", async () => {
  const transport = { write() {}, close() {} };
  const client = new Client(transport);
  const waiting = client.call("process", { prompt: said }).catch((error) => error);
  const goodbye = { jsonrpc: "2.0", id: null, error: { code: -32014, message: "connect anew", data: { kind: "shutting_down", details: { reconnect: true } } } };
  transport.onData(frame(goodbye));
  const error = await waiting;
  assert.equal(error.kind, "shutting_down");
  assert.equal(error.details.reconnect, true);
});

test("nobody there is an error, not a wait", async () => {
  await assert.rejects(connect("/tmp/no-such-mlxd.sock"), (error) => error.kind === "connect_failed");
});

test("another user's socket is left alone", async () => {
  const folder = mkdtempSync(join(tmpdir(), "mlxd-"));
  const server = createServer((socket) => socket.destroy()).listen(join(folder, "s"));
  await once(server, "listening");
  (await connect(join(folder, "s"))).close();
  for (const others of process.getuid() === 0 ? [join(folder, "s"), folder] : []) { // nobody else can give a file away
    chownSync(others, 12345, 12345);
    await assert.rejects(connect(join(folder, "s")), (error) => error.message.includes("another user (uid 12345)"));
    chownSync(others, 0, 0);
  }
  server.close();
  rmSync(folder, { recursive: true });
});

test("a sidecar leads to the user's daemon", { skip: !process.env.MLXD_COMMAND }, async () => {
  const direct = await connect();
  const joined = sidecar(["--join"], process.env.MLXD_COMMAND);
  assert.equal((await joined.call("status", {})).pid, (await direct.call("status", {})).pid);
  joined.close();
  direct.close();
});

test("the socket is where the daemon says", () => {
  assert.equal(socketPath({ MLXD_HOME: "/x" }), "/x/mlxd.sock");
  assert.equal(socketPath({ MLXD_SOCKET: "/y/z" }), "/y/z");
  assert.equal(socketPath({ MLXD_HOME: `/home/${"x".repeat(100)}` }), `/tmp/mlxd-${process.getuid()}/1e314e561ec5b0d4.sock`);
});

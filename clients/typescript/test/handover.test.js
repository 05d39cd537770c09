// Against a real daemon that another takes over from: MLXD_RESTARTED is its home folder, MLXD_COMMAND is mlxd.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { test } from "node:test";
import { promisify } from "node:util";
import { connect, sidecar } from "../dist/node.js";

const { MLXD_RESTARTED: home, MLXD_COMMAND: mlxd } = process.env;
process.env.MLXD_HOME = home;
delete process.env.MLXD_SOCKET;
const prompt = "so um can you send the report to maria by friday no wait by thursday";

/** Ask, one thing after the other, until `over` says so. Returns how many were answered. */
async function ask(client, over) {
  let answered = 0;
  for (; !over.aborted; answered++) {
    assert.match((await client.call("process", { prompt, temperature: 0 })).text, /Thursday/i);
    let text = "";
    const answer = client.stream("process", { prompt, temperature: 0 });
    for await (const piece of answer.text()) text += piece;
    assert.equal(text, (await answer.result).text);
  }
  return answered;
}

/** Take events until the model is known to be unloaded; returns their names. */
async function unloaded(events) {
  const names = [];
  for await (const event of events) {
    names.push(event.name);
    const model = event.snapshot?.models.find((one) => one.id === "mlxd/cleanup") ?? event.model;
    if (names.includes("resync") && model?.state === "Downloaded") break;
  }
  return names;
}

test("nobody notices a handover but by the process", { skip: !home, timeout: 120_000 }, async (context) => {
  const over = new AbortController();
  const clients = [await connect(), sidecar(["--join"], mlxd)];
  context.after(() => (over.abort(), clients.forEach((client) => client.close())));
  const watched = await Promise.all(clients.map((client) => client.events({ topics: ["models"] })));
  const before = await clients[0].call("status", {});
  const long = clients[0].stream("process", { prompt, max_tokens: 60, temperature: 5, top_p: 1 });
  await long[Symbol.asyncIterator]().next(); // it is accepted
  const asking = Promise.all(clients.map((client) => ask(client, over.signal)));
  await Promise.race([asking, promisify(execFile)(mlxd, ["restart"])]);
  over.abort();
  assert.ok((await asking).every((answered) => answered > 0));
  assert.ok((await long.result).usage.completion_tokens > 0); // by the one before
  const after = await Promise.all(clients.map((client) => client.call("status", {})));
  assert.notEqual(after[0].pid, before.pid);
  assert.equal(after[1].pid, after[0].pid);
  await clients[0].call("models.unload", { model: "mlxd/cleanup" });
  for (const names of await Promise.all(watched.map(unloaded))) assert.ok(names.includes("resync"));
});

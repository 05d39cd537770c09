// What becomes of requests and events where the connection ends: the client against daemons that a test plays.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Client, MlxdError, NobodyListens } from "../dist/client.js";
import { Decoder, frame } from "../dist/codec.js";

const GOING = { code: -32014, message: "connect anew", data: { kind: "shutting_down", details: { reconnect: true } } };
const snapshot = { models: [] };

/** Connections to daemons, one after the other. `plays[i]` answers on the i-th: (method, params, daemon, id) → result. */
class Daemons {
  asked = []; // [connection, method, params] of all but hello
  connections = [];

  constructor(...plays) {
    this.plays = plays;
  }

  dial = async () => this.transport();

  transport() {
    const number = this.connections.length;
    const play = this.plays[Math.min(number, this.plays.length - 1)];
    if (play === undefined) throw new NobodyListens("nobody");
    const decoder = new Decoder();
    const transport = { onData() {}, onClose() {}, close: () => transport.onClose() };
    const daemon = {
      say: (...messages) => transport.onData(Buffer.concat(messages.map((message) => frame({ jsonrpc: "2.0", ...message })))),
      end: () => transport.onClose(),
    };
    transport.write = (bytes) => {
      for (const { id, method, params } of decoder.feed(bytes)) {
        if (method !== "hello") this.asked.push([number, method, params]);
        queueMicrotask(() => {
          const made = method === "hello" ? {} : play(method, params, daemon, id);
          if (made?.code) daemon.say({ id, error: made });
          else if (made !== undefined) daemon.say({ id, result: made });
        });
      }
    };
    this.connections.push(daemon);
    return transport;
  }

  client(starts = false) {
    return new Client(this.transport(), "test", { dial: this.dial, starts });
  }
}

const answers = () => ({});
const gone = (method, params, daemon) => void daemon.end();
const event = (rev, name = "x") => ({ method: "event", params: { subscription: 1, rev, name, at: 1 } });
const subscribed = (rev, more = {}) => ({ subscription: 1, epoch: "e", rev, ...more });

test("the next request goes to a new connection", async () => {
  const daemons = new Daemons(answers);
  const client = daemons.client();
  await client.call("ping", {});
  daemons.connections[0].end();
  await Promise.all([client.call("ping", {}), client.call("status", {})]);
  assert.deepEqual(daemons.asked.map(([connection]) => connection), [0, 1, 1]);
});

test("what was in flight may have run, and is not sent again", async () => {
  const daemons = new Daemons(gone, answers);
  const client = daemons.client();
  await assert.rejects(client.call("ping", {}), (error) => error instanceof MlxdError && error.kind === "connection_lost");
  await client.call("ping", {});
  assert.equal(daemons.asked.length, 2);
});

test("what a daemon leaves to its successor goes there, and what it accepted is still answered by it", async () => {
  let finish;
  const old = (method, params, daemon, id) => {
    if (method !== "process") return GOING;
    finish = () => daemon.say({ method: "stream", params: { id, seq: 0, text: "old" } }, { id, result: { text: "old" } });
  };
  const daemons = new Daemons(old, answers);
  const client = daemons.client();
  const answer = client.stream("process", { prompt: "x" });
  await client.call("ping", {});
  await client.call("ping", {});
  assert.deepEqual(daemons.asked.map(([connection, method]) => [connection, method]), [[0, "process"], [0, "ping"], [1, "ping"], [1, "ping"]]);
  finish();
  let text = "";
  for await (const piece of answer.text()) text += piece;
  assert.equal(text, "old");
});

test("a goodbye to the whole connection leaves to the next one what has no answer", async () => {
  const daemons = new Daemons((method, params, daemon) => void daemon.say({ id: null, error: GOING }), answers);
  assert.deepEqual(await daemons.client().call("ping", {}), {});
});

test("requests are not sent on without end", async () => {
  const daemons = new Daemons(() => GOING);
  await assert.rejects(daemons.client().call("ping", {}), (error) => error.kind === "shutting_down");
  assert.equal(daemons.asked.length, 5);
});

test("a daemon that ends for good is an answer", async () => {
  const daemons = new Daemons(() => ({ ...GOING, data: { kind: "shutting_down", details: {} } }));
  await assert.rejects(daemons.client().call("ping", {}), (error) => error.kind === "shutting_down");
  assert.equal(daemons.asked.length, 1);
});

test("a client that was closed stays closed, whatever it waits for", async () => {
  const daemons = new Daemons(gone, undefined);
  const client = daemons.client();
  await assert.rejects(client.call("ping", {}));
  const waiting = client.call("ping", {}).catch((error) => error); // nobody listens: it tries again
  setImmediate(() => client.close());
  assert.equal((await waiting).message, "this client was closed");
  await assert.rejects(client.call("ping", {}), (error) => error.kind === "connection_lost");
});

test("events go on where they were, also where a daemon goes while they are asked for", async () => {
  const first = (method, params, daemon, id) => void daemon.say({ id, result: subscribed(3, { snapshot }) }, event(4), event(5));
  const last = (method, params, daemon, id) => void daemon.say({ id, result: subscribed(5) }, event(6));
  const daemons = new Daemons(gone, first, () => GOING, gone, last);
  const events = await daemons.client().events({ topics: ["models"] });
  assert.deepEqual(events.snapshot, snapshot);
  const revs = [];
  for await (const { rev } of events) {
    assert.equal(events.rev, revs[revs.push(rev) - 1]);
    if (rev === 5) daemons.connections[1].end();
    if (rev === 6) break;
  }
  assert.deepEqual(revs, [4, 5, 6]);
  assert.deepEqual(daemons.asked.at(-2), [4, "events.subscribe", { topics: ["models"], since: { epoch: "e", rev: 5 } }]);
  assert.equal(daemons.asked.at(-1)[1], "events.unsubscribe");
});

test("a daemon that knows nothing of the position begins anew", async () => {
  const old = (method, params, daemon, id) => void daemon.say({ id, result: subscribed(3, { snapshot }) }, event(4));
  const anew = (method) => (method === "events.subscribe" ? { subscription: 1, epoch: "f", rev: 9, snapshot, resync: true } : {});
  const daemons = new Daemons(old, anew);
  const events = await daemons.client().events();
  for await (const { name, rev, snapshot: whole } of events) {
    if (rev === 4) {
      daemons.connections[0].end();
      continue;
    }
    assert.deepEqual([name, rev, whole, events.epoch], ["resync", 9, snapshot, "f"]);
    break;
  }
});

test("events that wait are bounded, and none is lost", async () => {
  const burst = Array.from({ length: 3000 }, (_, index) => event(index + 1));
  let asked = 0;
  const play = (method, params, daemon, id) => {
    if (method !== "events.subscribe") return {};
    asked += 1;
    const from = params.since?.rev ?? 0;
    daemon.say({ id, result: subscribed(from, params.since ? {} : { snapshot }) }, ...burst.slice(from));
  };
  const events = await new Daemons(play).client().events();
  let expected = 1;
  for await (const { rev } of events) {
    assert.equal(rev, expected);
    if (expected++ === 3000) break;
  }
  assert.equal(asked, 3);
});

test("what would start a daemon that was stopped is not done for who watches, but at a handover", async () => {
  const watched = (method, params, daemon, id) => void daemon.say({ id, result: subscribed(1, { snapshot }) });
  const daemons = new Daemons(watched);
  const events = (await daemons.client(true).events())[Symbol.asyncIterator]();
  const next = events.next();
  daemons.connections[0].say({ id: null, error: GOING });
  assert.equal((await next).value.name, "resync");
  const last = events.next();
  daemons.connections[1].end();
  await assert.rejects(last, (error) => error.kind === "connection_lost");
  assert.equal(daemons.connections.length, 2);
});

test("without a way to another connection, the end is the end", async () => {
  const daemons = new Daemons(answers);
  const client = new Client(daemons.transport());
  await client.call("ping", {});
  daemons.connections[0].say({ id: null, error: GOING });
  await assert.rejects(client.call("ping", {}), (error) => error.kind === "shutting_down" && error.details.reconnect);
});

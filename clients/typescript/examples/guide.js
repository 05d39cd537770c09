// What docs/clients.md shows of this client; the tests run it against a real daemon.

// quoted: ask
import { connect, MlxdError } from "mlxd-client/node";

const client = await connect(); // the user's daemon; rejects where nobody listens
const { text, usage } = await client.call("process", { prompt: "um so hello world" });
console.log(text, usage.completion_tokens);
// end quoted

// quoted: stream
const answer = client.stream("process", { prompt: "um so can you uh hear me" });
for await (const piece of answer.text()) process.stdout.write(piece); // leaving the loop early cancels
const { finish_reason } = await answer.result;
// end quoted

// quoted: cancel
const abort = new AbortController();
const long = client.call("process", { prompt: "um so hello", max_tokens: 1000, temperature: 5 }, { signal: abort.signal });
abort.abort();
await long.catch((error) => console.log(error.kind)); // "cancelled"
// end quoted

// quoted: events
const events = await client.events({ topics: ["models"] });
const models = new Map(events.snapshot.models.map((model) => [model.id, model]));
void client.call("models.unload", { model: "mlxd/cleanup" });
for await (const event of events) {
  if (event.snapshot) models.clear(); // the daemon dropped what nobody took: begin anew
  for (const model of event.snapshot?.models ?? [event.model]) models.set(model.id, model);
  if (event.name === "unloaded") break;
}
// end quoted

// quoted: lease
const { lease } = await client.call("models.acquire", { model: "mlxd/cleanup" }); // stays loaded from here on
await client.call("models.release", { lease }); // so does the end of the connection
// end quoted

// quoted: errors
try {
  await client.call("process", { prompt: "x", top_p: 7 });
} catch (error) {
  if (error instanceof MlxdError) console.log(error.kind, error.details); // "invalid_params", { field: "top_p" }
}
client.close();
// end quoted

export { finish_reason, models };

// What the guide shows works as it stands. MLXD_SOCKET says where the daemon is.

import assert from "node:assert/strict";
import { test } from "node:test";

test("the guide's examples run", async () => {
  const { finish_reason, models } = await import("../examples/guide.js");
  assert.equal(finish_reason, "stop");
  assert.equal(models.get("mlxd/cleanup").state, "Downloaded");
});

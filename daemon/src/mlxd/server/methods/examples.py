"""A request and its answer for each method, as docs/wire.md shows them. Data only.

In this order they are one conversation with a new daemon that has the built-in model and a hub with `org/tiny`; a test
holds it. A new method gets a line here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["ANYTHING", "CHANCE", "EXAMPLES", "NAMES", "SUFFIXES", "VALUES", "Example"]

# What differs from run to run, by the field's name. Everything else in an answer is as shown.
SUFFIXES = ("_at", "_s", "_bytes")  # times, durations, sizes
VALUES = frozenset(  # any value of the same type
    {"accepted", "at", "bytes", "clients", "open", "path", "pid", "published", "rev", "tasks", "vectors", "version"}
)
NAMES = frozenset({"epoch", "job", "lease", "revision"})  # likewise, and what a later request that names it uses
CHANCE = frozenset(  # may be there or not
    {
        "capabilities",
        "footprint_bytes",
        "idle_unload_at",
        "now_tokens_per_s",
        "prompt_cache",
        "recent_tokens_per_s",
        "speculation",
    }
)
ANYTHING = "…"  # as a value: anything; as the last of a list: further entries


class Example(NamedTuple):
    """`before` is what has to be asked first, and is not shown: methods with their parameters."""

    params: dict[str, Any]
    result: Any
    before: tuple[tuple[str, dict[str, Any]], ...] = ()


_CLEANUP = {
    "id": "mlxd/cleanup",
    "state": "Downloaded",
    "source": "builtin",
    "size_bytes": 8268534,
    "context_length": 1024,
}
_LOADED = _CLEANUP | {
    "state": "Ready",
    "memory_bytes": 17895988,
    "footprint_bytes": 77410304,
    "capabilities": ["process", ANYTHING],
}
_COMMIT = "0c291d0cb5d0e90f290e8780acd2593aa6c5c969"
_DOWNLOADED = {
    "job": "download-2ba772-1",
    "kind": "download",
    "state": "done",
    "model": "org/tiny",
    "progress": 1.0,
    "done_bytes": 617421,
    "total_bytes": 617421,
    "revision": _COMMIT,
    "started_at": 1795285436.7,
    "ended_at": 1795285437.2,
}
_BATCH = {
    "job": "batch-2ba772-1",
    "kind": "batch",
    "state": "running",
    "model": "mlxd/cleanup",
    "progress": 0.0,
    "total_items": 2,
    "done_items": 0,
    "failed_items": 0,
    "started_at": 1795285440.3,
}
_BATCH_DONE = _BATCH | {"state": "done", "progress": 1.0, "done_items": 2, "ended_at": 1795285440.4}
_TIMINGS = {
    "queue_s": 0.00007,
    "load_s": 0.0,
    "prompt_s": 0.02,
    "first_token_s": 0.024,
    "decode_s": 0.033,
    "total_s": 0.06,
}
_SPREAD = {
    "count": 2,
    "mean": 0.03,
    "stddev": 0.004,
    "least": 0.024,
    "most": 0.037,
    "p50": 0.025,
    "p90": 0.036,
    "p95": 0.036,
    "p99": 0.037,
}

EXAMPLES: dict[str, Example] = {
    "hello": Example(
        {"protocol": [1, 1], "client": {"name": "my app", "version": "0.3"}},
        {
            "protocol": 1,
            "server": {"name": "mlxd", "version": "0.1.0", "pid": 4711},
            "epoch": "2ba7727adc44460a",
            "limits": {
                "frame_bytes": 16777216,
                "depth": 64,
                "requests_in_flight": 1024,
                "queue": 512,
                "subscriber_events": 1024,
                "subscriber_bytes": 4194304,
            },
            "capabilities": [ANYTHING],
            "protocols": [1, 1],
        },
    ),
    "ping": Example({}, {}),
    "status": Example(
        {},
        {
            "version": "0.1.0",
            "pid": 4711,
            "uptime_s": 0.1,
            "rss_bytes": 35577856,
            "models": {"known": 1, "loaded": 0},
            "queue": {"waiting": 0, "running": 0},
            "clients": 1,
            "subscribers": 0,
            "memory": ANYTHING,
            "workers": [],
            "tasks": 1,
        },
    ),
    "rpc.discover": Example(
        {},
        {
            "openrpc": "1.3.2",
            "info": ANYTHING,
            "methods": [ANYTHING],
            "components": ANYTHING,
            "x-notifications": [ANYTHING],
        },
    ),
    "models.list": Example({}, {"models": [_CLEANUP]}),
    "models.get": Example({"model": "mlxd/cleanup"}, _CLEANUP),
    "models.catalog": Example(
        {},
        {
            "entries": [
                {
                    "model": "mlx-community/Qwen3-1.7B-4bit",
                    "uses": ["general", "light"],
                    "size_bytes": 985000000,
                    "memory_bytes": 1572000000,
                    "smallest_mac_gb": 8,
                    "name": "Qwen3 1.7B",
                    "note": "quick on every Mac; can reason before it answers",
                    "default": True,
                },
                ANYTHING,
            ],
            "memory_bytes": 25276510208,
        },
    ),
    "models.plan": Example(
        {"model": "org/tiny"},
        {
            "model": "org/tiny",
            "download_bytes": 617421,
            "disk_free_bytes": 77358956544,
            "weights_bytes": 602103,
            "kv_bytes": 262144,
            "memory_bytes": 135081975,
            "memory_available_bytes": 17693557145,
            "fits": True,
            "revision": _COMMIT,
        },
    ),
    "models.download": Example({"model": "org/tiny"}, {"job": "download-2ba772-1"}),
    "jobs.wait": Example({"job": "download-2ba772-1"}, _DOWNLOADED),
    "jobs.get": Example({"job": "download-2ba772-1"}, _DOWNLOADED),
    "jobs.list": Example({}, {"jobs": [_DOWNLOADED]}),
    "jobs.cancel": Example({"job": "download-2ba772-1"}, _DOWNLOADED),
    "models.verify": Example({"model": "org/tiny"}, {"ok": True}),
    "models.delete": Example({"model": "org/tiny"}, {"freed_bytes": 617421}),
    "models.load": Example({"model": "mlxd/cleanup", "keep_alive": 600}, _LOADED),
    "models.acquire": Example({"model": "mlxd/cleanup"}, {"lease": "2ba772-1", "model": _LOADED | {"leases": 1}}),
    "process": Example(
        {"prompt": "um so i think we should uh meet on monday"},
        {
            "model": "mlxd/cleanup",
            "text": "I think we should meet on Monday.",
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 15, "completion_tokens": 12},
            "timings": _TIMINGS,
        },
    ),
    "chat": Example(
        {"messages": [{"role": "user", "content": "so um can you uh send me the report"}], "max_tokens": 40},
        {
            "model": "mlxd/cleanup",
            "text": "Can you send me the report?",
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 13, "completion_tokens": 10, "cached_tokens": 1},
            "timings": _TIMINGS,
        },
    ),
    "stats": Example(
        {"model": "mlxd/cleanup"},
        {
            "since_at": 1795285430.1,
            "models": [
                {
                    "model": "mlxd/cleanup",
                    "requests": {"process": {"stop": 1}, "chat": {"stop": 1}},
                    "prompt_tokens": 28,
                    "cached_tokens": 1,
                    "completion_tokens": 22,
                    "queue_s": _SPREAD,
                    "load_s": _SPREAD,
                    "first_token_s": _SPREAD,
                    "total_s": _SPREAD,
                    "tokens_per_s": _SPREAD,
                }
            ],
            "clients": {"open": 1, "subscribers": 0, "accepted": 2, "refused": 0},
            "events": {"published": 39, "dropped": 0, "lagged": 0},
            "downloads": {"ended": {"done": 1}, "fetched_bytes": 617421},
        },
    ),
    "metrics": Example({}, {"content_type": "text/plain; version=0.0.4; charset=utf-8", "text": ANYTHING}),
    "tokens.count": Example({"text": "as tokens"}, {"tokens": 4}),
    "tokens.encode": Example(
        {"text": "as tokens", "pieces": True},
        {"tokens": [286, 260, 891, 884], "pieces": ["as", " t", "ok", "ens"]},
    ),
    "tokens.decode": Example({"tokens": [286, 260, 891, 884]}, {"text": "as tokens"}),
    "embed": Example(
        {"input": ["meet on monday"], "dimensions": 4},
        {
            "model": "mlxd/cleanup",
            "dimensions": 4,
            "usage": {"prompt_tokens": 5},
            "vectors": [[-0.51, 0.09, 0.55, -0.66]],
        },
    ),
    "cache.list": Example(
        {},
        {
            "models": [
                {"model": "mlxd/cleanup", "memory": {"hits": 1, "misses": 1, "saved_tokens": 1, "bytes": 301252}}
            ],
            "disk_bytes": 0,
            "memory_budget_bytes": 1769355714,
            "disk_budget_bytes": 4294967296,
        },
    ),
    "cache.clear": Example({"model": "mlxd/cleanup"}, {"memory_bytes": 301252, "disk_bytes": 0}),
    "batch.submit": Example(
        {
            "items": [{"method": "process", "custom_id": "note-1", "params": {"prompt": "um so hello"}}],
            "key": "notes",
            "open": True,
        },
        _BATCH | {"state": "queued", "phase": "open", "total_items": 1},
    ),
    "batch.append": Example(
        {
            "job": "batch-2ba772-1",
            "items": [{"method": "chat", "params": {"messages": [{"role": "user", "content": "uh thanks"}]}}],
            "at": 1,
        },
        _BATCH | {"state": "queued", "phase": "open"},
    ),
    "batch.start": Example({"job": "batch-2ba772-1"}, _BATCH),
    "batch.get": Example({"job": "batch-2ba772-1"}, _BATCH_DONE, before=(("jobs.wait", {"job": "batch-2ba772-1"}),)),
    "batch.results": Example(
        {"job": "batch-2ba772-1", "limit": 1},
        {
            "results": [
                {
                    "index": 0,
                    "custom_id": "note-1",
                    "result": {
                        "model": "mlxd/cleanup",
                        "text": "Hello.",
                        "finish_reason": "stop",
                        "usage": {"prompt_tokens": 6, "completion_tokens": 4},
                        "timings": _TIMINGS,
                    },
                }
            ],
            "more": True,
        },
    ),
    "batch.list": Example({}, {"jobs": [_BATCH_DONE]}),
    "batch.cancel": Example({"job": "batch-2ba772-1"}, _BATCH_DONE),
    "batch.delete": Example({"job": "batch-2ba772-1"}, {}),
    "models.release": Example({"lease": "2ba772-1"}, {}),
    "models.unload": Example({"model": "mlxd/cleanup"}, _CLEANUP),
    "config.get": Example(
        {"names": ["keep_alive_s"]},
        {
            "path": "/home/you/.local/share/mlxd/config.toml",
            "settings": {"keep_alive_s": {"value": 300.0, "origin": "default", "applies": "now"}},
        },
    ),
    "config.set": Example(
        {"values": {"aliases.dictation": "mlxd/cleanup"}},
        {"path": "/home/you/.local/share/mlxd/config.toml", "changed": ["aliases"]},
    ),
    "config.reload": Example({}, {"path": "/home/you/.local/share/mlxd/config.toml"}),
    "personas.list": Example(
        {},
        {"personas": {"editor": {"temperature": 0.2, "system": "You correct spelling."}}, "templates": {}},
        before=(
            ("config.set", {"values": {"personas.editor": {"system": "You correct spelling.", "temperature": 0.2}}}),
        ),
    ),
    "models.story": Example(
        {"model": "mlxd/cleanup"},
        {
            "stories": [
                {
                    "model": "mlxd/cleanup",
                    "steps": [
                        {"at": 1795285430.2, "cause": "found", "source": "NotDownloaded", "target": "Downloaded"},
                        {"at": 1795285438.0, "cause": "load", "source": "Downloaded", "target": "Loading"},
                        {"at": 1795285440.1, "cause": "loaded", "source": "Loading", "target": "Ready"},
                        {"at": 1795285441.9, "cause": "unloaded", "source": "Ready", "target": "Downloaded"},
                    ],
                }
            ]
        },
    ),
    "events.subscribe": Example(
        {"topics": ["models"]},
        {"subscription": 1, "epoch": "2ba7727adc44460a", "rev": 39, "snapshot": {"models": [_CLEANUP]}},
    ),
    "events.unsubscribe": Example({"subscription": 1}, {}),
    "cancel": Example({"id": 1}, {"cancelled": False}),
    "restart": Example({}, {"version": "0.1.0", "pid": 4712}),
    "shutdown": Example({}, {}),
}

"""A programmable child: speaks the children's frames, and misbehaves on demand. A process of its own.

    python bad_child.py [--mode MODE] --fd N

Modes (default: `worker`):
    worker              a well-behaved stand-in for a worker; see below
    never-ready         says nothing
    hang                ready, then silent, with SIGTERM ignored
    spin                ready, then a loop in C that never lets go of the interpreter, with SIGTERM ignored
    segfault abort      ready, then dies of that signal
    exit:CODE           ready, last words on stderr, exit code
    exit-early:CODE     the same, without ready
    garbage             ready, then bytes that are no frames
    garbage-first       the same, without ready
    not-a-message       ready, then a frame that is a map but no message
    huge                ready, then the header of a frame of 2 GiB
    mid-frame           ready, then half a frame and exit 0
    half-frame          ready, then half a frame, slowly growing, for ever
    ignore-stop         a worker that ignores `stop` and the end of its input; goes by SIGTERM
    ignore-all          the same, with SIGTERM ignored
    close-pipe          ready, closes its pipe, and lives on
    flood               ready, then messages as fast as they go
    flood-stderr        the same to stderr, with heartbeats
    deaf                ready and heartbeats, but reads nothing
    late                a worker that gets ready once it may take step 0 (see `!slow`)

A worker answers all requests; `generate` echoes the prompt, a word a step, and tokens are characters. A prompt (the
last message's text), or a path given to `load`, that contains one of these words makes it act on that instead:
    !segfault  !abort  !exit N  !hang  !spin  !garbage  !error
    !sleep SECONDS      neither reads nor beats for that long, then goes on as if nothing had been
    !mute N             silent for N seconds, then the answer
    !step K             the same until it may take step K (see `!slow`)
    !grow N             takes N MiB of memory for good; `!keep N` takes them until it is told to trim
    !slow N             N steps, each of which waits for the file `step-<k>` (k from 0) in the folder named by
                        BAD_CHILD_STEPS, or 20 ms where there is none; `cancel` ends it
    !asked              answers with what it was asked, as JSON: messages and options
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mlxd_client.codec import Decoder, Encoding, encode

HEARTBEAT_S = float(os.environ.get("BAD_CHILD_HEARTBEAT_S", "0.2"))
LIFE_S = int(os.environ.get("BAD_CHILD_LIFE_S", "120"))


class Pipe:
    def __init__(self, fd: int) -> None:
        self.sock = socket.socket(fileno=fd)
        self.sock.setblocking(True)
        os.set_inheritable(fd, False)
        self.decoder = Decoder(Encoding.MSGPACK)

    def notify(self, method: str, params: dict[str, Any]) -> None:
        self.sock.sendall(encode({"jsonrpc": "2.0", "method": method, "params": params}))

    def answer(self, request_id: int, result: dict[str, Any]) -> None:
        self.sock.sendall(encode({"jsonrpc": "2.0", "id": request_id, "result": result}))

    def refuse(self, request_id: int, message: str) -> None:
        error = {"code": -32603, "message": message, "data": {"kind": "internal_error"}}
        self.sock.sendall(encode({"jsonrpc": "2.0", "id": request_id, "error": error}))

    def ready(self) -> None:
        self.notify("ready", {"pid": os.getpid(), "kind": "worker", "versions": {"bad_child": "1"}})

    def receive(self, timeout_s: float) -> list[dict[str, Any]] | None:
        """What came within the time; None at the end of input."""
        if not select.select([self.sock], [], [], timeout_s)[0]:
            return []
        data = self.sock.recv(65_536)
        if not data:
            return None
        self.decoder.feed(data)
        return [message for message in self.decoder if isinstance(message, dict)]


# --- ways to go wrong ---


def segfault() -> NoReturn:
    import ctypes

    ctypes.string_at(0)
    raise AssertionError("unreachable")


def hang() -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(3600)


def spin() -> NoReturn:
    """One call into C that holds the interpreter's lock for hours: no handler runs, no thread gets a turn."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sum(range(10**14))
    raise AssertionError("unreachable")


def may_take(folder: str, step: int) -> bool:
    """Whether the test has let this step happen."""
    return Path(folder, f"step-{step}").exists()


def wait_for_step(step: int) -> None:
    while not may_take(os.environ["BAD_CHILD_STEPS"], step):
        time.sleep(0.005)


def leave(code: int) -> NoReturn:
    print("the first of its last words", file=sys.stderr)
    print(f"\x1b[31mlast words\x1b[0m before exit {code}", file=sys.stderr, flush=True)
    os._exit(code)


def flood(pipe: Pipe) -> NoReturn:
    frames = encode({"jsonrpc": "2.0", "method": "progress", "params": {"progress": 0.5}}) * 1000
    while True:
        pipe.sock.sendall(frames)


def flood_stderr(pipe: Pipe) -> NoReturn:
    last = 0.0
    while True:
        os.write(2, b"a line that nobody asked for\n" * 1000)
        if time.monotonic() - last > HEARTBEAT_S:
            pipe.notify("heartbeat", {})
            last = time.monotonic()


def beat_forever(pipe: Pipe) -> NoReturn:
    while True:
        pipe.notify("heartbeat", {})
        time.sleep(HEARTBEAT_S)


def half_frame(pipe: Pipe) -> NoReturn:
    pipe.sock.sendall((1000).to_bytes(4, "big"))
    time.sleep(3600)
    raise AssertionError("unreachable")


# --- the stand-in for a worker ---


class Worker:
    def __init__(self, pipe: Pipe, *, obedient: bool = True) -> None:
        self.pipe = pipe
        self.obedient = obedient
        self.grown: list[bytes] = []
        self.kept: list[bytes] = []
        self.running: dict[int, Generation] = {}
        self.steps_folder = os.environ.get("BAD_CHILD_STEPS")
        self.last_beat = 0.0
        self.made_tokens = 0

    def serve(self) -> None:
        open_input = True
        while True:
            pause_s = 0.005 if self.running else HEARTBEAT_S
            if open_input:
                messages = self.pipe.receive(pause_s)
                if messages is None:
                    if self.obedient:
                        return
                    open_input, messages = False, []
            else:
                time.sleep(pause_s)
                messages = []
            for message in messages:
                if message["method"] == "stop" and self.obedient:
                    return
                self.handle(message)
            self.step()
            if time.monotonic() - self.last_beat >= HEARTBEAT_S and (open_input or self.obedient):
                made = self.made_tokens + sum(generation.made for generation in self.running.values())
                beat = {"active": len(self.running), "memory_bytes": 1000, "made_tokens": made}
                self.pipe.notify("heartbeat", beat)
                self.last_beat = time.monotonic()

    def handle(self, message: dict[str, Any]) -> None:
        method, params = message["method"], message.get("params", {})
        if method == "load":
            self.act_on(params.get("path", ""), message["id"])
            self.pipe.notify("progress", {"progress": 0.5})
            loaded = {"context_length": 4096, "memory_bytes": 1000, "load_s": 0.001, "capabilities": []}
            self.pipe.answer(message["id"], loaded)
        elif method == "count":
            text = params.get("text") or " ".join(text_of(turn) for turn in params.get("messages", []))
            if self.act_on(text, message["id"]):
                return
            self.pipe.answer(message["id"], {"tokens": len(text.split())})
        elif method == "trim" and params["keep"] < 1:
            self.kept.clear()
        elif method == "cancel":
            if params["id"] in self.running:
                self.finish(params["id"], "cancelled")
        elif method == "generate":
            prompt = text_of(params["messages"][-1])
            if not self.act_on(prompt, message["id"]):
                self.running[message["id"]] = Generation(prompt, params, self.steps_folder)
        elif method in SIMPLE:
            self.pipe.answer(message["id"], SIMPLE[method](params))

    def act_on(self, text: str, request_id: int) -> bool:
        """Do what a command in the text says. Returns: whether the request is thereby answered."""
        words = text.replace("/", " ").split()
        for word, action in {"!segfault": segfault, "!abort": os.abort, "!hang": hang, "!spin": spin}.items():
            if word in words:
                action()
        if "!exit" in words:
            leave(int(words[words.index("!exit") + 1]))
        for word, kept in (("!grow", self.grown), ("!keep", self.kept)):
            if word in words:
                kept.append(b"x" * (int(words[words.index(word) + 1]) * 1024 * 1024))
        if "!sleep" in words:
            time.sleep(float(words[words.index("!sleep") + 1]))
        if "!garbage" in words:
            self.pipe.sock.sendall(b"\xff" * 64)
            hang()
        if "!step" in words:
            wait_for_step(int(words[words.index("!step") + 1]))
        if "!mute" in words:
            time.sleep(float(words[words.index("!mute") + 1]))
        if "!error" in words:
            self.pipe.refuse(request_id, "asked to fail")
            return True
        return False

    def step(self) -> None:
        pieces: list[list[Any]] = []
        for request_id, generation in list(self.running.items()):
            piece = generation.next_piece()
            if piece and generation.stream:
                pieces.append([request_id, piece, ""])
        if pieces:
            self.pipe.notify("step", {"pieces": pieces})
        for request_id, generation in list(self.running.items()):
            if generation.done:
                self.finish(request_id, "stop" if generation.done == "stop" else "length")

    def finish(self, request_id: int, reason: str) -> None:
        generation = self.running.pop(request_id)
        self.made_tokens += generation.made
        self.pipe.answer(
            request_id,
            {
                "text": generation.text,
                "finish_reason": reason,
                "prompt_tokens": len(generation.words),
                "completion_tokens": generation.made,
                "timings": generation.timings(),
            },
        )


def text_of(turn: dict[str, Any]) -> str:
    """A turn's text; of one with images, what is said around them."""
    content = turn.get("content", "")
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def packed_tokens(params: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"tokens": [ord(letter) for letter in params["text"]]}
    if params.get("pieces"):
        made["pieces"] = list(params["text"])
    return {"packed": encode(made)[4:]}


def vectors(params: dict[str, Any]) -> dict[str, Any]:
    return {"vectors": bytes(4) * len(params["input"]), "dimensions": 1, "prompt_tokens": len(params["input"])}


NOTHING_MADE = {"text": "", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 0}
# What is answered at once, whatever was asked before.
SIMPLE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "encode": packed_tokens,
    "decode": lambda params: {"text": "".join(chr(token % 0xD800) for token in params["tokens"])},
    "embed": vectors,
    "prewarm": lambda _: NOTHING_MADE,
    "attach": lambda _: {"memory_bytes": 1000},
    "adapt": lambda _: {},
    "cache": lambda _: {},
    "clear": lambda _: {},
}


class Generation:
    def __init__(self, prompt: str, params: dict[str, Any], steps_folder: str | None) -> None:
        self.words = prompt.split()
        self.stream = bool(params.get("stream"))
        self.limit = int(params.get("options", {}).get("max_tokens", 1_000_000))
        self.slow = "!slow" in self.words
        if self.slow:
            count = int(self.words[self.words.index("!slow") + 1])
            self.words = [f"piece{k}" for k in range(count)]
        if "!asked" in self.words:
            self.words = [json.dumps({"messages": params["messages"], "options": params.get("options", {})})]
        self.steps_folder = steps_folder
        self.made = 0
        self.text = ""
        self.due = self.began = time.monotonic()
        self.first_at = 0.0

    def timings(self) -> dict[str, float]:
        first_at = self.first_at or time.monotonic()
        first_s = first_at - self.began
        decode_s = time.monotonic() - first_at
        return {"prompt_s": first_s, "first_token_s": first_s if self.first_at else 0.0, "decode_s": decode_s}

    @property
    def done(self) -> str:
        return "stop" if self.made == len(self.words) else "length" if self.made >= self.limit else ""

    def next_piece(self) -> str:
        if self.done or (self.slow and not self.may_go_on()):
            return ""
        piece = ("" if self.made == 0 else " ") + self.words[self.made]
        self.made += 1
        self.first_at = self.first_at or time.monotonic()
        self.text += piece
        return piece

    def may_go_on(self) -> bool:
        if self.steps_folder:
            return may_take(self.steps_folder, self.made)
        if time.monotonic() < self.due:
            return False
        self.due = time.monotonic() + 0.02
        return True


def main(argv: list[str]) -> None:
    mode = argv[argv.index("--mode") + 1] if "--mode" in argv else "worker"
    mode, _, value = mode.partition(":")
    signal.alarm(LIFE_S)  # by its default action: no test leaves one behind for long, not even one that spins
    pipe = Pipe(int(argv[argv.index("--fd") + 1]))
    if mode == "never-ready":
        hang()
    if mode == "exit-early":
        leave(int(value))
    if mode == "garbage-first":
        pipe.sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        hang()
    if mode == "late":
        wait_for_step(0)
    if mode == "ignore-all":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe.ready()
    if mode in ("worker", "late"):
        return Worker(pipe).serve()
    if mode in ("ignore-stop", "ignore-all"):
        try:
            Worker(pipe, obedient=False).serve()
        except OSError:  # the daemon is gone, which is no reason either
            time.sleep(3600)
    return go_wrong(mode, value, pipe)


def go_wrong(mode: str, value: str, pipe: Pipe) -> None:
    if mode == "garbage":
        pipe.sock.sendall(b"\xff" * 64)
        hang()
    if mode == "not-a-message":
        pipe.sock.sendall(encode({"hello": "world"}))
        hang()
    if mode == "huge":
        pipe.sock.sendall((2**31).to_bytes(4, "big"))
        hang()
    if mode == "mid-frame":
        pipe.sock.sendall((1000).to_bytes(4, "big") + b"\x81")
        os._exit(0)
    if mode == "close-pipe":
        pipe.sock.close()
        hang()
    if mode == "exit":
        leave(int(value))
    actions = {"hang": hang, "spin": spin, "segfault": segfault, "abort": os.abort}
    piped = {"flood": flood, "flood-stderr": flood_stderr, "deaf": beat_forever, "half-frame": half_frame}
    if mode in actions:
        actions[mode]()
    piped[mode](pipe)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BrokenPipeError, ConnectionResetError):  # the daemon is gone
        os._exit(0)

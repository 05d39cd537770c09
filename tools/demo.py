"""Clean dictated transcripts through a throw-away daemon: `python3 tools/dev.py demo [TRANSCRIPT…]`.

Starts `mlxd serve` in a folder of its own, shows the built-in model coming up as events arrive, streams a few answers,
those for lines that are typed or piped in too, stops the daemon, and checks that nothing is left behind.
"""

from __future__ import annotations

import itertools
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import psutil

from mlxd_client import Client, MlxdError

MODEL = "mlxd/cleanup"
TRANSCRIPTS = (
    "um so i think we should uh meet on monday at three pm no sorry four pm",
    "can you send the the report to anna by friday i mean thursday",
    "okay so basically the invoice is two hundred and fifty dollars and it's due on march third",
    "please uh email me at john dot smith at example dot com when when you're done",
    "we need like twenty five chairs for the meeting room",
    "remind me to call the dentist tomorrow at nine thirty in the morning",
)
START_S = 60.0
STOP_S = 30.0


class Daemon:
    """`mlxd serve` in a folder that nobody else uses. Whatever happens, `end` leaves neither process nor folder."""

    def __init__(self) -> None:
        self.home = tempfile.mkdtemp(prefix="mlxd-demo-", dir="/tmp")  # short: a socket's path has little room
        env = {name: value for name, value in os.environ.items() if not name.startswith("MLXD_")}
        self._log = open(os.path.join(self.home, "stderr"), "wb")  # noqa: SIM115  # lives as long as the daemon
        # A session of its own, so that ctrl-C reaches this program only, which then ends the daemon in good order.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlxd", "serve"],
            env={**env, "MLXD_HOME": self.home}, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
        self.socket = os.path.join(self.home, "mlxd.sock")

    def wait_until_it_listens(self) -> None:
        """Return once it answers. Raises RuntimeError with its last words if it ended instead."""
        deadline = time.monotonic() + START_S
        while not os.path.exists(self.socket):
            if self.process.poll() is not None or time.monotonic() > deadline:
                with open(self._log.name, encoding="utf-8", errors="replace") as file:
                    raise RuntimeError(f"the daemon did not start: {file.read().strip() or 'it said nothing'}")
            time.sleep(0.01)

    def family(self) -> list[psutil.Process]:
        """The daemon and all its descendants, as they are now."""
        try:
            daemon = psutil.Process(self.process.pid)
            return [daemon, *daemon.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def end(self) -> list[str]:
        """Stop it, by force if need be, and remove its folder. Returns what is wrong with how it ended."""
        family = self.family()
        wrong = []
        if self.process.poll() is None:
            self.process.terminate()  # has no effect on one that was asked to shut down already
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            wrong.append(f"the daemon did not stop within {STOP_S:g} s")
        _, left = psutil.wait_procs(family, timeout=5)
        if left:
            wrong.append(f"{len(left)} processes were left running")
            for process in left:
                process.kill()
            psutil.wait_procs(left, timeout=5)
        if self.process.returncode not in (0, None):
            wrong.append(f"the daemon ended with exit status {self.process.returncode}")
        if os.path.lexists(self.socket):
            wrong.append("the socket was left behind")
        self._log.close()
        shutil.rmtree(self.home, ignore_errors=True)
        return wrong


def main(arguments: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    daemon = Daemon()
    status = 1
    try:
        show(f"A daemon starts in {daemon.home}")
        daemon.wait_until_it_listens()
        with Client(daemon.socket, name="demo") as client:
            bring_up(client)
            clean_all(client, arguments)
            client.shutdown()
        status = 0
    except KeyboardInterrupt:
        show("\nInterrupted.")
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MlxdError, RuntimeError) as error:
        show(f"\nThis went wrong: {error}")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # what follows must not be cut short: it takes seconds at most
        wrong = daemon.end()
        for sentence in wrong:
            show(f"This went wrong: {sentence}")
    if not wrong:
        show("The daemon has stopped; no process and no file of it is left.")
    return status or (1 if wrong else 0)


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt


# --- the model comes up -------------------------------------------------------------------------------------------


def bring_up(client: Client) -> None:
    """Load the model, and show what the daemon's events say of it meanwhile."""
    failure: list[MlxdError] = []

    def load() -> None:
        try:
            client.load(MODEL)
        except MlxdError as error:
            failure.append(error)

    began = time.monotonic()
    with client.events(models=[MODEL], topics=["models"]) as events:
        for model in events.snapshot.models if events.snapshot is not None else ():
            show(f"  {0:6.2f} s  {model.id} is {model.state}")
        loading = threading.Thread(target=load, daemon=True)
        loading.start()
        for event in events:
            told = [f"  {time.monotonic() - began:6.2f} s  {event.name}"]
            if event.model is not None:
                told.append(f"→ {event.model.state}")
            if event.progress is not None:
                told.append(f"{event.progress:.0%}")
            if event.error is not None:
                told.append(event.error.message)
            show("  ".join(told))
            if event.name == "error" or (event.model is not None and event.model.state == "Ready"):
                break
        loading.join()
    if failure:
        raise failure[0]


# --- transcripts --------------------------------------------------------------------------------------------------


def clean_all(client: Client, given: list[str]) -> None:
    """Our transcripts or those given as arguments, then what comes on standard input; in the end the figures."""
    figures = [clean(client, raw) for raw in itertools.chain(given or TRANSCRIPTS, from_stdin())]
    rates, firsts = zip(*figures, strict=True)
    show(
        f"\n{len(rates)} transcripts: {statistics.median(rates):.0f} tokens/s, "
        f"first token after {statistics.median(firsts) * 1000:.1f} ms (medians)"
    )


def clean(client: Client, raw: str) -> tuple[float, float]:
    """Stream one answer. Returns tokens per second of decoding, and seconds from sending to the first text."""
    show(f"\n  said     {raw}")
    sys.stdout.write("  written  ")
    first_s: float | None = None
    began = time.perf_counter()
    with client.stream_process(raw, model=MODEL) as stream:
        for text in stream:
            if first_s is None:
                first_s = time.perf_counter() - began
            sys.stdout.write(text)
            sys.stdout.flush()
        result = stream.result
    first_s = time.perf_counter() - began if first_s is None else first_s
    rate = result.usage.completion_tokens / max(result.timings.decode_s, 1e-9)
    tokens = result.usage.completion_tokens
    show(f"\n           {tokens} tokens, {rate:.0f} tokens/s, first after {first_s * 1000:.1f} ms")
    if result.invented:
        show(f"           beware, not in what was said: {', '.join(dict.fromkeys(result.invented))}")
    return rate, first_s


def from_stdin() -> Iterator[str]:
    """Lines that a person types until an empty one, or that a pipe holds. A pipe where nothing comes is left alone."""
    if sys.stdin is None or sys.stdin.closed:
        return
    if sys.stdin.isatty():
        show("\nYour turn: type as you would speak; an empty line ends.")
    elif not select.select([sys.stdin], [], [], 0.2)[0]:
        return
    for line in sys.stdin:
        if line.strip():
            yield line.strip()
        elif sys.stdin.isatty():
            return


def show(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

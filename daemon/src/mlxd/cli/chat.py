"""`mlxd chat`: a conversation at the terminal, or one turn a line from a pipe."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from .common import Commands, add_command, connect, model_ref
from .exits import INTERRUPTED, OK, code_of
from .generate import add_sampling, sampling, show_stats, told

if TYPE_CHECKING:
    from mlxd_client import Client
    from mlxd_client.errors import ModelNotDownloaded
    from mlxd_client.sync import Stream
    from mlxd_client.types import Completion

    from .output import Output

_HELP = """\
/clear          forget the conversation
/system TEXT    give instructions; without a text, take them back
/model ID       go on with another model
/image FILE     show the model an image, with the next turn
/bye            leave; so does ctrl-D, or ctrl-C twice
\"\"\"             begin, and end, a text of several lines
ctrl-C while an answer comes cancels it."""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "chat", chat, "talk with a model",
        epilog="From a pipe, each line is one turn. With --json, each answer is one line of JSON.",
    )  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="show speed and token counts after each answer")
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="show the model an image, with the first turn"
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions for the whole conversation")
    add_sampling(parser)


def chat(args: argparse.Namespace, output: Output) -> int:
    with connect(args) as client:
        return Chat(client, args, output).run()


class Chat:
    """One conversation: its turns so far, and how to ask for the next.

    Attributes:
        interactive: a person types; errors and ctrl-C then end an answer and not the program.
    """

    def __init__(self, client: Client, args: argparse.Namespace, output: Output) -> None:
        self.interactive = sys.stdin.isatty()
        self._client = client
        self._args = args
        self._options: dict[str, Any] = sampling(args)
        self._system: str | None = args.system
        self._output = output
        self._verbose: bool = args.verbose
        self._turns: list[dict[str, Any]] = []
        self._images: list[str] = list(args.image)  # they go with the next turn
        self._interrupts = 0

    def run(self) -> int:
        """Turns until the input ends. The exit code is that of the first failure, where nobody could see it."""
        if self.interactive:
            self._load_editing()
            self._say("/help lists commands, ctrl-D leaves.")
        while True:
            try:
                text = self._read()
            except EOFError:
                break
            except KeyboardInterrupt:
                if self._interrupted():
                    return INTERRUPTED
                continue
            self._interrupts = 0
            if text.startswith("/"):
                if not self._command(text):
                    break
            elif text.strip():
                status = self._turn(text)
                if status != OK and not self.interactive:
                    return status
        if self.interactive:
            self._output.line()
        return OK

    # --- input ----------------------------------------------------------------------------------------------------

    def _load_editing(self) -> None:
        """Line editing and a history of this session. Nothing is written to disk: it is what a user said."""
        try:
            import readline  # noqa: F401  # input() uses it once it is imported
        except ImportError:
            return

    def _read(self) -> str:
        """The next line, or the lines between two marks. Raises EOFError at the end."""
        text = self._line(">>> ")
        if not text.startswith('"""'):
            return text
        lines = [text.removeprefix('"""')]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(self._line("... "))
        return "\n".join(lines).rstrip().removesuffix('"""').strip("\n")

    def _line(self, prompt: str) -> str:
        if self.interactive:
            return input(prompt)
        raw = sys.stdin.buffer.readline()
        if not raw:
            raise EOFError
        return raw.decode("utf-8", "replace").removesuffix("\n")

    def _interrupted(self) -> bool:
        """Ctrl-C at the prompt: the second in a row leaves."""
        self._interrupts += 1
        if not self.interactive or self._interrupts > 1:
            return True
        self._say("\nctrl-C again, ctrl-D or /bye leaves.")
        return False

    # --- commands -------------------------------------------------------------------------------------------------

    def _command(self, text: str) -> bool:
        """Do what a line that begins with a slash says. Returns whether to go on."""
        name, _, rest = text[1:].strip().partition(" ")
        rest = rest.strip()
        if name in ("bye", "exit", "quit"):
            return False
        if name == "clear":
            self._turns.clear()
            self._images.clear()
            self._say("The conversation is forgotten.")
        elif name == "system":
            self._system = rest or None
            self._say("These are the instructions now." if rest else "There are no instructions now.")
        elif name == "model" and rest:
            self._options["model"] = model_ref(rest)
            self._say(f"{rest} answers now.")
        elif name == "image" and rest:
            self._images.append(os.path.expanduser(rest))
            self._say("It goes with the next turn.")
        elif name in ("help", "?"):
            self._say(_HELP)
        else:
            self._output.note(f"there is no command /{name}; /help lists them")
        return True

    def _say(self, text: str) -> None:
        """A word to the person, not part of any answer."""
        if self.interactive:
            self._output.err.write(text + "\n")
            self._output.err.flush()

    # --- answers --------------------------------------------------------------------------------------------------

    def _turn(self, text: str) -> int:
        """Ask, and print the answer as it comes. What failed or was cancelled before a word came is not remembered."""
        from mlxd_client import image
        from mlxd_client.errors import MlxdError, ModelNotDownloaded

        images, self._images = self._images, []
        content = [*map(image, images), text] if images else text
        turns = [*self._turns, {"role": "user", "content": content}]
        system = [{"role": "system", "content": self._system}] if self._system else []
        parts: list[str] = []
        try:
            stream = self._client.stream_chat([*system, *turns], **self._options)
            completion = self._answer(stream, parts)
        except MlxdError as error:
            if parts:
                self._output.line()
            self._output.error(error)
            if isinstance(error, ModelNotDownloaded) and self._fetched(error):
                self._images = images
                return self._turn(text)
            return code_of(error)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self._output.line()
            completion = None
        answer = "".join(parts)
        if answer:
            self._turns = [*turns, {"role": "assistant", "content": answer}]
        if completion is not None and self._verbose:
            show_stats(completion, self._output)
        return OK

    def _fetched(self, error: ModelNotDownloaded) -> bool:
        """Whether the model is there now, since the person wanted it."""
        from mlxd_client.errors import MlxdError

        from . import offer

        try:
            return offer.taken(error, self._args, self._output)
        except MlxdError as failed:
            self._output.error(failed)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        return False

    def _answer(self, stream: Stream, parts: list[str]) -> Completion:
        with stream:  # leaving early cancels, and waits for the daemon to say so
            for piece in told(stream, self._output):
                if piece.text:
                    parts.append(piece.text)
                    if not self._output.json:
                        self._output.text(piece.text)
            completion = stream.result
        if self._output.json:
            self._output.document(completion)
        else:
            self._output.line()
        return completion

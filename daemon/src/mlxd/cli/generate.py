"""`mlxd run`: one prompt through `process`; and the sampling options that `chat` shares with it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from .common import Commands, add_command, connect, duration, model_ref
from .exits import OK, USAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlxd_client import types
    from mlxd_client.sync import Stream
    from mlxd_client.types import Completion

    from .output import Output

__all__ = ["add_sampling", "sampling", "show_stats", "told"]

# The options of the wire that are one number: name, type, help.
_NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("max_tokens", int, "end the answer after so many tokens"),
    ("temperature", float, "0 always takes the likeliest token; higher is more varied"),
    ("top_p", float, "choose among the likeliest tokens that together have this probability"),
    ("top_k", int, "choose among so many of the likeliest tokens"),
    ("min_p", float, "choose among tokens at least so likely, relative to the likeliest"),
    ("repetition_penalty", float, "above 1, make tokens that occurred less likely"),
    ("presence_penalty", float, "lower the score of tokens that occurred"),
    ("frequency_penalty", float, "lower the score of tokens by how often they occurred"),
    ("seed", int, "the same seed, prompt and options give the same answer"),
    ("xtc_probability", float, "how often to leave out the likeliest tokens, for variety"),
    ("xtc_threshold", float, "but only tokens at least so likely"),
    ("thinking_budget", int, "think in so many tokens at most"),
    ("n", int, "make so many answers, with an empty line between them"),
    ("logprobs", int, "with --json: each token's log probability, and of so many alternatives"),
)
# Of the words that an answer made up, so many are named.
_NAMED = 8
_OTHERS = (
    "model", "stop", "logit_bias", "schema", "grammar", "thinking", "keep_alive", "timeout_s", "priority", "adapter",
    "speculation", "context_policy", "kv_bits", "deterministic", "persona",
)  # fmt: skip


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "run", run, "put one prompt through a model",
        epilog="Without a prompt, standard input is it. The answer streams to a terminal and comes whole to a pipe.",
    )  # fmt: skip
    parser.add_argument("prompt", nargs="*", help="the prompt; several words need no quotes")
    parser.add_argument("--stream", action="store_true", help="stream to a pipe too; with --json, one line per piece")
    parser.add_argument("-v", "--verbose", action="store_true", help="show speed and token counts on stderr")
    parser.add_argument("--system", metavar="TEXT", help="instructions that precede the prompt")
    parser.add_argument("--template", metavar="NAME", help="put the prompt into this one; see `mlxd personas`")
    parser.add_argument(
        "--value", action="append", metavar="NAME=TEXT", type=_pair, help="for a placeholder of the template"
    )
    add_sampling(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The generation options of the wire, by the same names."""
    group = parser.add_argument_group("generation")
    group.add_argument("-m", "--model", type=model_ref, help="an id, an alias or a folder (default: the daemon's)")
    group.add_argument("--persona", metavar="NAME", help="answer in this manner; see `mlxd personas`")
    for name, kind, text in _NUMBERS:
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="N", help=text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated"
    )
    group.add_argument("--logit-bias", action="append", metavar="TOKEN=BIAS", type=_bias, help="add to a token's score")
    group.add_argument("--schema", type=_schema, metavar="JSON|FILE", help="the answer is JSON that fits this schema")
    group.add_argument("--grammar", type=_grammar, metavar="TEXT|FILE", help="the answer fits this Lark grammar")
    group.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, default=None, help="let the model reason before it answers"
    )
    group.add_argument(
        "--keep-alive",
        type=duration,
        metavar="TIME",
        help="then unload the model when unused for so long: 90, 5m, forever",
    )
    group.add_argument("--timeout", dest="timeout_s", type=float, metavar="SECONDS", help="fail if it takes longer")
    group.add_argument("--priority", choices=("interactive", "batch"), help="batch work makes way for the interactive")
    group.add_argument("--adapter", type=model_ref, metavar="MODEL", help="a LoRA or DoRA folder, or one of the hub")
    group.add_argument("--speculation", choices=("auto", "off", "lookup", "draft"), help="guess ahead, to be faster")
    group.add_argument(
        "--context-policy", choices=("refuse", "drop_oldest", "rotate"), help="what becomes of too long a prompt"
    )
    group.add_argument("--kv-bits", type=int, choices=(4, 8), help="keep the KV cache in so many bits")
    group.add_argument(
        "--deterministic", action="store_true", default=None, help="let nothing else that runs change the answer"
    )


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as the client takes them."""
    options = {name: getattr(args, name) for name in (*(name for name, _, _ in _NUMBERS), *_OTHERS)}
    if options["logit_bias"] is not None:
        options["logit_bias"] = dict(options["logit_bias"])
    return {name: value for name, value in options.items() if value is not None}


def _bias(text: str) -> tuple[str, float]:
    token, equals, bias = text.rpartition("=")
    try:
        if not equals or int(token) < 0:
            raise ValueError
        return token, float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN=BIAS, e.g. 42=-100") from None


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=TEXT, e.g. language=German")
    return name, value


def _schema(text: str) -> Any:
    import json

    try:
        if not text.lstrip().startswith("{") and text != "true":
            with open(text, encoding="utf-8") as file:
                text = file.read()
        schema = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"no JSON schema: {error}") from None
    if not isinstance(schema, dict) and schema is not True:
        raise argparse.ArgumentTypeError("a JSON schema is an object, or true for any JSON")
    return schema


def _grammar(text: str) -> str:
    """A grammar has a colon after its first rule's name; what has none names a file."""
    if ":" in text:
        return text
    try:
        with open(text, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"no grammar: {error}") from None


def run(args: argparse.Namespace, output: Output) -> int:
    prompt = _prompt(args.prompt, output)
    if prompt is None:
        return USAGE
    options = sampling(args)
    if args.system is not None:
        options["system"] = args.system
    if args.template is not None:
        options["template"] = args.template
    if args.value:
        options["values"] = dict(args.value)
    several = args.n is not None and args.n > 1
    if several and args.stream and not output.json:
        output.note("several answers stream side by side: only with --json")
        return USAGE
    with connect(args) as client:
        if args.stream or (output.terminal and not several):
            completion = _streamed(client.stream_process(prompt, **options), output)
        else:
            completion = client.process(prompt, **options)
            _show(completion, output)
    if completion.invented:
        words = list(dict.fromkeys(completion.invented))
        more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
        output.note(f"the answer has words that the prompt does not account for: {', '.join(words[:_NAMED])}{more}")
    if args.verbose:
        show_stats(completion, output)
    return OK


def _show(completion: Completion, output: Output) -> None:
    if output.json:
        output.document(completion)
        return
    output.line(completion.text)
    for other in completion.alternatives or ():
        output.line()
        output.line(other.text)


def _prompt(words: list[str], output: Output) -> str | None:
    """What to send: the words, or standard input if there are none, less its last newline."""
    if words and words != ["-"]:
        return " ".join(words)
    if not words and sys.stdin.isatty():
        output.note("there is no prompt: give one as arguments, or pipe one in")
        return None
    text = sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")
    if not text.strip():
        output.note("the prompt is empty")
        return None
    return text


def _streamed(stream: Stream, output: Output) -> Completion:
    """Print an answer as it comes. Leaving early, by ctrl-C or a closed pipe, cancels the request."""
    ended = True
    with stream:
        for piece in told(stream, output):
            if output.json:
                output.document(piece)
            elif piece.text:
                output.text(piece.text)
                ended = piece.text.endswith("\n")
        completion = stream.result
    if output.json:
        output.document(completion)
    elif not ended or not completion.text:
        output.line()
    return completion


def told(stream: Stream, output: Output) -> Iterator[types.Stream]:
    """The pieces of an answer. What comes before its text is told on the way: what is waited for, and thoughts."""
    waiting = False
    try:
        for piece in stream.pieces():
            if piece.phase is not None:
                waiting = True
                output.progress(
                    _PHASES.get(piece.phase, piece.phase)
                    + (f" {piece.progress:.0%}" if piece.progress is not None else "")
                )
            elif waiting:
                waiting = False
                output.progress(None)
            if piece.reasoning:
                show_reasoning(piece.reasoning, output)
            if (piece.tool_calls or piece.malformed_tool_calls) and not output.json:
                show_calls(piece, output)
            yield piece
    finally:
        if waiting:
            output.progress(None)


_PHASES = {
    "queued": "waiting for its turn",
    "downloading": "downloading the model",
    "loading": "loading the model",
    "prompt": "reading the prompt",
}


def show_reasoning(text: str, output: Output) -> None:
    """Thoughts go to a terminal, dimmed; whoever reads a pipe wants the answer only."""
    if output.terminal:
        from .output import safe

        output.out.write(f"\x1b[2m{safe(text)}\x1b[0m")
        output.out.flush()


def show_calls(piece: types.Stream, output: Output) -> None:
    """Tool calls, one to a line: nobody here runs them."""
    import msgspec

    for call in piece.tool_calls or ():
        output.line(msgspec.json.encode(call).decode())
    for malformed in piece.malformed_tool_calls or ():
        output.note(f"a call of {malformed.name or 'a tool'} was malformed: {malformed.reason}")


def show_stats(completion: Completion, output: Output) -> None:
    usage, timings, ahead = completion.usage, completion.timings, completion.speculation
    rate = usage.completion_tokens / timings.decode_s if timings.decode_s > 0 else 0.0
    output.note(
        f"{completion.model}: {usage.completion_tokens} tokens, {rate:.0f} tokens/s, "
        f"first after {timings.first_token_s * 1000:.0f} ms, {timings.total_s:.2f} s in all, "
        f"prompt {usage.prompt_tokens} tokens ({usage.cached_tokens} cached), ended by {completion.finish_reason}"
        + (f", {ahead.kind} guessed {ahead.accepted_tokens} of {ahead.drafted_tokens} right" if ahead else "")
    )

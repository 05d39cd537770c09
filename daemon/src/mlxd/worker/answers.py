"""Several answers to one prompt: who of them is still made, and what they become together."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from ..childwire import Answer, Generated
from .constraint import MAX_VALUES, values_in

# How many values one result may hold, its reports of probabilities included; the wire's frames hold somewhat more.
MAX_RESULT_VALUES = 120_000
# What one entry of `logprobs` counts, and each alternative in it.
_ENTRY_VALUES, _TOP_VALUES = 9, 3


@dataclass(slots=True)
class Answers:
    """One request's answers.

    Attributes:
        uids: of the rows that are still made, by their number among the answers.
        made: those that are done, in the same way.
    """

    uids: dict[int, int]
    made: dict[int, Generated] = field(default_factory=dict)

    def end(self, number: int, answer: Generated) -> Generated | None:
        """One is done. Returns what all are together, once it was the last."""
        self.uids.pop(number, None)
        self.made[number] = answer
        return None if self.uids else join([self.made[each] for each in sorted(self.made)])


def join(made: list[Generated]) -> Generated:
    """Answers as one result: the first's, with the others beside it. Cancelled if any of them was."""
    first = made[0]
    room = MAX_VALUES - values_in(first.structured)
    others = []
    for answer in made[1:]:
        held = values_in(answer.structured)
        structured = answer.structured if held <= room else None  # it stays in the text
        room -= held if structured is not None else 0
        others.append(
            Answer(
                text=answer.text, finish_reason=answer.finish_reason, completion_tokens=answer.completion_tokens,
                reasoning=answer.reasoning, logprobs=answer.logprobs, invented=answer.invented, structured=structured,
            )
        )  # fmt: skip
    cancelled = any(answer.finish_reason == "cancelled" for answer in made)
    return msgspec.structs.replace(
        first,
        finish_reason="cancelled" if cancelled else first.finish_reason,
        completion_tokens=sum(answer.completion_tokens for answer in made),
        reasoning_tokens=sum(answer.reasoning_tokens for answer in made),
        alternatives=others,
        timings=msgspec.structs.replace(first.timings, decode_s=max(answer.timings.decode_s for answer in made)),
    )


def reportable(answers: int, logprobs: int, *, parsed: bool) -> int:
    """How many tokens each of so many answers may have, so that their reports fit into one result.

    Args:
        logprobs: how many alternatives are reported for each token.
        parsed: the answers follow a rule, so that there is `structured` beside the reports.
    """
    room = MAX_RESULT_VALUES - (MAX_VALUES if parsed else 0)
    return room // (answers * (_ENTRY_VALUES + _TOP_VALUES * logprobs))

"""Trains the tokenizer: byte-level BPE that keeps every word's first letter apart.

Capitalising is then a swap of one token and the rest of a word is copied as it stands,
known or unknown. Frequent function words, fillers and single digits are tokens of their own.
"""

import argparse
import json
from pathlib import Path
from random import Random

from corrupt import example
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from vocabulary import made_up

END, SYSTEM, USER, ASSISTANT = "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL = (END, SYSTEM, USER, ASSISTANT)
WHOLE = (
    "the a an and or but to of in on at for with from by is are was were be been it that this there "
    "i we you he she they my your his her our their its me us him them not no so if as do did does "
    "have has had can could will would should when what who how where which about into out up "
    "just all don didn doesn isn can won let um uh er uhm erm umm uhh like well know mean please"
).split()
#: Turns are "<|role|>text", an answer ends with <|end|>. System turns are dropped by design:
#: the model knows one task and no instructions. enable_thinking is accepted and changes
#: nothing: the model has no thoughts to open a block for.
TEMPLATE = (
    "{#- enable_thinking is accepted and makes no difference: this model does not think. -#}"
    "{%- for m in messages -%}"
    "{%- if m.content is string -%}{%- set text = m.content -%}"
    "{%- else -%}{%- set ns = namespace(text='') -%}"
    "{%- for part in (m.content or []) -%}{%- if part.type == 'text' -%}"
    "{%- set ns.text = ns.text + part.text -%}{%- endif -%}{%- endfor -%}{%- set text = ns.text -%}"
    "{%- endif -%}"
    "{%- if m.role == 'user' -%}{{- '<|user|>' + text -}}"
    "{%- elif m.role == 'assistant' -%}{{- '<|assistant|>' + text + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def pattern() -> str:
    """The pre-tokenizer's split: whole words, first letters, rests, digits, marks, spaces."""
    start = r"(?: |(?<![\p{L}\p{M}]))"
    whole = "|".join(sorted({*WHOLE, *(w.capitalize() for w in WHOLE)}, key=lambda w: (-len(w), w)))
    return "|".join(
        (
            rf"{start}(?:{whole})(?![\p{{L}}\p{{M}}])",
            r"(?<=\p{L})'(?:s|t|re|ve|ll|d|m)(?!\p{L})",
            rf"{start}\p{{L}}",
            r"\p{Lu}",
            r"[\p{Ll}\p{Lo}\p{Lm}\p{Lt}\p{M}]+",
            r" ?\p{N}",
            r" ?[^\s\p{L}\p{M}\p{N}]",
            r"\s",
        )
    )


def texts(count: int, seed: int):
    """Training text: examples, made-up words, and every whole word in its four shapes."""
    for index in range(count):
        yield from example(Random(f"tokenizer {seed} {index}"))
    rng = Random(seed)
    for _ in range(count):
        yield made_up(rng)
    for word in WHOLE:
        yield from [f"{word} {word} {word.capitalize()}", word.capitalize()] * 200
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,-\"'(#$€@/&*+:;!?[<=>"
    for letter in letters:
        yield from [letter, f"1 {letter}"] * 200


def train(size: int, seed: int = 0, count: int = 40_000) -> Tokenizer:
    """A tokenizer of ``size`` tokens, special ones included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern()), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        show_progress=False,
        max_token_length=9,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts(count, seed), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json with the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=2048)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    save(train(options.size), options.folder)

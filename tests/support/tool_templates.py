"""Chat templates with tools as families of models have them, shortened where that changes no turn's form.

A tiny model's tokenizer has few tokens of its own for their markers: `SPECIAL` are those to add.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support import tiny_model

HERMES = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools>\n\nReturn calls within <tool_call></tool_call> XML tags.<|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\n' + message.content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and message.content) or (not loop.first) %}{{- '\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
                {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' }}{{- message.content }}{{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

_MISTRAL_TURNS = r"""{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}CALLS
    {%- elif message.role == 'assistant' %}{{- message.content + eos_token }}
    {%- elif message.role == 'tool' %}
        {%- if message.tool_call_id | length != 9 %}
            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
        {%- endif %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}' }}
        {{- '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""
_MISTRAL_TOOLS = "{%- if tools %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
MISTRAL = _MISTRAL_TOOLS + _MISTRAL_TURNS.replace(
    "CALLS",
    r"""{{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception("ids have length 9!") }}{%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') }}
        {%- endfor %}{{- ']' + eos_token }}""",
)
MISTRAL_ARGS = _MISTRAL_TOOLS + _MISTRAL_TURNS.replace(
    "CALLS",
    r"""{%- for call in message.tool_calls %}
            {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}
        {%- endfor %}{{- eos_token }}""",
)
_PLAIN_TURNS = r"""{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content }}
    {%- for call in message.tool_calls or [] %}CALL{%- endfor %}{{- '<|im_end|>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
_PLAIN_TOOLS = "{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}"


def _plain(call: str) -> str:
    return _PLAIN_TOOLS + _PLAIN_TURNS.replace("CALL", call)


KIMI_K2 = _plain(
    r"""{{- '<|tool_calls_section_begin|><|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' }}
    {{- (call.function.arguments | tojson) + '<|tool_call_end|><|tool_calls_section_end|>' }}"""
)
QWEN3_CODER = _plain(
    r"""{{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
    {%- for name, value in call.function.arguments | items %}
        {{- '<parameter=' + name + '>\n' + (value if value is string else (value | tojson)) + '\n</parameter>\n' }}
    {%- endfor %}{{- '</function>\n</tool_call>' }}"""
)
GLM = _plain(
    r"""{{- '<tool_call>' + call.function.name }}
    {%- for name, value in call.function.arguments | items %}
        {{- '<arg_key>' + name + '</arg_key><arg_value>' + (value | tojson) + '</arg_value>' }}
    {%- endfor %}{{- '</tool_call>' }}"""
)
FUNCTION_GEMMA = _plain(
    r"""{{- '<start_function_call>call:' + call.function.name + '{' }}
    {%- for name, value in call.function.arguments | items %}{{- name + ':<escape>' + value + '<escape>' }}{%- endfor %}
    {{- '}<end_function_call>' }}"""
)
GEMMA4 = _plain(
    r"""{{- '<|tool_call>call:' + call.function.name + '{' }}
    {%- for name, value in call.function.arguments | items %}{{- name + ':<|"|>' + value + '<|"|>' }}{%- endfor %}
    {{- '}<tool_call|>' }}"""
)
LFM2 = _plain(r"""{{- '<|tool_call_start|>[' + call.function.name + '()]<|tool_call_end|>' }}""")

MINIMAX = _plain(
    r"""{{- '<minimax:tool_call>\n<invoke name="' + call.function.name + '">\n' }}
    {%- for name, value in call.function.arguments | items %}
        {{- '<parameter name="' + name + '">' + (value | string) + '</parameter>\n' }}
    {%- endfor %}{{- '</invoke>\n</minimax:tool_call>' }}"""
)
LONGCAT = _plain(
    r"""{{- '<longcat_tool_call>' + call.function.name + '\n' }}
    {%- for name, value in call.function.arguments | items %}
        {{- '<longcat_arg_key>' + name + '</longcat_arg_key>\n' }}
        {{- '<longcat_arg_value>' + (value | string) + '</longcat_arg_value>\n' }}
    {%- endfor %}{{- '</longcat_tool_call>' }}"""
)
MINICPM5 = _plain(
    r"""{{- '<function name="' + call.function.name + '">' }}
    {%- for name, value in call.function.arguments | items %}
        {{- '<param name="' + name + '">' + (value | string) + '</param>' }}
    {%- endfor %}{{- '</function>' }}"""
)

# The markers that each family's tokenizer has as tokens, and whether those are special.
FAMILIES: dict[str, tuple[str, str, list[tuple[str, bool]]]] = {
    "json_tools": ("qwen3", HERMES, [("<tool_call>", False), ("</tool_call>", False)]),
    "mistral": ("mistral", MISTRAL, [("[TOOL_CALLS]", True), ("[INST]", True), ("[/INST]", True)]),
    "mistral_args": ("mistral", MISTRAL_ARGS, [("[TOOL_CALLS]", True), ("[ARGS]", True)]),
    "kimi_k2": ("llama", KIMI_K2, [
        ("<|tool_calls_section_begin|>", True), ("<|tool_calls_section_end|>", True), ("<|tool_call_begin|>", True),
        ("<|tool_call_argument_begin|>", True), ("<|tool_call_end|>", True),
    ]),
    "qwen3_coder": ("qwen3", QWEN3_CODER, [("<tool_call>", False), ("</tool_call>", False)]),
    "glm47": ("llama", GLM, [
        ("<tool_call>", True), ("</tool_call>", True), ("<arg_key>", False), ("</arg_value>", False),
    ]),
    "function_gemma": ("gemma3_text", FUNCTION_GEMMA, [
        ("<start_function_call>", True), ("<end_function_call>", True), ("<escape>", True),
    ]),
    "gemma4": ("gemma3_text", GEMMA4, [("<|tool_call>", True), ("<tool_call|>", True), ('<|"|>', True)]),
    "minimax_m2": ("llama", MINIMAX, [("<minimax:tool_call>", True), ("</minimax:tool_call>", True)]),
    "longcat": ("llama", LONGCAT, []),
    "minicpm5": ("llama", MINICPM5, []),
    "gemma4_thinking": ("gemma3_text", GEMMA4, [("<|channel>", True), ("<channel|>", True)]),
    "pythonic": ("llama", LFM2, [("<|tool_call_start|>", True), ("<|tool_call_end|>", True)]),
}  # fmt: skip


def build(folder: Path, name: str, *, context: int = 4096, **shape: Any) -> Path:
    """A tiny model of a family that has tools, whose markers are tokens; `shape` as tiny_model.build has it."""
    from tokenizers import AddedToken, Tokenizer

    family, template, markers = FAMILIES[name]
    tiny_model.build(folder, family=family, context=context, vocabulary=420, chat_template=template, **shape)
    tiny_model.write_tokenizer(folder, 400, template)  # leaves room for the markers
    file = str(folder / "tokenizer.json")
    if name == "gemma4_thinking":  # its thoughts have markers of their own
        text = Path(file).read_text()
        Path(file).write_text(text.replace('"<think>"', '"<thunk>"').replace('"</think>"', '"</thunk>"'))
    tokenizer = Tokenizer.from_file(file)
    for text, special in markers:
        token = AddedToken(text, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    tokenizer.save(file)
    return folder

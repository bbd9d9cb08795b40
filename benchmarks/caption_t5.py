"""Train a small T5 on the captions of a table, without pictures: a language model to measure stage 2 with where no T5 can be fetched.

    OMP_NUM_THREADS=1 python benchmarks/caption_t5.py captions.csv t5 && qf train --stage 2 --llm t5

The encoder reads `a photo of` and some words of a caption in another order, the decoder learns the caption: it learns to say what the
encoder's states hold. Only rows whose `split` is train, where there is such a column. Prints one JSON object."""

import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
from common import machine
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
PROMPT = "a photo of"
IGNORED = -100


def captions_of(file: Path) -> list[str]:
    """Returns the training captions of a table with a column `caption`."""
    with open(file, newline="", encoding="utf-8") as lines:
        return [row["caption"].strip() for row in csv.DictReader(lines) if row.get("split", "train") == "train"]


def train_tokenizer(captions: list[str], size: int) -> PreTrainedTokenizerFast:
    """Returns a lower-case BPE tokenizer that ends each text."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[PAD, END, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def some_words(caption: str, draw: np.random.Generator) -> str:
    """Returns the prompt and a random share of the words of a caption, in a random order."""
    words = caption.split()
    chosen = draw.permutation(len(words))[: round(len(words) * draw.random())]
    return " ".join([PROMPT, *(words[n] for n in chosen)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captions", type=Path)
    parser.add_argument("out", type=Path, help="the folder of the T5")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--vocab-size", type=int, default=4000)
    arguments = parser.parse_args()
    captions = captions_of(arguments.captions)
    tokenizer = train_tokenizer(captions, arguments.vocab_size)
    torch.manual_seed(0)
    sizes = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4}
    config = T5Config(
        vocab_size=len(tokenizer),
        **sizes,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, total_steps=arguments.steps, pct_start=0.1)
    draw, losses, began = np.random.default_rng(0), [], time.perf_counter()
    for _ in range(arguments.steps):
        chosen = [captions[n] for n in draw.integers(len(captions), size=arguments.batch_size)]
        given = tokenizer([some_words(caption, draw) for caption in chosen], padding=True, return_tensors="pt")
        wanted = tokenizer(chosen, padding=True, return_tensors="pt")
        labels = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, IGNORED)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    result = {
        "captions": len(captions),
        "parameters": model.num_parameters(),
        "steps": arguments.steps,
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "loss": round(float(np.mean(losses[-100:])), 3),
        **machine(torch.device("cpu")),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

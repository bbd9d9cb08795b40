"""Trains the small language model that ships in data/lm: `python -m qf.data.train_lm --out FOLDER --minutes 8`.

It reads text alone, never a picture: captions, questions and answers about scenes of another seed than the sample's. None of
these scenes has the content of a val or test scene (see `make_scene`). `document` lists the formats. In some documents the text
follows other captions of the same scene. So the model learns to speak about what stands before a text, and later that is a
visual prefix.

Letters: B batch, L text length.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .scenes import Scene, captions, make_scene, questions
from .train_clip import TRAIN_SEED, learning_rate

WIDTH, LAYERS, HEAD_WIDTH, MLP_WIDTH = 192, 4, 32, 512
LENGTH = 512  # positions; no training text is longer
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
MAX_VOCAB = 1000  # tokens; fewer if every word of the texts is one token before
PHOTO = "a photo of {}"
QUESTION, ANSWER = "Question: {} Answer:", " {}"
DOCUMENTS = 3  # drawn for each scene
SEEN = 0.6  # share of the documents that begin with other captions of the scene
ANOTHER = 0.45  # probability that a dialog goes on after an answer; below a half, so that greedy decoding stops there
ANSWER_WEIGHT = 5  # of the loss of an answer's first token, one of thirteen tokens; others weigh 1
IGNORED = -100  # the label of padding
POOL = 50  # batches that are sorted by length together


def document(scene: Scene, rng: random.Random) -> str:
    """A text about a scene in one of the formats that stage 2 prompts with: a caption, "a photo of" and a caption, or a
    dialog of one or more pairs "Question: … Answer: …". A line of other captions may stand before it."""
    caption, *others = texts = rng.sample(own := captions(scene), len(own))
    text, line = rng.choices(
        ((caption, others), (PHOTO.format(caption), others), (dialog(scene, rng), texts)), weights=(25, 10, 65)
    )[0]
    return f"{picture_line(line[: rng.randint(1, len(line))])}{text}" if rng.random() < SEEN else text


def picture_line(texts: Sequence[str]) -> str:
    """A line of captions that stands for the picture before a text."""
    return f"Picture: {' '.join(texts)}\n"


def dialog(scene: Scene, rng: random.Random) -> str:
    """Pairs of a question and its answer, in any order, each pair once."""
    asked = list(questions(scene))
    rng.shuffle(asked)
    more = 1
    while more < len(asked) and rng.random() < ANOTHER:
        more += 1
    return " ".join(f"{QUESTION}{ANSWER}".format(question, answer) for question, answer, *_ in asked[:more])


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows every byte and keeps capitals and spaces. It adds the start token, and no end token."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB,
        min_frequency=5,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, learner.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=learner,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=MLP_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // HEAD_WIDTH,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # on CPU, the backward pass of sdpa is several times slower
    )
    return LlamaForCausalLM(config)


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[NDArray[np.int16]]:
    """The ids of each text, from the start token to the end token."""
    end = tokenizer.eos_token_id
    return [np.array([*ids, end], np.int16) for ids in tokenizer(texts, return_attention_mask=False)["input_ids"]]


def padded(rows: Sequence[NDArray[np.int16]], pad: int) -> tuple[Tensor, Tensor]:
    """Input ids (B, L) and labels (B, L) of texts: padding stands on the right, its label is IGNORED."""
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = labels[row, : len(ids)] = torch.from_numpy(ids).long()
    return input_ids, labels


def batches(texts: list[NDArray[np.int16]], pad: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of texts of about the same length. The seed decides their order."""
    rng = np.random.default_rng(seed)
    lengths = np.array([len(ids) for ids in texts])
    while True:
        order = rng.permutation(len(texts))
        for start in range(0, len(order), POOL * size):
            pool = order[start : start + POOL * size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            groups = [pool[n : n + size] for n in range(0, len(pool), size)]
            for group in rng.permutation(len(groups)):
                yield padded([texts[n] for n in groups[group]], pad)


def next_token_losses(model: LlamaForCausalLM, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L - 1) float32 each: the loss of predicting each next token, 0 where it is padding, and the logits' best token.

    The texts are padded on the right, so the causal mask alone keeps padding out."""
    logits = model(input_ids=input_ids).logits[:, :-1].float()
    target = labels[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(target.shape), logits.argmax(-1)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[NDArray[np.int16]],
    log_path: Path,
    options: argparse.Namespace,
) -> tuple[int, int]:
    """Train for options.steps, or else for options.minutes; returns the numbers of steps and of tokens seen."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    validation = [make_scene(TRAIN_SEED, "val", index) for index in range(200)]
    answer, colon = tokenizer(" Answer:", add_special_tokens=False)["input_ids"]
    start, next_check, seen, step = time.time(), options.check_every, 0, 0
    with log_path.open("w") as log:

        def write(**fields: object) -> None:
            line = json.dumps({"seconds": round(time.time() - start, 1), **fields})
            print(line, file=sys.stderr)
            log.write(line + "\n")
            log.flush()

        for input_ids, labels in batches(texts, tokenizer.pad_token_id, options.batch, options.seed):
            done = step / options.steps if options.steps else (time.time() - start) / (60 * options.minutes)
            if done >= 1:
                break
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done, options.lr)
            tokens = int((labels[:, 1:] != IGNORED).sum())
            with torch.autocast("cpu", torch.bfloat16):
                losses, _ = next_token_losses(model, input_ids, labels)
            weights = (labels[:, 1:] != IGNORED).float()
            weights[:, 1:][(input_ids[:, :-2] == answer) & (input_ids[:, 1:-1] == colon)] = ANSWER_WEIGHT
            loss = losses.sum() / tokens
            optimizer.zero_grad()
            ((losses * weights).sum() / weights.sum()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen += tokens

            if step % 50 == 0:
                write(step=step, loss=round(loss.item(), 4), lr=round(optimizer.param_groups[0]["lr"], 7), tokens=seen)
            if time.time() - start >= next_check:
                next_check += options.check_every
                write(step=step, split="val", **evaluate(model, tokenizer, validation))
    return step, seen


@torch.inference_mode()
def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, scenes: Sequence[Scene], batch: int = 100
) -> dict[str, float]:
    """Perplexities, each of a token, of captions with their end token and of answers; and the share of right answers in percent.

    Answers are measured blind, after the question alone, and read, after a line of the scene's captions and the question."""
    texts = [captions(scene) for scene in scenes]
    asked = [
        (picture_line(own), QUESTION.format(question), ANSWER.format(answer))
        for scene, own in zip(scenes, texts, strict=True)
        for question, answer, *_ in questions(scene)
    ]
    prefix, _ = PHOTO.split("{}")
    end = tokenizer.eos_token
    cases = {
        "caption": [("", caption + end) for own in texts for caption in own],
        "photo": [(prefix.rstrip(), f" {caption}{end}") for own in texts for caption in own],
        "answer_blind": [(question, answer) for _, question, answer in asked],
        "answer_read": [(line + question, answer) for line, question, answer in asked],
    }
    measured = {}
    for name, pairs in cases.items():
        pairs.sort(key=lambda pair: sum(map(len, pair)))  # less padding
        total, tokens, right = 0.0, 0, 0
        for n in range(0, len(pairs), batch):
            input_ids, labels = _continuations(tokenizer, pairs[n : n + batch])
            losses, best = next_token_losses(model, input_ids, labels)
            counted = labels[:, 1:] != IGNORED
            total, tokens = total + losses.sum().item(), tokens + int(counted.sum())
            right += int(((best == labels[:, 1:]) | ~counted).all(1).sum())
        measured[f"{name}_perplexity"] = round(float(np.exp(total / tokens)), 4)
        if name.startswith("answer"):
            measured[f"{name}_right"] = round(100 * right / len(pairs), 2)
    return measured


def _continuations(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Input ids and labels (B, L) of prompts with their continuations; only the continuations have labels."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    rows = [
        np.array([*ids, *tokenizer(text, add_special_tokens=False)["input_ids"]], np.int16)
        for ids, (_, text) in zip(prompts, pairs, strict=True)
    ]
    input_ids, labels = padded(rows, tokenizer.pad_token_id)
    for row, ids in enumerate(prompts):
        labels[row, : len(ids)] = IGNORED
    return input_ids, labels


def sentences(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> dict[str, list[str]]:
    """What the model says after a few prompts: four texts after each, sampled, and the likeliest answer to a question."""
    torch.manual_seed(seed)
    said = {}
    for prompt in (
        "",
        "a photo of",
        "Question: How many stars are there? Answer:",
        "Picture: Two red stars at night.\n",
    ):
        inputs = tokenizer([prompt] * 4, return_tensors="pt")
        out = model.generate(**inputs, do_sample=True, top_p=0.9, max_new_tokens=60)
        said[prompt] = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    prompt = "Picture: Two red stars at night.\nQuestion: How many stars are there? Answer:"
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=60)
    said[prompt] = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def write_model(options: argparse.Namespace) -> dict[str, Any]:
    """Train the model and write its folder; returns the results, as results.json holds them."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    scenes = [make_scene(TRAIN_SEED, "train", index) for index in range(options.scenes)]
    rng = random.Random(f"documents {options.seed}")
    documents = [document(scene, rng) for scene in scenes for _ in range(DOCUMENTS)]
    tokenizer = train_tokenizer(documents[:60_000])
    texts = tokenise(tokenizer, documents)
    model = build_model(tokenizer)
    start = time.time()
    steps, seen = train(model, tokenizer, texts, options.out / "train_log.jsonl", options)
    seconds = time.time() - start

    model.set_attn_implementation("sdpa")
    model.bfloat16().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    loaded = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32).eval()
    loaded_tokenizer = AutoTokenizer.from_pretrained(options.out)
    test = [make_scene(0, "test", index) for index in range(options.test_scenes)]
    results = {
        **evaluate(loaded, loaded_tokenizer, test),
        "split": "test",
        "scenes": len(test),
        "sentences": sentences(loaded, loaded_tokenizer),
        "vocabulary": len(tokenizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": seen,
        "seconds": round(seconds),
        "tokens_per_second": round(seen / seconds),
        "threads": options.threads,
        "command": f"python -m qf.data.train_lm --out data/lm --steps {steps} --scenes {options.scenes}"
        f" --batch {options.batch} --lr {options.lr:g} --seed {options.seed} --threads {options.threads}",
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qf.data.train_lm", description="Train the small language model of the built-in sample."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its log and its results")
    parser.add_argument(
        "--minutes", type=float, default=8, help="training time; the schedule ends with it (default %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, help="train this many steps instead; the same steps and threads give the same weights"
    )
    parser.add_argument("--scenes", type=int, default=50_000, help="training scenes (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="texts of a step (default %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default %(default)s)")
    parser.add_argument(
        "--check-every", type=float, default=120, help="seconds between validations (default %(default)s)"
    )
    parser.add_argument("--test-scenes", type=int, default=500, help="test scenes of the results (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads (default: all cores)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(json.dumps(write_model(parse())))

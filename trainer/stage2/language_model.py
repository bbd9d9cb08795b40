"""A frozen language model of transformers behind one face: decoder-only or encoder-decoder, over embeddings of our own making.

Embeddings, padding, masks and the search for a text are ours, so that another version of transformers does not change captions. Only
a model's layers and its cache of keys and values are transformers'. Letters: N texts, Q query tokens, H width, L text length."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...pipeline.device import DTYPES, resolve_precision
from ...pipeline.encoders.identity import encoder_folder, read_config, weights_sha256
from ...pipeline.errors import EncoderError, TrainingError
from ...pipeline.failures import out_of_memory
from ..decoding import Decoder
from .smollm2 import smollm2_folder

BUILTIN = Path(__file__).resolve().parents[2] / "data" / "lm"
FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.jinja")
IGNORED = -100  # the label of a token that is not learnt
QUANTISED: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "int4": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
}


@dataclass(frozen=True)
class TextBatch:
    """N texts to learn, padded at their end.

    Of a decoder-only model: a prompt and its target in one sequence, labels (N, L) for the target alone. Of an encoder-decoder:
    input_ids hold the prompt, labels the target."""

    input_ids: Tensor  # (N, L)
    attention_mask: Tensor  # (N, L)
    labels: Tensor  # (N, L) or (N, L'), IGNORED where nothing is learnt
    first: int  # no label comes before this place
    count: int  # tokens to learn, of all processes together

    def to(self, move: Any) -> "TextBatch":
        """The same with its tensors moved by `move`."""
        return TextBatch(move(self.input_ids), move(self.attention_mask), move(self.labels), self.first, self.count)


class LanguageModel:
    """A frozen language model on a device, with its tokenizer. Nothing here computes gradients for its weights."""

    def __init__(self, model: Any, tokenizer: Any, identity: dict[str, Any], device: torch.device) -> None:
        self.model, self.tokenizer, self.identity, self.device = (
            model.eval().requires_grad_(False),
            tokenizer,
            identity,
            device,
        )
        config = model.config
        self.encoder_decoder = bool(config.is_encoder_decoder)
        self.embeddings = model.get_input_embeddings()
        self.dtype: torch.dtype = self.embeddings.weight.dtype
        self.width: int = self.embeddings.weight.shape[1]
        self.scale = self.embeddings.weight.float().square().mean().sqrt().item()
        self.ends = frozenset(_end_ids(model, tokenizer))
        self.window: int | None = getattr(config, "max_position_embeddings", None)  # T5 has none
        # a part of a sequence, as `logits_to_keep` cuts it, is not contiguous: the CPU would copy the whole head for each text
        model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.pad = next(i for i in (tokenizer.pad_token_id, *sorted(self.ends)) if i is not None)

    # ---- text --------------------------------------------------------------------------------------------------------

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt, with the tokenizer's own first token, such as BOS. An encoder's prompt also ends as it has it."""
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        if not self.encoder_decoder and ids and ids[-1] in self.ends and len(ids) > 1:
            ids = ids[:-1]  # some tokenizers close every text
        return ids

    def example_ids(self, prompt: str, target: str, limit: int) -> tuple[list[int], list[int]]:
        """The tokens of a prompt and of its target, which has an end token and at most `limit` tokens with it.

        The text is tokenised as a whole where that leaves the prompt's tokens as they are alone, as generation uses them."""
        before = self.prompt_ids(prompt)
        if self.encoder_decoder:
            after = self.tokenizer(target)["input_ids"]
            after = after[:-1] if after and after[-1] in self.ends else after
        else:
            space = " " if prompt and not prompt[-1].isspace() else ""
            whole = self.prompt_ids(prompt + space + target)
            same = whole[: len(before)] == before
            after = (
                whole[len(before) :] if same else self.tokenizer(space + target, add_special_tokens=False)["input_ids"]
            )
        return before, [*after[: limit - 1], min(self.ends)]

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special tokens and the space around it."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def batch(self, examples: Sequence[tuple[list[int], list[int]]], count: int) -> TextBatch:
        """Tokens of prompts and targets as a padded batch, on the CPU; `count` tokens are learnt over all processes."""
        if self.encoder_decoder:
            ids, mask = _padded([prompt for prompt, _ in examples], self.pad)
            labels, _ = _padded([target for _, target in examples], IGNORED)
            return TextBatch(ids, mask, labels, 0, count)
        ids, mask = _padded([prompt + target for prompt, target in examples], self.pad)
        labels, _ = _padded([[IGNORED] * len(prompt) + target for prompt, target in examples], IGNORED)
        return TextBatch(ids, mask, labels, min(len(prompt) for prompt, _ in examples), count)

    def fits(self, queries: int, prompt: Sequence[int], target: int) -> bool:
        """Whether picture, prompt and `target` further tokens fit into the model's window. An encoder-decoder has one for each side."""
        read = queries + len(prompt)
        return self.window is None or (max(read, target) if self.encoder_decoder else read + target) <= self.window

    def check_window(self, queries: int, prompt: Sequence[int], target: int, what: str = "the prompt") -> None:
        """TrainingError if they do not fit, as of `fits`."""
        if not self.fits(queries, prompt, target):
            raise TrainingError(
                f"{what} is too long: with {queries} query tokens and {target} tokens of text its {len(prompt):,} tokens do not fit "
                f"into the {self.window:,} of {self.identity['id']}; shorten it"
            )

    # ---- learning ----------------------------------------------------------------------------------------------------

    def losses(self, prefix: Tensor, text: TextBatch) -> Tensor:
        """The cross-entropy (N,) of each text given its picture: the sum over its tokens. `prefix` (N, Q, H) is the picture."""
        logits, labels = self._logits(prefix.to(self.dtype), text)
        flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.view_as(labels).sum(1)

    def _logits(self, prefix: Tensor, text: TextBatch) -> tuple[Tensor, Tensor]:
        """Logits (N, L, V) and the labels (N, L) that each place predicts. Places before all labels are left out."""
        inputs = torch.cat([prefix, self.embeddings(text.input_ids)], 1)
        mask = F.pad(text.attention_mask, (prefix.shape[1], 0), value=1)
        if self.encoder_decoder:
            decoder_ids = self.model.prepare_decoder_input_ids_from_labels(labels=text.labels)
            output = self.model(
                inputs_embeds=inputs, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False
            )
            return output.logits, text.labels
        kept = text.input_ids.shape[1] - text.first + 1  # from the last place before a label
        more = {"logits_to_keep": kept} if self.keeps_logits else {}
        logits = self.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False, **more).logits
        return logits[:, -kept:-1], text.labels[:, text.first :]

    # ---- generating --------------------------------------------------------------------------------------------------

    def decoder(self, prefix: Tensor, prompts: Sequence[Sequence[int]]) -> Decoder:
        """A decoder for N pictures (N, Q, H), each with a prompt of tokens. The prompts have one length."""
        ids = torch.tensor(prompts, dtype=torch.long, device=self.device)
        inputs = torch.cat([prefix.to(self.dtype), self.embeddings(ids)], 1)
        return _Seq2Seq(self.model, inputs) if self.encoder_decoder else _Causal(self.model, inputs, self.keeps_logits)


class _Causal:
    """A `Decoder` over a decoder-only model. All sequences have one length, so there is no padding."""

    def __init__(self, model: Any, inputs: Tensor, keeps_logits: bool) -> None:
        self.model, self.inputs, self.length = model, inputs, inputs.shape[1]
        self.more = {"logits_to_keep": 1} if keeps_logits else {}

    def start(self) -> Tensor:
        return self._forward(inputs_embeds=self.inputs, attention_mask=self._mask(len(self.inputs)))

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
        self.cache.reorder_cache(rows)
        self.length += 1
        return self._forward(
            input_ids=tokens[:, None], attention_mask=self._mask(len(tokens)), past_key_values=self.cache
        )

    def _mask(self, count: int) -> Tensor:
        return torch.ones(count, self.length, dtype=torch.long, device=self.inputs.device)

    def _forward(self, **inputs: Any) -> Tensor:
        output = self.model(**inputs, **self.more, use_cache=True)
        self.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits


class _Seq2Seq:
    """A `Decoder` over an encoder-decoder model: the encoder reads picture and prompt once."""

    def __init__(self, model: Any, inputs: Tensor) -> None:
        self.model = model
        self.mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
        self.states = model.get_encoder()(inputs_embeds=inputs, attention_mask=self.mask).last_hidden_state
        self.cache = None

    def start(self) -> Tensor:
        first = self.model.config.decoder_start_token_id
        return self._forward(self.mask.new_full((len(self.mask), 1), first))

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
        assert self.cache is not None
        self.cache.reorder_cache(rows)
        self.states, self.mask = self.states[rows], self.mask[rows]
        return self._forward(tokens[:, None])

    def _forward(self, ids: Tensor) -> Tensor:
        output = self.model(
            encoder_outputs=(self.states,),
            attention_mask=self.mask,
            decoder_input_ids=ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits


def _padded(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Lists of ids as a tensor (N, L) with `value` after their ends, and the mask (N, L) of what is no padding."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a text: the generation settings', the model's, or the tokenizer's. TrainingError if there is none."""
    for source in (model.generation_config, model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return [int(i) for i in found] if isinstance(found, list | tuple) else [int(found)]
    raise TrainingError("the language model names no end token (eos_token_id); add it to its generation_config.json")


def language_model_folder(name: str) -> Path:
    """The local folder of a language model: builtin, smollm2, a folder, or a Hugging Face id that can be fetched.

    TrainingError if there is none, or if it is no language model."""
    try:
        folder = {"builtin": lambda: BUILTIN, "smollm2": smollm2_folder}.get(
            name, lambda: encoder_folder(name, FILES)
        )()
        read_config(folder / "config.json")
    except EncoderError as error:
        raise TrainingError(
            f"--llm {name}: no such language model; give builtin, smollm2, a folder with config.json and model.safetensors, or a "
            "Hugging Face id that can be fetched"
        ) from error
    return folder


def language_model_identity(name: str, folder: Path, precision: torch.dtype | str) -> dict[str, Any]:
    """The properties of a language model that decide its texts: id, sha256 of its weights, precision."""
    try:
        digest = weights_sha256(folder)
    except EncoderError as error:
        raise TrainingError(f"--llm {name}: {error}") from error
    absolute = str(folder.resolve()) if Path(name).is_dir() else name  # valid from any folder
    return {"id": absolute, "sha256": digest, "precision": str(precision).removeprefix("torch.")}


def load_language_model(name: str, precision: str, device: torch.device) -> LanguageModel:
    """The language model of that name, frozen, on the device. TrainingError if it cannot be loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    resolved = precision if precision in QUANTISED else resolve_precision(precision, device)
    folder = language_model_folder(name)
    identity = language_model_identity(name, folder, resolved)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    if device.type == "cpu":  # the fused kernel's backward pass takes three times as long there in bfloat16
        options["attn_implementation"] = "eager"
    if precision in QUANTISED:
        options |= _quantisation(precision, device)
    else:
        options["dtype"] = DTYPES[identity["precision"]]
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises errors of many kinds
        if out_of_memory(error):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TrainingError(f"--llm {name} cannot be loaded as a language model: {reason[0][:200]}") from error
    finally:
        logging.set_verbosity(level)
    return LanguageModel(model if precision in QUANTISED else model.to(device), tokenizer, identity, device)


def _quantisation(precision: str, device: torch.device) -> dict[str, Any]:
    """Options of from_pretrained for weights of 8 or 4 bits. TrainingError where bitsandbytes cannot do it."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if device.type != "cuda" or find_spec("bitsandbytes") is None:
        raise TrainingError(
            f"--llm-precision {precision} needs CUDA and the packages bitsandbytes and accelerate; use bfloat16 or float32"
        )
    return {"quantization_config": BitsAndBytesConfig(**QUANTISED[precision]), "device_map": {"": device}}

"""How much faster are a stage-2 step and a caption of qf than those of transformers' BLIP-2 with the encoder in the loop?

    OMP_NUM_THREADS=1 python benchmarks/stage2_step.py --batch-size 4 --steps 3

A step is forward, backward, gradient clipping and AdamW of the Q-Former and the projection, through a frozen language model of OPT-125m's
size, for B images with a caption each. A caption is a beam search of 5 beams. All weights are random, and the same on both sides.

- `qf` starts from cached features of ViT-L/14's size (257 x 1024).
- `transformers` is Blip2ForConditionalGeneration from pixels: the encoder runs in every step, without gradients.
- `frozen` is the language model alone within qf's step, forward and backward: the limit of what caching can save.

Encoder and language model have their weights in the given precision on both sides, Q-Former and projection in float32 under
autocast. The two take turns, step by step, so that other load slows both alike. Prints one JSON object; seconds are medians, ratios
medians within a turn."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from common import SIZES, machine, wait
from qf.pipeline.device import autocast, resolve_device, resolve_precision
from qf.trainer.config import PRESETS, QFormerConfig
from qf.trainer.decoding import Decoding, generate
from qf.trainer.stage2.language_model import LanguageModel
from qf.trainer.stage2.model import VisualPrompt
from qf.trainer.stage2.step import soft_prompts
from qf.trainer.weights.names import HUGGINGFACE_NAMES
from transformers import Blip2Config, Blip2ForConditionalGeneration

LLM = {
    "opt-125m": {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "toy": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}
IMAGE, PROMPT = 50_265, [2, 10, 1345, 9]  # the placeholder of a query; "</s> a photo of" of OPT's tokenizer
RATES = {"lr": 1e-4, "betas": (0.9, 0.98), "weight_decay": 0.05}
LENGTH, BEAMS = 20, 5  # most tokens of a caption, and the beams that search for it


class Sides:
    """The same model on both sides, with a batch for each."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        sizes = dict(PRESETS[arguments.preset])
        self.queries = sizes["num_query_tokens"]
        text = {"model_type": "opt", "vocab_size": 50_272, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
        qformer = {name: value for name, value in sizes.items() if name not in ("num_query_tokens", "embed_dim")}
        settings = Blip2Config(
            vision_config=SIZES[arguments.vision] | {"image_size": 224},
            qformer_config=qformer | {"use_qformer_text_input": False, "vocab_size": 1},
            text_config=text | LLM[arguments.llm] | {"word_embed_proj_dim": LLM[arguments.llm]["hidden_size"]},
            num_query_tokens=self.queries,
            image_token_index=IMAGE,
        )
        self.theirs = Blip2ForConditionalGeneration(settings).to(device)
        torch.nn.init.normal_(self.theirs.query_tokens, std=0.02)  # zeros have no direction
        self.theirs.vision_model.to(dtype).requires_grad_(False).eval()
        self.theirs.language_model.to(dtype).requires_grad_(False).eval()
        width = settings.vision_config.hidden_size
        config = QFormerConfig(
            vocab_size=1, encoder_hidden_size=width, ln_vision_eps=settings.vision_config.layer_norm_eps, **sizes
        )
        self.language_model = LanguageModel(
            self._own_language_model(device, dtype), SimpleNamespace(pad_token_id=1), {"id": arguments.llm}, device
        )
        self.ours = VisualPrompt(config, self.language_model.width, reads_text=False).to(device)
        state = self.theirs.state_dict()
        for name, value in self.ours.state_dict().items():
            key = HUGGINGFACE_NAMES.theirs(name.removeprefix("qformer.")) if name.startswith("qformer.") else name
            value.copy_(state[key])
        self.theirs.vision_model.post_layernorm.float().requires_grad_(True)  # it is trained, and read from float32
        self.device, self.dtype = device, dtype
        draw = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(arguments.batch_size, 3, 224, 224, generator=draw).to(device, dtype)
        with torch.no_grad():
            self.embeds = self._encoded().float()
        targets = torch.randint(3, 50_000, (arguments.batch_size, arguments.text_tokens), generator=draw)
        self.text = self.language_model.batch([(PROMPT, row) for row in targets.tolist()], targets.numel())
        self.text = self.text.to(lambda tensor: tensor.to(device))
        self.rows = torch.arange(arguments.batch_size, device=device)
        image = torch.full((arguments.batch_size, self.queries), IMAGE, device=device)
        self.their_ids = torch.cat([image, self.text.input_ids], 1)
        self.their_labels = torch.cat([torch.full_like(image, -100), self.text.labels], 1)
        self.optimizers = {
            side: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **RATES)
            for side, model in (("qf", self.ours), ("transformers", self.theirs))
        }

    def _own_language_model(self, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """The same language model, loaded as qf loads one."""
        from transformers import OPTForCausalLM

        config = self.theirs.config.text_config
        if device.type == "cpu":
            config._attn_implementation = "eager"
        model = OPTForCausalLM(config).to(device, dtype)
        model.load_state_dict(self.theirs.language_model.state_dict())
        return model

    def _encoded(self) -> torch.Tensor:
        """The tokens before the last LayerNorm, as qf caches them."""
        return self.theirs.vision_model(self.pixels, output_hidden_states=True).hidden_states[-1]

    def prompts(self) -> torch.Tensor:
        return soft_prompts(self.ours, self.embeds, self.rows, None, self.dtype)

    def loss(self, side: str) -> torch.Tensor:
        if side == "qf":
            return self.language_model.losses(self.prompts(), self.text).sum() / self.text.count
        with autocast(self.device, self.dtype):
            return self.theirs(self.pixels, self.their_ids, labels=self.their_labels).loss

    def step(self, side: str) -> None:
        self.loss(side).backward()
        optimizer = self.optimizers[side]
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def frozen(self) -> None:
        """The language model's part of qf's step."""
        prompts = torch.zeros(
            len(self.rows), self.queries, self.language_model.width, device=self.device, requires_grad=True
        )
        self.language_model.losses(prompts, self.text).sum().backward()

    @torch.inference_mode()
    def caption(self, side: str) -> None:
        if side == "qf":
            decoder = self.language_model.decoder(self.prompts(), [PROMPT] * len(self.rows))
            generate(decoder, frozenset(), Decoding(BEAMS, max_length=LENGTH))  # nothing ends early
            return
        ids = self.their_ids[:, : self.queries + len(PROMPT)]
        with autocast(self.device, self.dtype):
            self.theirs.generate(self.pixels, ids, num_beams=BEAMS, max_new_tokens=LENGTH, min_new_tokens=LENGTH)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base", choices=PRESETS, help="of the Q-Former")
    parser.add_argument("--vision", default="vit-l14", choices=SIZES)
    parser.add_argument("--llm", default="opt-125m", choices=LLM)
    parser.add_argument("--batch-size", type=int, default=8, help="images")
    parser.add_argument("--text-tokens", type=int, default=16, help="of a caption")
    parser.add_argument("--steps", type=int, default=5, help="of each kind, after one to warm up")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    dtype = resolve_precision(arguments.precision, device)
    sides = Sides(arguments, device, dtype)
    with torch.no_grad():
        losses = {side: sides.loss(side).item() for side in sides.optimizers}
    if abs(losses["qf"] / losses["transformers"] - 1) > 0.02:
        raise RuntimeError(f"the two sides do not compute the same: {losses}")
    runs: dict[str, Callable[[], object]] = {
        "step_qf": lambda: sides.step("qf"),
        "step_transformers": lambda: sides.step("transformers"),
        "frozen": sides.frozen,
        "captions_qf": lambda: sides.caption("qf"),
        "captions_transformers": lambda: sides.caption("transformers"),
    }
    for run in runs.values():
        run()
    turns = [{name: seconds(run, device) for name, run in runs.items()} for _ in range(arguments.steps)]

    def ratio(above: str, below: str) -> float:
        return round(statistics.median(turn[above] / turn[below] for turn in turns), 2)

    result = {
        **{
            name: getattr(arguments, name) for name in ("preset", "vision", "llm", "batch_size", "text_tokens", "steps")
        },
        **machine(device),
        "precision": str(dtype).removeprefix("torch."),
        "losses": {side: round(loss, 4) for side, loss in losses.items()},
        "seconds": {name: round(statistics.median(turn[name] for turn in turns), 3) for name in runs},
        "step_times_faster": ratio("step_transformers", "step_qf"),
        "captions_times_faster": ratio("captions_transformers", "captions_qf"),
        "share_of_the_frozen_model": ratio("frozen", "step_qf"),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""The sizes of a Q-Former and the options of its training, as dataclasses. Standard library only: the command line imports it."""

from dataclasses import dataclass, fields

from ..pipeline.errors import UsageError
from ..pipeline.options import Panel, flags_of, hidden, option, required

WHAT, START, HOW_LONG = Panel(1, "What is trained"), Panel(2, "Where training starts"), Panel(3, "How long and how")
MEMORY, OUTPUT = Panel(4, "Memory and speed"), Panel(5, "What is written")
STAGE2 = Panel(6, "Stage 2 alone")
HOW = Panel(1, "How the text is generated")


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former; saved with its weights. Names are BLIP-2's."""

    vocab_size: int
    encoder_hidden_size: int  # W, the width of the frozen encoder
    hidden_size: int = 768  # D
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # H
    intermediate_size: int = 3072
    num_query_tokens: int = 32  # Q
    cross_attention_frequency: int = 2  # cross-attention in every second layer, the first included
    embed_dim: int = 256  # E, the space that images and texts share
    max_position_embeddings: int = 512
    head_dim: int | None = None  # width of one attention head; hidden_size / num_attention_heads unless given
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    ln_vision_eps: float = 1e-6  # as transformers' vision models have it, so that a run can be exported; LAVIS: 1e-5
    pad_token_id: int = 0
    bos_token_id: int = 5  # [DEC], the first token of a caption to generate


PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "num_query_tokens": 16},
    "small": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_query_tokens": 32},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_query_tokens": 32},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The options of the training loop of any stage. Optimiser and schedule are BLIP-2's (Li et al. 2023, section 3.4)."""

    epochs: float = option(
        20.0,
        "Passes over the training images; 0: keep the weights of --init as they are.",
        min=0,
        max=1e6,
        panel=HOW_LONG,
    )
    batch_size: int = option(
        128, "Images through the network at once, over all processes.", min=2, max=2**20, panel=HOW_LONG
    )
    accumulate: int = option(1, "Batches whose gradients make one step.", min=1, max=2**20, panel=HOW_LONG)
    lr: float = option(5e-4, "Peak learning rate.", min=0, panel=HOW_LONG)
    min_lr: float = hidden(1e-5)
    warmup_steps: int = option(
        300, "Steps of warm-up; at most a quarter of all steps.", min=0, max=2**31, panel=HOW_LONG
    )
    weight_decay: float = option(0.05, "Weight decay, on matrices only.", min=0, panel=HOW_LONG)
    beta1: float = hidden(0.9)
    beta2: float = hidden(0.98)
    grad_clip: float = hidden(1.0)
    patience: int = option(
        0, "Stop after this many validations without a better mean R@1; 0: never.", min=0, max=2**31, panel=HOW_LONG
    )
    seed: int = option(0, "Seed of everything random.", min=0, max=2**63 - 1, panel=HOW_LONG)
    precision: str = option("auto", "auto, float32 or bfloat16.", panel=MEMORY)
    gradient_checkpointing: bool = option(
        False, "Compute layers again in the backward pass: less memory, more time.", panel=MEMORY
    )
    compile: bool = option(False, "Let torch.compile fuse dropout, sums and LayerNorms; meant for GPUs.", panel=MEMORY)
    log_every: int = option(20, "Steps between lines of metrics.jsonl.", min=1, max=2**31, panel=OUTPUT)
    validate_every: int = option(0, "Steps between validations; 0: once an epoch.", min=0, max=2**31, panel=OUTPUT)
    max_val_images: int = hidden(1000)
    checkpoint_every: int = option(500, "Steps between checkpoints.", min=1, max=2**31, panel=OUTPUT)
    keep: int = option(2, "Checkpoints to keep, besides the best weights.", min=1, max=2**31, panel=OUTPUT)


@dataclass(frozen=True)
class TrainOptions:
    """How a training is started and where it is written; no part of what the run is."""

    stage: int = option(
        1,
        "1: the Q-Former alone, for search. 2: with a frozen language model, for captions and answers.",
        min=1,
        max=2,
        panel=WHAT,
    )
    nproc: int = option(
        1, "Processes on this machine, one a GPU; or start them with torchrun.", min=1, max=1024, panel=MEMORY
    )
    cache_on_device: bool = option(
        False, "Keep all features in the device's memory if they fit, else in the host's.", panel=MEMORY
    )
    name: str | None = option(None, "Name of the run; stage1 or stage2 unless given.", panel=OUTPUT)
    index: bool = option(True, "Build the index from the trained model.", flags=("--index/--no-index",), panel=OUTPUT)
    tensorboard: bool = option(False, "Write the metrics for TensorBoard as well, into the run's folder.", panel=OUTPUT)
    overwrite: bool = option(False, "Replace what is there.", panel=OUTPUT)


@dataclass(frozen=True)
class ExportOptions:
    """Whose layout a run is exported in."""

    to: str = required(
        "huggingface: a folder for Blip2ForImageTextRetrieval.from_pretrained, or of stage 2 for Blip2ForConditionalGeneration's, with "
        "the vision model where the encoder is a BLIP-2's. lavis: BLIP-2's own key names; since qf writes no pickle, load it there with "
        "model.load_state_dict(safetensors.torch.load_file(OUT), strict=False)."
    )
    with_llm: bool = option(False, "Stage 2, to huggingface: with the language model's weights.", flags=("--with-llm",))
    overwrite: bool = option(False, "Replace what is there.")


@dataclass(frozen=True, kw_only=True)
class QFormerTraining(LoopConfig):
    """The options of any training of a Q-Former."""

    preset: str = option("tiny", f"Size of the Q-Former: {', '.join(PRESETS)}.", panel=WHAT)
    num_query_tokens: int | None = option(None, "Queries; the preset's unless given.", min=1, max=1024, panel=WHAT)
    max_text_length: int = option(
        32, "Tokens of a caption, special ones included; longer ones are truncated.", min=3, max=2**16, panel=WHAT
    )
    dropout: float = option(0.1, "Dropout in the Q-Former.", min=0, max=0.9, panel=WHAT)
    token_dropout: float = option(
        0.0, "Share of an image's tokens left out of each step, others each time.", min=0, max=0.9, panel=WHAT
    )
    matched_captions: int = option(
        1,
        "Captions of each image that matching and generation see; 0: all of the step. Stage 2: texts of each image in a step.",
        min=0,
        max=2**20,
        panel=WHAT,
    )
    init: str | None = option(
        None,
        "Weights to start from: a run; a Hugging Face BLIP-2 or BERT, folder or id; a LAVIS BLIP-2 stage-1 .pth or "
        ".safetensors. Their sizes win over the preset's. Parts that they lack start afresh, with a warning. Stage 2: the latest "
        "run of stage 1 unless given; none starts afresh.",
        panel=START,
    )
    shuffle_window: int = option(
        65536,
        "Images shuffled together. A smaller window reads longer runs from disk, where the features do not fit in memory.",
        min=1,
        max=2**40,
        panel=MEMORY,
    )


@dataclass(frozen=True, kw_only=True)
class Stage1Config(QFormerTraining):
    """How to train stage 1; saved with the run."""

    losses: str = option("itc,itm,itg", "The objectives to sum.", panel=WHAT)
    teach: str = option(
        "auto",
        "Who teaches the shared space: encoder, its own joint space; a folder or id of a sentence encoder, for encoders without "
        "text; none, BLIP-2's way. auto: the encoder if it has text and the shared space starts afresh.",
        panel=WHAT,
    )
    # how it teaches; None: as `stage1.plan.lessons` has it for that teacher
    teach_weight: float | None = hidden(None)  # of loss_teach
    soft_targets: float | None = hidden(None)  # share of the contrastive targets that is the teacher's similarities
    # share of the steps in which it counts, less and less; 0: alike to the end
    teach_until: float | None = hidden(None)
    vocab_size: int = hidden(8000)  # of the WordPiece vocabulary that is trained where no tokenizer is given
    captions_per_image: int = option(
        0, "Captions of each image in a step; 0: all, at most 16.", min=0, max=2**20, panel=WHAT
    )
    # small data, benchmarks/results.md: ITC alone first, then matching with random negatives that give way to hard ones
    contrast_first: float = option(
        0.5,
        "Share of the steps that train ITC alone, before the other losses join; BLIP-2: 0.",
        min=0,
        max=0.9,
        panel=HOW_LONG,
    )
    easy_negatives: float = option(
        1.0,
        "Share of the other steps in which negatives go from random to hard; BLIP-2: 0.",
        min=0,
        max=1,
        panel=HOW_LONG,
    )
    tokenizer: str | None = option(
        None,
        "Folder or id with a BERT tokenizer. Default: that of --init; bert-base-uncased, fetched, for a LAVIS .pth, which "
        "brings none; without --init a new vocabulary of the captions.",
        panel=START,
    )
    contrastive_batch: int = option(
        0,
        "Images contrasted with each other, by gradient caching: a multiple of the batch size; 0: the batch size.",
        min=0,
        max=2**24,
        panel=MEMORY,
    )

    def check(self) -> None:
        """UsageError unless the options make a training."""
        if not self.epochs and self.init is None:
            raise UsageError("--epochs 0 trains nothing: give the weights to keep with --init")


TASKS = ("caption", "vqa", "chat")
TRAINED = ("qformer", "projection")
LLM_PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class Stage2Config(QFormerTraining):
    """How to train stage 2; saved with the run."""

    llm: str | None = option(
        None,
        "The frozen language model: a folder or Hugging Face id of any causal or encoder-decoder model of transformers; "
        "smollm2 (extra smollm2); builtin, a small one for the sample.",
        panel=STAGE2,
    )
    llm_precision: str = option(
        "auto",
        f"What the language model computes in: {', '.join(LLM_PRECISIONS)}. int8 and int4 need CUDA and bitsandbytes.",
        panel=STAGE2,
    )
    task: str = option(
        "caption", "caption: captions. vqa: answers to questions. chat: the assistant's turns of dialogs.", panel=STAGE2
    )
    prompt: str | None = option(
        None,
        "What the language model reads before the text to generate; {} stands for the question. The task's unless given. "
        "Generation uses it again.",
        panel=STAGE2,
    )
    parts: str = option(
        "qformer",
        "What is trained: qformer, its query side and the projection; projection, that alone.",
        flags=("--train",),
        panel=STAGE2,
    )
    instruct: bool = option(
        False,
        "Let the Q-Former read the question as well (InstructBLIP). Its text side comes from --init.",
        panel=STAGE2,
    )
    prefix_lm: bool = option(
        False,
        "For encoder-decoder models: split each caption at a random word. The encoder reads the first part, the decoder "
        "learns the rest (BLIP-2's way).",
        panel=STAGE2,
    )

    def check(self) -> None:
        """UsageError unless the options make a training."""
        known = (
            ("parts", "train", TRAINED),
            ("task", "task", TASKS),
            ("llm_precision", "llm-precision", LLM_PRECISIONS),
        )
        for name, flag, values in known:
            if getattr(self, name) not in values:
                raise UsageError(f"--{flag} {getattr(self, name)}: use {', '.join(values)}")
        if not self.epochs and self.init in (None, "none"):
            raise UsageError("--epochs 0 trains nothing: give the weights to keep with --init")
        if self.llm is None:
            raise UsageError("--stage 2 needs a language model: give --llm, such as --llm smollm2 or --llm builtin")
        if self.prompt is not None and self.task != "caption" and self.prompt.count("{}") != 1:
            raise UsageError(f"--prompt {self.prompt!r}: {{}} must stand in it once, for the question")


def of_stage(stage: int, first: Stage1Config, second: Stage2Config) -> Stage1Config | Stage2Config:
    """The configuration of that stage, checked. UsageError if the other one has an option that this stage lacks."""
    chosen, other = (first, second) if stage == 1 else (second, first)
    for field in fields(other):
        if not hasattr(chosen, field.name) and getattr(other, field.name) != field.default:
            raise UsageError(
                f"{flags_of(field)[0]} is an option of stage {3 - stage}: add --stage {3 - stage}, or leave it out"
            )
    chosen.check()
    return chosen


@dataclass(frozen=True)
class GenerateOptions:
    """How a text is generated. None: what the task takes."""

    beams: int | None = option(None, "Beams of the search; 1: greedy. 5 unless given.", min=1, max=100, panel=HOW)
    min_length: int = option(1, "Least tokens of a text.", min=0, max=2**16, panel=HOW)
    max_length: int | None = option(
        None,
        "Most tokens of a text; 30 for captions, 10 for answers, 200 in a chat unless given.",
        min=1,
        max=2**16,
        panel=HOW,
    )
    length_penalty: float | None = hidden(None)  # exponent of the length that a beam's score is divided by
    temperature: float = option(
        0.0,
        "0: the likeliest text. Above: drawn at random, more freely the higher; without beams.",
        min=0,
        max=100,
        panel=HOW,
    )
    top_p: float = option(1.0, "Draw from the likeliest tokens that make up this share.", min=0.01, max=1, panel=HOW)
    repetition_penalty: float = option(
        1.0, "Above 1: tokens that the text has already become less likely.", min=0.1, max=10, panel=HOW
    )
    seed: int = option(0, "Seed of what is drawn at random.", min=0, max=2**63 - 1, panel=HOW)
    prompt: str | None = option(
        None,
        "Let the language model read this instead of the run's own prompt; {} stands for the question.",
        panel=HOW,
    )

    def check(self) -> None:
        """UsageError if the options do not go together."""
        if self.temperature and (self.beams or 1) > 1:
            raise UsageError("--temperature draws at random, --beams searches: give one of them")
        if self.max_length is not None and self.min_length > self.max_length:
            raise UsageError(f"--min-length {self.min_length} is more than --max-length {self.max_length}")

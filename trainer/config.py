"""What a Q-Former is and how it is trained, as dataclasses. Standard library only: the command line takes its defaults here."""

from dataclasses import dataclass


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


@dataclass(frozen=True)
class TrainConfig:
    """How to train stage 1; saved with the run. Optimiser and schedule are BLIP-2's (Li et al. 2023, section 3.4)."""

    preset: str = "tiny"
    init: str | None = None  # a run, BLIP-2 weights or a BERT to start from; its sizes win over the preset's
    tokenizer: str | None = None  # a folder or id; that of `init`, or one trained on the captions, unless given
    losses: str = "itc,itm,itg"
    epochs: float = 20.0  # 0: no step at all
    batch_size: int = 128  # images that go through the network at once, over all processes
    contrastive_batch: int = 0  # images that are contrasted with each other; 0: those of a batch
    accumulate: int = 1  # contrastive batches to a step of the optimiser
    shuffle_window: int = 65536  # images that are mixed at once; so many or fewer are shuffled as a whole
    captions_per_image: int = 0  # captions of each image in a step; 0: all of them
    matched_captions: int = 1  # of these, how many matching and generation see, which cost five times as much; 0: all
    # small data, benchmarks/results.md: the contrast alone first, then matching with random negatives that give way to hard ones
    contrast_first: float = 0.5  # share of the steps that train the contrast alone; BLIP-2: 0
    easy_negatives: float = 1.0  # share of the others in which matching's negatives go from random to hard; BLIP-2: 0
    lr: float = 5e-4  # the peak
    min_lr: float = 1e-5
    warmup_steps: int = 300  # at most a quarter of all steps
    weight_decay: float = 0.05  # on matrices only
    beta1: float = 0.9
    beta2: float = 0.98
    grad_clip: float = 1.0
    dropout: float = 0.1
    token_dropout: float = 0.0  # share of an image's tokens left out of each step, others each time
    max_text_length: int = 32  # tokens, [CLS] and [SEP] included
    vocab_size: int = 8000  # of the WordPiece vocabulary that is trained where no tokenizer is given
    num_query_tokens: int | None = None  # the preset's unless given
    log_every: int = 20  # steps
    validate_every: int = 0  # steps; 0: once an epoch
    patience: int = 0  # validations with all losses and no better mean R@1, after which training stops; 0: never
    checkpoint_every: int = 500  # steps
    keep: int = 2  # checkpoints to go back to
    max_val_images: int = 1000
    seed: int = 0
    precision: str = "auto"
    gradient_checkpointing: bool = False  # layers computed again for their gradient: less memory, more time
    compile: bool = False  # the ends of the Q-Former's blocks, by torch.compile

"""Stage 2 against Blip2ForConditionalGeneration: loss, gradients and generated ids, for OPT, T5 and BART."""

import pytest
import torch
from language_models import BART, OPT, T5, random_blip2_with, save_language_model
from qf.trainer.config import QFormerConfig
from qf.trainer.decoding import Decoding, generate
from qf.trainer.stage2.language_model import load_language_model
from qf.trainer.stage2.model import VisualPrompt
from qf.trainer.stage2.step import soft_prompts
from qf.trainer.weights.names import HUGGINGFACE_NAMES
from torch import Tensor

CPU = torch.device("cpu")
QUERIES = 4
PICTURES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPT = [1, 35, 36, 37]  # <s> a photo of
TARGETS = [[8, 9, 10, 2], [11, 12, 2], [13, 14, 15, 16, 17, 2], [18, 2]]


class Both:
    """A BLIP-2 of transformers, and the same weights in qf."""

    def __init__(self, settings: dict, folder) -> None:
        self.theirs = random_blip2_with(settings)
        self.language_model = load_language_model(str(save_language_model(self.theirs, folder)), "float32", CPU)
        sizes = self.theirs.config.qformer_config
        config = QFormerConfig(
            vocab_size=1, encoder_hidden_size=sizes.encoder_hidden_size, hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_hidden_layers, num_attention_heads=sizes.num_attention_heads,
            intermediate_size=sizes.intermediate_size, num_query_tokens=QUERIES,
            ln_vision_eps=self.theirs.config.vision_config.layer_norm_eps, layer_norm_eps=sizes.layer_norm_eps,
        )  # fmt: skip
        self.ours = VisualPrompt(config, self.language_model.width, reads_text=False)
        state = self.theirs.state_dict()
        for name, value in self.ours.state_dict().items():
            key = HUGGINGFACE_NAMES.theirs(name.removeprefix("qformer.")) if name.startswith("qformer.") else name
            value.copy_(state[key])
        self.ours.eval()
        with torch.no_grad():
            hidden = self.theirs.vision_model(PICTURES, output_hidden_states=True)
        self.embeds = self._before_norm(hidden)

    def _before_norm(self, output) -> Tensor:
        return output.hidden_states[-1]

    def soft_prompts(self) -> Tensor:
        return soft_prompts(self.ours, self.embeds, torch.arange(4), None, torch.float32)


@pytest.fixture(scope="module", params=[OPT, T5, BART], ids=["opt", "t5", "bart"])
def both(request, tmp_path_factory) -> Both:
    return Both(request.param, tmp_path_factory.mktemp("llm"))


def padded(rows, value):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def test_loss_and_gradients_are_those_of_transformers(both):
    image = [4] * QUERIES
    if both.language_model.encoder_decoder:
        ids = padded([image + PROMPT] * 4, 0)
        output = both.theirs(PICTURES, ids, labels=padded(TARGETS, -100))
    else:
        ids = padded([image + PROMPT + target for target in TARGETS], 0)
        labels = padded([[-100] * (QUERIES + len(PROMPT)) + target for target in TARGETS], -100)
        mask = padded([[1] * (QUERIES + len(PROMPT) + len(target)) for target in TARGETS], 0)
        output = both.theirs(PICTURES, ids, attention_mask=mask, labels=labels)
    both.theirs.zero_grad()
    output.loss.backward()
    text = both.language_model.batch([(PROMPT, target) for target in TARGETS], 0)
    loss = both.language_model.losses(both.soft_prompts(), text).sum() / sum(map(len, TARGETS))
    both.ours.zero_grad()
    loss.backward()
    torch.testing.assert_close(loss, output.loss, atol=1e-4, rtol=1e-4)
    theirs = dict(both.theirs.named_parameters())
    for name, parameter in both.ours.named_parameters():
        key = HUGGINGFACE_NAMES.theirs(name.removeprefix("qformer.")) if name.startswith("qformer.") else name
        torch.testing.assert_close(parameter.grad, theirs[key].grad, atol=1e-4, rtol=1e-4)
    assert all(parameter.grad is None for parameter in both.language_model.model.parameters())


def their_ids(both, **options) -> list[list[int]]:
    ids = torch.tensor([[4] * QUERIES + PROMPT] * 4)
    found = both.theirs.generate(PICTURES, ids, do_sample=False, max_new_tokens=12, **options).tolist()
    start = 1 if both.language_model.encoder_decoder else len(ids[0]) if len(found[0]) > len(ids[0]) else 0
    texts = [
        row[start:] if row[: len(ids[0])] == ids[0].tolist() or both.language_model.encoder_decoder else row
        for row in found
    ]
    return [row[: row.index(2)] if 2 in row else row for row in texts]


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 1},
        {"num_beams": 5},
        {"num_beams": 5, "length_penalty": -1.0},
        {"num_beams": 3, "length_penalty": 2.0, "min_new_tokens": 4},
    ],
    ids=str,
)
def test_greedy_and_beam_ids_are_those_of_transformers(both, how):
    decoding = Decoding(how["num_beams"], how.get("min_new_tokens", 0), 12, how.get("length_penalty", 1.0))
    with torch.no_grad():
        prompts = both.soft_prompts()
    found = generate(both.language_model.decoder(prompts, [PROMPT] * 4), both.language_model.ends, decoding)
    assert found == their_ids(both, **how)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_batch_of_four_equals_four_singles(both, beams):
    with torch.no_grad():
        prompts = both.soft_prompts()
    model, how = both.language_model, Decoding(beams, max_length=10)
    singles = [generate(model.decoder(prompts[n : n + 1], [PROMPT]), model.ends, how)[0] for n in range(4)]
    assert generate(model.decoder(prompts, [PROMPT] * 4), model.ends, how) == singles


def test_drawn_texts_depend_on_the_seed_and_not_on_the_batch(both):
    with torch.no_grad():
        prompts = both.soft_prompts()
    model = both.language_model

    def draw(seed, n=4):
        how = Decoding(temperature=1.5, top_p=0.9, max_length=8, seed=seed)
        return generate(model.decoder(prompts[:n], [PROMPT] * n), model.ends, how)

    assert draw(0) == draw(0)
    assert draw(0)[:2] == draw(0, 2)
    assert draw(0) != draw(1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_seam_casts_once_and_the_soft_prompt_stays_float32(both, tmp_path, precision):
    folder = save_language_model(both.theirs, tmp_path)
    model = load_language_model(str(folder), precision, CPU)
    prompts = both.soft_prompts()
    assert prompts.dtype == torch.float32
    losses = model.losses(prompts, model.batch([(PROMPT, target) for target in TARGETS], 0))
    exact = both.language_model.losses(prompts, both.language_model.batch([(PROMPT, t) for t in TARGETS], 0))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0.1, atol=0.1)


def test_the_language_model_is_frozen_and_saved_nowhere(both):
    before = {name: value.clone() for name, value in both.language_model.model.state_dict().items()}
    optimizer = torch.optim.AdamW(both.ours.parameters())
    text = both.language_model.batch([(PROMPT, target) for target in TARGETS], 0)
    state = {name: value.clone() for name, value in both.ours.state_dict().items()}
    both.language_model.losses(both.soft_prompts(), text).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in both.language_model.model.state_dict().items())
    both.ours.load_state_dict(state)


def test_a_window_counts_what_a_side_reads(both):
    model = both.language_model
    window = {"opt": 64, "t5": None, "bart": 40}[model.model.config.model_type]
    assert model.window == window
    if window is not None:
        room = window - QUERIES - (0 if model.encoder_decoder else 5)
        assert model.fits(QUERIES, [0] * room, 5)
        assert not model.fits(QUERIES, [0] * (room + 1), 5)
        assert not model.fits(QUERIES, [0], window + 1)

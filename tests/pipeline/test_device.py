import os

import pytest
import torch
from qf.pipeline import device
from qf.pipeline.device import bfloat16_pays, free_host_memory, free_memory, resolve_precision
from qf.pipeline.errors import QfError

CPU = torch.device("cpu")


@pytest.fixture
def fresh_measurement():
    bfloat16_pays.cache_clear()
    yield
    bfloat16_pays.cache_clear()


def resolved(monkeypatch, flags, seconds):
    """The dtype of "auto" on a CPU with these flags, where a product takes so many seconds in each precision."""
    measured = []

    def product_seconds(dtype):
        measured.append(dtype)
        return seconds[dtype]

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    monkeypatch.setattr(device, "product_seconds", product_seconds)
    return resolve_precision("auto", CPU), measured


@pytest.mark.parametrize(
    ("bfloat16", "expected"), [(1.7, torch.float32), (0.9, torch.float32), (0.5, torch.bfloat16), (0.1, torch.bfloat16)]
)
def test_auto_is_bfloat16_on_a_cpu_only_where_it_is_measured_to_be_clearly_faster(
    monkeypatch, fresh_measurement, bfloat16, expected
):
    seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16}
    assert resolved(monkeypatch, {"avx512_bf16": True, "amx_bf16": False}, seconds)[0] == expected


def test_the_measurement_is_made_once_a_process(monkeypatch, fresh_measurement):
    seconds = {torch.float32: 1.0, torch.bfloat16: 0.1}
    assert resolved(monkeypatch, {"amx_bf16": True}, seconds)[1]
    assert resolved(monkeypatch, {"amx_bf16": True}, seconds)[1] == []


def test_a_disturbance_during_the_first_products_does_not_decide(monkeypatch, fresh_measurement):
    turns = iter(range(1000))

    def product_seconds(dtype):
        disturbed = next(turns) < 4 * device.REPEATS
        return 0.001 if dtype == torch.float32 or disturbed else 0.0004

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(device, "product_seconds", product_seconds)
    assert resolve_precision("auto", CPU) == torch.bfloat16


def test_a_cpu_without_native_bfloat16_is_not_measured(monkeypatch, fresh_measurement):
    assert resolved(monkeypatch, {"avx512_f": True}, {}) == (torch.float32, [])


def test_a_real_measurement_gives_one_of_the_two(fresh_measurement):
    assert resolve_precision("auto", CPU) in (torch.float32, torch.bfloat16)


def test_a_precision_may_be_given():
    assert resolve_precision("float16", CPU) == torch.float16
    with pytest.raises(QfError, match="--precision half: use auto, float32, bfloat16, float16"):
        resolve_precision("half", CPU)


def test_free_memory_is_some_of_what_there_is():
    assert 0 < free_memory(torch.device("cpu")) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_containers_limit_counts(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:       9000 kB\nMemAvailable:   5000 kB\nHugePages_Total:       0\n")
    assert free_host_memory(tmp_path, tmp_path) == 5000 * 1024
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 700000\ninactive_file 300000\n")
    for limit, free in {"max": 5000 * 1024, "9000000": 5000 * 1024, "1500000": 800_000, "500000": 0}.items():
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert free_host_memory(tmp_path, tmp_path) == free, limit

import os

import torch
from qf.pipeline.device import free_host_memory, free_memory


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

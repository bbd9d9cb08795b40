"""Broken and hostile inputs end in one line, never in a traceback; `qf verify` finds every changed byte."""

from fuzz import fuzz


def test_no_exception_but_qferror_leaves_a_command(tmp_path, pictures, clip_folder):
    found = fuzz(tmp_path, pictures, str(clip_folder), count=200)
    assert found["broken"] == []
    assert {"dataset 0", "dataset 1", "artifact 0", "artifact 1"} <= found["codes"].keys()

"""WebDataset tars: read by their headers, equal to what tarfile reads, cut or damaged anywhere."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.datasets.sources import load
from qf.pipeline.errors import DatasetError
from qf.pipeline.tar_format import BLOCK, MAX_ZEROS, DamagedTar, tar_members


def write_tar(path, members, form=tarfile.PAX_FORMAT, **attributes):
    """A tar of (name, bytes) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = attributes
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, caption, picture=None):
    """As img2dataset writes one."""
    sidecar = json.dumps({"caption": caption, "key": key, "status": "success", "url": "https://x/y"})
    return [
        (f"{key}.jpg", picture or b"picture " + key.encode()),
        (f"{key}.json", sidecar.encode()),
        (f"{key}.txt", caption.encode()),
    ]


SHARD = [*sample("000000000", "a dog"), *sample("000000001", "two\nlines"), *sample("000000002", "ein Größerer")]


def as_img2dataset_writes(folder):
    for number in range(3):
        write_tar(folder / f"{number:05d}.tar", SHARD, mtime="1700000000.25")
        (folder / f"{number:05d}_stats.json").write_text("{}")
        (folder / f"{number:05d}.parquet").write_bytes(b"PAR1")
    return folder


def test_of_several_pictures_the_plainest_name_wins(tmp_path):
    extra = {"a.depth.png": b"depth", "a.jpg": b"picture", "a.seg.png": b"mask", "a.png": b"later", "a.txt": b"x"}
    for order in (list(extra), list(reversed(extra))):
        (record,) = read(write_tar(tmp_path / "t.tar", [(name, extra[name]) for name in order])).records
        assert record.image == next(name for name in order if name in ("a.jpg", "a.png"))
    (record,) = read(write_tar(tmp_path / "t.tar", [("a.rgb.png", b"y"), ("a.txt", b"x")])).records
    assert load(record.source) == b"y"


def test_a_tar_a_folder_and_a_pattern(tmp_path):
    folder = as_img2dataset_writes(tmp_path / "data")
    one, all_of_them, two = read(folder / "00001.tar"), read(folder), read(folder / "{00001..00002}.tar")
    assert [len(dataset.records) for dataset in (one, all_of_them, two)] == [3, 9, 6]
    assert (all_of_them.kind, all_of_them.found) == (
        "webdataset",
        "WebDataset: 3 tars; not read: 3 Parquet files (00000.parquet)",
    )
    first, second, third = one.records
    assert [r.key for r in one.records] == [f"00001/00000000{n}" for n in range(3)]
    assert (first.image, first.captions, second.captions) == ("000000000.jpg", ("a dog",), ("two\nlines",))
    assert load(third.source) == b"picture 000000002"
    # keys do not depend on the rest
    assert list(all_of_them.records[3:6]) == list(one.records) == list(two.records[:3])


def test_splits_in_the_names_of_tars_and_folders(tmp_path):
    for name in ("train/00000", "train/00001", "val/00000"):
        write_tar(tmp_path / "a" / f"{name}.tar", SHARD[:3])
    dataset = read(tmp_path / "a")
    assert [(r.key, r.split) for r in dataset.records] == [
        ("train/00000/000000000", "train"), ("train/00001/000000000", "train"), ("val/00000/000000000", "val"),
    ]  # fmt: skip
    assert "splits in their names" in dataset.found
    write_tar(tmp_path / "coco-train-0.tar", SHARD)
    write_tar(tmp_path / "coco-test-0.tar", SHARD)
    assert read(tmp_path / "coco-{train,test}-0.tar").records.splits == {"train": 3, "val": 0, "test": 3}


def test_a_samples_json_may_name_its_split(tmp_path):
    def member(key, **fields):
        return [(f"{key}.jpg", b"x"), (f"{key}.json", json.dumps({"caption": key, **fields}).encode())]

    write_tar(tmp_path / "train.tar", [*member("a", split="test"), *member("b")])
    write_tar(tmp_path / "val.tar", member("c", split="dev"))
    assert [record.split for record in read(tmp_path).records] == ["test", "train", "val"]


def test_what_a_sample_lacks_is_said(tmp_path):
    members = [
        *sample("a", "good"),
        ("b.jpg", b"x"),
        ("c.txt", b"text"),
        ("d.jpg", b"x"), ("d.txt", b"\xff"),
        ("e.jpg", b"x"), ("e.json", b"{"), ("e.txt", b"so"),
        ("dir/f.JPG", b"F"), ("dir/f.txt", b"one\ntwo\n"),
        ("dir/._f.jpg", b"x"),
        ("g.seg.png", b"G"), ("g.cls", b"3"), ("g.json", b'{"captions": ["p", "q"]}'),
    ]  # fmt: skip
    records = {r.key: r for r in read(write_tar(tmp_path / "t.tar", members)).records}
    problems = {key: r.problem for key, r in records.items()}
    assert problems.pop("t/b") == (
        "no caption in a .txt, .json or .caption (there is .jpg); --caption-column NAME takes another suffix"
    )
    assert problems.pop("t/d") == "its .txt cannot be read: byte 0 is not UTF-8"
    assert problems.pop("t/e") == "its .json cannot be read: it is no valid JSON at line 1, column 2"
    assert problems == {"t/a": "", "t/c": "no image in the sample", "t/dir/f": "", "t/g": ""}
    assert (records["t/dir/f"].captions, load(records["t/dir/f"].source)) == (("one", "two"), b"F")
    assert (records["t/g"].captions, load(records["t/g"].source)) == (("p", "q"), b"G")


def test_links_and_devices_are_never_read(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in SHARD[:3]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for n, kind in enumerate(
            [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
        ):
            info = tarfile.TarInfo(f"{n}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    _, *links = read(path).records
    assert {r.problem for r in links} == {f"{n}.jpg is a link or device; only regular files are read" for n in range(4)}
    assert {r.source for r in links} == {None}


def test_a_sample_twice_in_a_tar(tmp_path):
    with pytest.raises(DatasetError, match="two images have the key 't/000000000'"):
        read(write_tar(tmp_path / "t.tar", SHARD + SHARD))


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars(tmp_path, mode):
    with tarfile.open(tmp_path / "a.tar", f"w:{mode}") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DatasetError, match=r"a\.tar is compressed; .*run \w+ -d on it first"):
        read(tmp_path / "a.tar")


def test_a_tar_cut_at_any_byte(tmp_path):
    """Complete samples are used; the cut is one record that says so."""
    whole = write_tar(tmp_path / "whole.tar", SHARD, mtime="1700000000.25").read_bytes()
    write_tar(tmp_path / "cut" / "0.tar", SHARD)
    content = list(read(tmp_path / "whole.tar").records)
    lengths = {*range(0, len(whole), 97), *range(0, len(whole), BLOCK)}
    for length in sorted(lengths):
        (tmp_path / "cut" / "whole.tar").write_bytes(whole[:length])
        records = list(read(tmp_path / "cut").records)[3:]
        used = [r for r in records if not r.problem]
        end = [r for r in records if r.key == "whole#end"]
        assert [r.key for r in used] == [r.key for r in content][: len(used)]
        assert [load(r.source) for r in used] == [load(r.source) for r in content][: len(used)]
        complete = sum(r.source.offset + BLOCK <= length for r in content)
        assert complete - 1 <= len(used) <= complete  # whether the last one has a caption yet
        closed = length >= content[-1].source.offset + 10 * BLOCK  # after all its members, and a block of zeros
        assert len(end) == 1 or closed
        assert all("truncated" in r.problem or "empty file" in r.problem for r in end)


@given(at=st.integers(0, 10 * BLOCK), value=st.binary(min_size=1, max_size=40))
def test_damage_is_a_reject_or_an_error(tmp_path_factory, at, value):
    folder = tmp_path_factory.mktemp("tar")
    data = bytearray(write_tar(folder / "t.tar", SHARD[:6], mtime="1.5").read_bytes())
    data[at : at + len(value)] = value
    (folder / "t.tar").write_bytes(data)
    try:
        records = list(read(folder / "t.tar").records)
    except DatasetError:
        return
    for record in records:
        if not record.problem:
            assert len(load(record.source)) == record.source.size


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0."), min_size=1, max_size=150)


@given(
    st.lists(st.tuples(NAMES, st.text(st.characters(codec="utf-8")), st.binary(max_size=1500)), max_size=6, unique_by=lambda s: s[0]),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.text("abc", max_size=170),
)  # fmt: skip
def test_a_tar_comes_back_as_it_was_written(tmp_path_factory, samples, form, folder):
    """Long names, names beyond ASCII, every size: the members are those that tarfile lists, and so are the captions."""
    members = [
        (f"{folder}/{name}{suffix}" if folder else name + suffix, data)
        for name, caption, picture in samples
        for suffix, data in ((".png", picture), (".json", json.dumps({"caption": caption}).encode()))
    ]
    path = write_tar(tmp_path_factory.mktemp("tar") / "t.tar", members, form)
    with open(path, "rb") as file:
        ours = list(tar_members(file.fileno()))
    with tarfile.open(path) as tar:
        assert [(m.name, m.offset, m.size) for m in ours] == [(m.name, m.offset_data, m.size) for m in tar]
    usable = [(caption.strip(), picture) for _, caption, picture in samples if caption.strip()]
    if not usable:
        return
    records = [r for r in read(path).records if not r.problem]
    assert [(r.captions[0], load(r.source)) for r in records] == usable


def test_joined_tars_old_tars_and_large_sizes(tmp_path):
    first = write_tar(tmp_path / "a.tar", SHARD[:3]).read_bytes()
    second = write_tar(tmp_path / "b.tar", SHARD[3:], tarfile.USTAR_FORMAT).read_bytes()
    (tmp_path / "joined.tar").write_bytes(first + second)  # cat a.tar b.tar
    assert len(read(tmp_path / "joined.tar").records) == 3
    large = tarfile.TarInfo("x.jpg")
    large.size = 2**40
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        Path(tmp_path / "large.tar").write_bytes(first[: -tarfile.RECORDSIZE] + large.tobuf(form))
        with open(tmp_path / "large.tar", "rb") as file, pytest.raises(DamagedTar, match="truncated"):
            list(tar_members(file.fileno()))


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for suffix in (".jpg", ".txt"):
            info = tarfile.TarInfo(name + suffix)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    (record,) = read(path).records
    assert (record.key, record.image, record.problem) == (r"t/caf\xe9", r"caf\xe9.jpg", "")
    assert load(record.source) == b"x"


def pairs(name, image="jpg", text="txt", count=4):
    """Members of samples with a picture and a caption each."""
    every = [(name(n), n) for n in range(count)]
    return [
        (f"{base}.{suffix}", b"%s %d" % (kind, n))
        for base, n in every
        for suffix, kind in ((image, b"picture"), (text, b"caption"))
    ]


@pytest.mark.parametrize(
    "name",
    [
        lambda n: f"22.0{n}",
        lambda n: f"./v1.0/part.2/{n:05}",
        lambda n: f"235342 Track 2.{n} (Clean)",
        lambda n: f"a.b.c.{n}",
        lambda n: f"IMG_{n}",
    ],
)
@pytest.mark.parametrize("text", ["txt", "TXT", "caption", "text", "captions.json"])
def test_dots_in_names_and_usual_suffixes(tmp_path, name, text):
    members = pairs(name, "JPG", text)
    if text == "captions.json":
        members = [(n, json.dumps([data.decode()]).encode() if n.endswith("json") else data) for n, data in members]
    records = list(read(write_tar(tmp_path / "t.tar", members)).records)
    assert [(r.problem, r.captions, load(r.source)) for r in records] == [
        ("", (f"caption {n}",), b"picture %d" % n) for n in range(4)
    ]


def test_a_long_run_of_names_with_one_start_is_told_apart(tmp_path):
    records = list(read(write_tar(tmp_path / "t.tar", pairs(lambda n: f"v1.{n:05}", count=1200))).records)
    assert [(r.key, r.captions) for r in records] == [(f"t/v1.{n:05}", (f"caption {n}",)) for n in range(1200)]


STEM = st.text("ab01. -", min_size=1, max_size=5).filter(lambda name: name.strip(". ") == name)


@given(st.lists(STEM, min_size=1, max_size=8, unique=True))
def test_no_picture_is_lost_whatever_its_name(tmp_path_factory, stems):
    """Each is read, is a reject or is counted as left out."""
    members = [(f"{stem}.{suffix}", f"{stem} {suffix}".encode()) for stem in stems for suffix in ("jpg", "txt")]
    path = write_tar(tmp_path_factory.mktemp("tar") / "t.tar", members)
    try:
        dataset = read(path)
    except DatasetError:  # scattered, or of one key
        return
    read_ = {load(r.source).decode(): r.captions for r in dataset.records if not r.problem}
    left_out = dataset.records.left_out["further pictures of a sample"]
    rejected = sum(bool(r.problem) for r in dataset.records)
    assert len(read_) + left_out + rejected >= len(stems)
    for picture, captions in read_.items():
        assert captions == (picture.removesuffix("jpg") + "txt",) or left_out


def test_what_is_left_out_of_a_tar_is_counted(tmp_path):
    members = [("._a.jpg", b"\0"), *sample("a", "x"), ("a.depth.png", b"d"), (".DS_Store", b"\0"), *sample("b", "y")]
    dataset = read(write_tar(tmp_path / "t.tar", members))
    assert dataset.found.endswith("; left out: 2 hidden members, 1 further pictures of a sample")


def test_scattered_members_are_an_error_that_says_so(tmp_path):
    members = pairs(str)
    for order in (members[::2] + members[1::2], members[1::2] + members[::2]):
        with pytest.raises(
            DatasetError, match="of 0 do not follow each other; write the tar again with its members sor"
        ):
            read(write_tar(tmp_path / "t.tar", order))


def test_the_error_names_what_would_take_the_captions(tmp_path):
    members = [(f"{n}.{suffix}", data) for n in range(2) for suffix, data in (("jpg", b"x"), ("cls", b"3"))]
    with pytest.raises(
        DatasetError, match=r"no caption .*\(there is \.cls, \.jpg\); --caption-column NAME takes another"
    ):
        read(write_tar(tmp_path / "t.tar", members))
    assert [r.captions for r in read(tmp_path / "t.tar", ReadOptions(caption_column="cls")).records] == [("3",)] * 2
    members = [("0.jpg", b"x"), ("0.json", b'{"alt": "a dog", "URL": "u"}'), ("0.txt", b"")]
    with pytest.raises(DatasetError, match="its JSON has the fields alt, URL; --caption-column NAME takes one of them"):
        read(write_tar(tmp_path / "t.tar", members))
    assert read(tmp_path / "t.tar", ReadOptions(caption_column="alt")).records[0].captions == ("a dog",)


def test_a_sparse_tail_ends_at_once(tmp_path):
    """A terabyte of zeros that takes no room; data behind it is read."""
    whole = write_tar(tmp_path / "t.tar", SHARD[:3]).read_bytes()
    with open(tmp_path / "t.tar", "r+b") as file:
        file.truncate(2**40)
    assert len(read(tmp_path / "t.tar").records) == 1
    with open(tmp_path / "t.tar", "r+b") as file:
        file.seek(2**39)
        file.write(write_tar(tmp_path / "u.tar", SHARD[3:6]).read_bytes())
    assert [r.key for r in read(tmp_path / "t.tar").records] == ["t/000000000", "t/000000001"]
    (tmp_path / "t.tar").write_bytes(whole + bytes(MAX_ZEROS + BLOCK))
    assert [r.problem[:26] for r in read(tmp_path / "t.tar").records] == ["", "t.tar: zeros up to byte 67"]


def test_a_header_of_many_attributes_is_read_in_time(tmp_path):
    value = b"5 a=\n" * 200_000
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(value)
    data = header.tobuf() + value + bytes(-len(value) % BLOCK)
    (tmp_path / "t.tar").write_bytes(data + write_tar(tmp_path / "u.tar", SHARD[:3]).read_bytes())
    assert len(read(tmp_path / "t.tar").records) == 1

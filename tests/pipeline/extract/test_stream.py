"""Decoding and encoding side by side: in order, the same whatever the number of threads, with nothing held back."""

import io
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from qf.pipeline.config import ExtractOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.device import EncoderStreams
from qf.pipeline.encoders.load import load_encoder
from qf.pipeline.errors import EncoderError
from qf.pipeline.extract.stream import Piece, Stream

from conftest import COLOURS, SHAPES, counted_parquet, draw, make_pictures  # isort: skip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return read(make_pictures(tmp_path_factory.mktemp("many"), copies=5)).records


def pieces(records, size):
    return [Piece(0, records[start : start + size]) for start in range(0, len(records), size)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("workers", "cores"), [(1, 1), (4, 1), (2, 3)])
def test_the_same_in_order_whatever_works_beside(records, clip_folder, threads, workers, cores):
    threads(cores)
    encoder = load_encoder(str(clip_folder), CPU, torch.float32)
    with Stream(encoder, ExtractOptions(batch_size=7, workers=workers)) as stream:
        assert stream.streams.count == cores
        parts = list(stream.encoded(pieces(records, stream.piece_size)))
        assert 0 <= stream.waited < 1
        assert stream.seconds > 0
    assert torch.get_num_threads() == cores
    assert [key for part in parts for key in part.block["key"]] == [record.key for record in records]
    for part in parts:
        pixels = [encoder.preprocessing(_image(record)) for record in part.piece.records]
        alone = torch.cat([encoder.encode(pixel[None])[0] for pixel in pixels]).half()
        assert torch.allclose(torch.from_numpy(part.block["tokens"]).float(), alone.float(), atol=2e-3)


def _image(record):
    from qf.pipeline.datasets.sources import load
    from qf.pipeline.images import load_image

    return load_image(load(record.source))


@pytest.mark.parametrize("rows", [7, 100, 400])  # in a row group
@pytest.mark.parametrize("workers", [1, 16])
def test_parquet_files_are_read_once_in_order(tmp_path, clip_folder, monkeypatch, rows, workers):
    """However many threads decode; a picture that is damaged or missing is a reject of its record alone."""
    every = []
    for colour in COLOURS:
        for shape in SHAPES:
            draw(colour, shape).save(file := io.BytesIO(), "png")
            every.append(file.getvalue())
    images = [{"bytes": every[n % 12] if n % 50 else b"no picture", "path": f"{n}.png"} for n in range(400)]
    images[5:9] = [None] * 4
    for number in range(2):
        table = pa.table({"image": images[number * 200 :][:200], "caption": ["x"] * 200})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=rows)
    records = read(tmp_path).records
    encoder = load_encoder(str(clip_folder), CPU, torch.float32)
    opened, begun = counted_parquet(monkeypatch)
    with Stream(encoder, ExtractOptions(batch_size=3, workers=workers)) as stream:
        parts = list(stream.encoded(pieces(records, stream.piece_size)))
    assert opened == [str(tmp_path / f"{number}.parquet") for number in range(2)]
    assert begun == [*range(-(-200 // rows))] * 2
    keys = [f"{n}.png" for n in range(400) if n % 50 and n not in range(5, 9)]
    assert [key for part in parts for key in part.block["key"]] == keys
    rejects = [reject.key for part in parts for reject in part.rejects]
    assert rejects == ["0.png", *(f"row {n}" for n in range(6, 10)), *(f"{n}.png" for n in range(50, 400, 50))]
    encoded = torch.cat([torch.from_numpy(part.block["tokens"]) for part in parts if part.block["key"]]).float()
    for n in range(12):  # equal pictures, equal features
        same = encoded[[at for at, key in enumerate(keys) if int(key[:-4]) % 12 == n]]
        assert torch.allclose(same, same[:1].expand_as(same), atol=2e-3)


def test_views_and_records_fill_a_batch_together(records, clip_folder):
    encoder = load_encoder(str(clip_folder), CPU, torch.float32)
    with Stream(encoder, ExtractOptions(views=3, batch_size=8, workers=1)) as stream:
        assert stream.piece_size == 2
    with Stream(
        encoder, ExtractOptions(views=9, batch_size=4, workers=1)
    ) as stream:  # more views than fit: several batches a record
        assert stream.piece_size == 1
        (part,) = stream.encoded([Piece(0, [next(r for r in records if r.split == "train")])])
        assert part.block["view_tokens"].shape[0] == 9


def test_an_encoder_that_fails_ends_the_stream(records, clip_folder):
    encoder = load_encoder(str(clip_folder), CPU, torch.float32)
    with torch.no_grad():
        for weights in encoder.model.parameters():
            weights.fill_(torch.nan)
    before = threading.active_count()
    with (
        pytest.raises(EncoderError, match="not finite for red-square-0.png; try --precision float32"),
        Stream(encoder, ExtractOptions(batch_size=5, workers=2)) as stream,
    ):
        list(stream.encoded(pieces(records, 5)))
    assert threading.active_count() <= before  # threads that loaded the encoder may have ended meanwhile


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_results_come_from_every_device(device):
    streams = EncoderStreams(torch.device(device))

    def work():
        streams.enter()
        made = streams.fetch(torch.arange(5.0, device=device) * 2)
        streams.wait()
        results.append(made)

    results = []
    some = [threading.Thread(target=work) for _ in range(streams.count)]
    for thread in some:
        thread.start()
    for thread in some:
        thread.join()
    streams.leave()
    assert [result.tolist() for result in results] == [[0, 2, 4, 6, 8]] * streams.count
    assert all(result.device.type == "cpu" for result in results)

from qf.pipeline import schema
from qf.pipeline.datasets.catalogue import CATALOGUE
from qf.pipeline.datasets.columns import ROWS
from qf.pipeline.features import arrow_shards
from qf.pipeline.features.codecs import columns


def test_columns_of_a_shard_are_those_of_a_record_around_its_features():
    names = arrow_shards.schema(columns("int8", 5, 8), 4, views=True).names
    assert names == [
        "key", "split", "image", "captions", "tokens", "token_scale", "channel_scale", "pooled", "thumbnail", "width", "height",
        "views", "view_tokens", "view_token_scale", "view_channel_scale",
    ]  # fmt: skip
    assert [name for name in names if name in schema.RECORD_COLUMNS] == list(schema.RECORD_COLUMNS)


def test_every_place_has_the_columns_that_it_needs():
    assert schema.JSON_COLUMNS == ("key", "split", "image", "captions", "width", "height")
    assert schema.INDEX_COLUMNS == ("key", "split", "image", "captions", "thumbnail")


def test_tables_on_the_way_have_the_types_of_a_record():
    for table in (CATALOGUE, ROWS):
        for name in ("key", "image", "captions", *schema.OPTIONAL_COLUMNS):
            assert table.field(name).type == schema.TYPES[name]

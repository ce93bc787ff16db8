"""Untrusted Parquet and Arrow files, and what reading them costs; good ones are in test_forms.py."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_fast.train import tables
from llava_fast.train.data import LlavaDataset
from tests.train.test_untrusted import refused

TALK = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "one"}]
SHOWN = [{"role": "user", "content": "<image>\nwhat"}, {"role": "assistant", "content": "one"}]


def arrow(table: pa.Table, compression: str | None = None, stream: bool = True) -> bytes:
    sink = pa.BufferOutputStream()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet(table: pa.Table, **options) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def texts(*contents: bytes) -> pa.Table:
    """Questions whose texts are these bytes, which pyarrow does not check when it writes them."""
    offsets = pa.array([0, *[sum(map(len, contents[: i + 1])) for i in range(len(contents))]], pa.int32())
    content = pa.Array.from_buffers(
        pa.string(), len(contents), [None, offsets.buffers()[1], pa.py_buffer(b"".join(contents))]
    )
    questions = pa.StructArray.from_arrays([pa.array(["user"] * len(contents)), content], ["role", "content"])
    return pa.table({"messages": pa.ListArray.from_arrays(pa.array(range(len(contents) + 1), pa.int32()), questions)})


GOOD = pa.table({"id": [1, 2], "messages": [TALK, TALK], "image": pa.array([None, None], pa.string())})

# A file's suffix, its contents, and what the line says besides its name.
FILES = {
    "empty Parquet": (".parquet", b"", "not readable as Parquet"),
    "a web page": (".parquet", b"<html>404 not found</html>", "not readable as Parquet"),
    "a pickle": (".parquet", b"\x80\x04\x95\x10\x00\x00\x00", "not readable as Parquet"),
    "Parquet cut short": (".parquet", parquet(GOOD)[:-40], "not readable as Parquet"),
    "a hole": (".parquet", parquet(GOOD)[:40] + bytes(200) + parquet(GOOD)[240:], "not readable as Parquet"),
    "magic alone": (".parquet", b"PAR1PAR1", "not readable as Parquet"),
    "empty Arrow": (".arrow", b"", "not readable as Arrow"),
    "Parquet for Arrow": (".arrow", parquet(GOOD), "not readable as Arrow"),
    "an Arrow stream cut short": (".arrow", arrow(GOOD)[:-200], "not readable as Arrow"),
    "an Arrow file cut short": (".arrow", arrow(GOOD, stream=False)[:-40], "not readable as Arrow"),
    "no rows": (".arrow", arrow(GOOD.slice(0, 0)), "none of 0 rows can be used: the file is empty"),
    "no rows of Parquet": (".parquet", parquet(GOOD.slice(0, 0)), "none of 0 rows can be used: the file is empty"),
    "other columns": (".parquet", parquet(pa.table({"text": ["a"]})), "row 0: expected an object with a list of"),
    "two columns of one name": (
        ".arrow",
        arrow(pa.Table.from_arrays([GOOD["messages"]] * 2, ["messages", "messages"])),
        "two columns of one name",
    ),
    "an extension type": (
        ".arrow",
        arrow(GOOD.append_column("images", pa.array([bytes(16)] * 2, pa.uuid()))),
        "column 'images' has an extension type",
    ),
    "a pickled extension type": (
        ".arrow",
        arrow(GOOD.append_column(pa.field("images", pa.string(), metadata={
            "ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": "cos\nabort\n(tR."}),
            pa.array(["0.png"] * 2))),
        "column 'images' has an extension type",
    ),
    "not UTF-8": (".parquet", parquet(texts(b"what", b"\xff\xff")), "row 1: cannot be read: 'utf-8' codec"),
    "Arrow that is not UTF-8": (".arrow", arrow(texts(b"what", b"\xff\xff")), "not readable as Arrow"),
    "a list of many nulls": (
        ".arrow",
        arrow(pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, 2**28], pa.int32()), pa.nulls(2**28))})),
        "row 0: cannot be read: more than 1000000 items in lists",
    ),
    "numbers for messages": (".parquet", parquet(pa.table({"messages": [[1, 2]]})), "row 0: turn 0 has no 'content'"),
    "a dictionary of a list of many nulls": (
        ".arrow",
        arrow(pa.table({"messages": pa.DictionaryArray.from_arrays(
            pa.array([0], pa.int8()), pa.ListArray.from_arrays(pa.array([0, 2**28], pa.int32()), pa.nulls(2**28)))})),
        "row 0: cannot be read: more than 1000000 items in lists",
    ),
    "very many rows of null": (
        ".arrow",
        arrow(pa.table({"messages": pa.nulls(2**28)})),
        f"{2**28} rows are more than the limit of {2**27}",
    ),
    "a way up": (".parquet", parquet(pa.table({"image": ["../x.png"], "messages": [SHOWN]})), "outside of the image"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_bad_files(tmp_path, processor, name):
    suffix, content, words = FILES[name]
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    refused(tmp_path, lambda: LlavaDataset(path, tmp_path, processor, on_error="raise"), str(path), words)


def test_bad_rows_are_skipped(tmp_path, processor):
    (tmp_path / "data.parquet").write_bytes(parquet(texts(b"what", b"\xff")))
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n{oops")
    found = LlavaDataset(tmp_path, None, processor, on_error="skip")
    where = [problem.where for problem in found.problems]
    assert where == [
        f"{tmp_path / 'a.jsonl'}, line 2",
        f"{tmp_path / 'data.parquet'}, row 0",
        f"{tmp_path / 'data.parquet'}, row 1",
    ]
    assert [problem.reason for problem in found.problems] == ["malformed", "fully_masked", "malformed"]


def test_what_is_no_file(tmp_path, processor):
    os.mkfifo(tmp_path / "pipe.parquet")
    for name in ("pipe.parquet", "none.arrow"):
        refused(
            tmp_path,
            lambda name=name: LlavaDataset(tmp_path / name, None, processor),
            f"no data file {tmp_path / name}",
        )


@pytest.mark.parametrize("path", ["../0.png", "/etc/passwd", "out.png", "none.png", "https://a.b/c.png"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_paths_beside_embedded_images_stay_in_the_folder(folder, processor, path, suffix):
    """A path beside empty `bytes` is found only when the sample is loaded: the scan does not read `bytes`."""
    (folder / "images").mkdir()
    (folder / "images" / "out.png").symlink_to(folder / "0.png")
    table = pa.table({"image": [{"bytes": None, "path": path}], "messages": [SHOWN]})
    file = folder / f"data{suffix}"
    file.write_bytes(parquet(table) if suffix == ".parquet" else arrow(table))
    refused(folder, lambda: LlavaDataset(file, folder / "images", processor, on_error="raise")[0], f"{file}, row 0")
    refused(
        folder,
        lambda: LlavaDataset(file, None, processor, on_error="raise")[0],
        f"{file}, row 0",
        "needs an image_folder",
    )


@pytest.mark.parametrize(
    "state",
    ["", "[]", '{"_data_files": 3}', '{"_data_files": [{"filename": "../data.arrow"}]}', '{"_data_files": [{}]}',
     '{"_data_files": [{"filename": "state.json"}]}', "[" * 100_000],
)  # fmt: skip
def test_lists_of_saved_files_that_nobody_vouches_for(tmp_path, processor, state):
    (tmp_path / "data.arrow").write_bytes(arrow(GOOD))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.json").write_text(state)
    refused(tmp_path, lambda: LlavaDataset(tmp_path / "set", None, processor), "set/state.json: no list of '_data_f")
    (tmp_path / "set" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    refused(tmp_path, lambda: LlavaDataset(tmp_path / "set", None, processor), "no data file", "set/data.arrow")


def test_compressed_arrow_is_limited(tmp_path, processor, monkeypatch):
    table = pa.table({"messages": [[{"role": "user", "content": "what " * 2000}, TALK[1]]] * 200})
    (tmp_path / "data.arrow").write_bytes(arrow(table, "zstd"))
    assert len(tables.open_table(tmp_path / "data.arrow", None)) == 200
    monkeypatch.setattr(tables, "_COPIED_BYTES", 2**20)
    with pytest.raises(
        ValueError, match=r"data\.arrow: not readable as Arrow \(compressed, and too large to be kept in m"
    ):
        tables.open_table(tmp_path / "data.arrow", None)
    (tmp_path / "data.arrow").write_bytes(arrow(table))
    assert len(tables.open_table(tmp_path / "data.arrow", None)) == 200


def test_a_repeated_text_is_not_spread_out(tmp_path):
    """A dictionary of one text of 8 MB that 1000 rows repeat: 8 MB in the file, 8 GB as a column."""
    content = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["a" * 2**23]))
    turns = pa.StructArray.from_arrays([pa.array(["user"] * 1000), content], ["role", "content"])
    table = pa.table({"messages": pa.ListArray.from_arrays(pa.array(range(1001), pa.int32()), turns)})
    schema = pa.schema({"messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))})
    path = tmp_path / "data.parquet"
    pq.write_table(table, path, store_schema=False, dictionary_pagesize_limit=2**30)
    assert path.stat().st_size < 2**24 and pq.read_schema(path).field("messages").type == schema.field("messages").type
    before = pa.default_memory_pool().max_memory()
    first = next(iter(tables.open_table(path, None).read([0])))
    assert len(first["messages"][0]["content"]) == 2**23
    assert pa.default_memory_pool().max_memory() - before < 2**30


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.floats(0, 1), length=st.integers(0, 40), junk=st.binary(max_size=12), tail=st.booleans(),
       kind=st.integers(0, 3))  # fmt: skip
def test_any_table_is_samples_or_one_line(folder, processor, cut, length, junk, tail, kind):
    cells = [{"bytes": (folder / f"{i}.png").read_bytes(), "path": None} for i in range(2)]
    table = pa.table({"id": [1, 2], "image": cells, "messages": [SHOWN, SHOWN]})
    seed = [parquet(table), parquet(table, compression="zstd"), arrow(table), arrow(table, stream=False)][kind]
    path = folder / f"data{'.parquet' if kind < 2 else '.arrow'}"
    at = int(cut * len(seed))
    path.write_bytes(seed[:at] + junk + (seed[at + length :] if tail else b""))
    try:
        samples = list(LlavaDataset(path, folder, processor, on_error="raise"))
    except (ValueError, OSError) as error:
        assert str(path) in str(error) and str(error).isprintable()
        return
    assert all(len(sample["pixel_values"]) == 1 for sample in samples)


def test_rows_in_any_order_of_many_row_groups(tmp_path):
    """Forward within a group, and back again; each read gives the row that was asked for."""
    rows = [{"id": i, "messages": TALK, "image": {"bytes": bytes([i]), "path": None}} for i in range(250)]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    found = tables.open_table(path, None)
    assert [row["id"] for row in found.read([0, 3, 99, 100, 249])] == [0, 3, 99, 100, 249]
    order = torch.randperm(250, generator=torch.Generator().manual_seed(0)).tolist()
    assert [found.row(i)["image"]["bytes"] for i in order] == [bytes([i]) for i in order]


def test_no_file_is_written(folder, processor, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    (folder / "data.parquet").write_bytes(
        parquet(pa.table({"image": [(folder / "0.png").read_bytes()], "messages": [SHOWN]}))
    )
    before = sorted(folder.rglob("*"))
    assert len(LlavaDataset(folder / "data.parquet", None, processor)[0]["pixel_values"]) == 1
    assert sorted(folder.rglob("*")) == before

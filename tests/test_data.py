"""Text files, packing and the position from which a stream goes on."""

import gzip
import itertools
import json
import lzma

import pytest
import torch
from conftest import GOLDEN

from appendix import data
from load_weights import Tokenizer
from loopus import InputError


def test_every_file_format_gives_the_same_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = ["first\n\ndocument", "zweites é 🙂", "", "third"]  # an empty one is none
    lines = "".join(json.dumps({"text": t, "source": "x"}) + "\n" for t in texts)
    (tmp_path / "a.jsonl").write_text(lines + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write(lines)
    with lzma.open(tmp_path / "a.v2.jsonl.xz", "wt", encoding="utf-8") as f:
        f.write(lines)
    pyarrow.parquet.write_table(
        pyarrow.table({"id": [1, 2, 3, 4], "text": texts}), tmp_path / "a.parquet"
    )
    (tmp_path / "a.txt").write_text(texts[0], encoding="utf-8")
    for name in ("a.jsonl", "a.jsonl.gz", "a.v2.jsonl.xz", "a.parquet"):
        assert list(data.documents(tmp_path / name)) == [
            (0, texts[0]),
            (1, texts[1]),
            (3, texts[3]),
        ], name
        assert list(data.documents(tmp_path / name, skip=1)) == [(1, texts[1]), (3, texts[3])], name
    assert list(data.documents(tmp_path / "a.txt")) == [(0, texts[0])]


def test_packing_loses_nothing_and_counts_truly(corpus):
    tokenizer = Tokenizer(GOLDEN / "bytelevel")
    stream = [
        i for _, text in data.documents(corpus) for i in tokenizer.encode(text) + [tokenizer.eos_id]
    ]
    rows = [row for row, _ in data.sequences(data.shards(corpus), tokenizer, 32)]
    assert [i for row in rows for i in row] == stream[: len(stream) // 32 * 32] and {
        len(row) for row in rows
    } == {32}
    one_epoch, batches = len(rows), data.batches(corpus, tokenizer, 4, 32, seed=0)
    shuffled = torch.cat([next(batches)[0] for _ in range(one_epoch // 4)])
    assert shuffled.shape == (one_epoch // 4 * 4, 32) and not torch.equal(
        shuffled[:40], torch.tensor(rows[:40])
    )
    assert {tuple(r) for r in shuffled.tolist()} <= {tuple(r) for r in rows}
    again, _ = next(data.batches(corpus, tokenizer, 4, 32, seed=0))
    assert torch.equal(again, shuffled[:4])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
@pytest.mark.parametrize("batch_size, seq_len, skip", [(3, 8, 5), (7, 32, 0)])
def test_the_stream_goes_on_from_any_position_as_if_it_had_never_stopped(
    tmp_path, corpus, monkeypatch, kind, batch_size, seq_len, skip
):
    """Over two epochs, parts of 50 sequences, documents shorter and longer than a part: the position behind a batch gives the batches that followed it."""
    import pyarrow
    import pyarrow.parquet

    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()][
        :60
    ] + ["word " * 3000]
    path, tokenizer = tmp_path / f"a.{kind}", Tokenizer(GOLDEN / "bytelevel")
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
    else:
        path.write_text(
            "\n".join(texts)
            if kind == "txt"
            else "".join(json.dumps({"text": t}) + "\n\n" for t in texts),
            encoding="utf-8",
        )
    monkeypatch.setattr(data, "SHUFFLE", 50)
    stream = lambda position=None: data.batches(
        path, tokenizer, batch_size, seq_len, 3, skip, position
    )
    count = 2 * len(list(data.sequences(data.shards(path), tokenizer, seq_len))) // batch_size
    made = [
        (ids, json.loads(json.dumps(position)))
        for ids, position in itertools.islice(stream(), count)
    ]
    for i in [0, 1, count // 2 - 1, count // 2, *range(3, count - 4, max(1, count // 12))]:
        for (ids, position), (again, other) in zip(made[i + 1 : i + 30], stream(made[i][1])):
            assert torch.equal(ids, again) and position == other
    assert all(
        sum(len(row) for row in position["left"]) < batch_size * seq_len for _, position in made
    )


def test_documents_start_with_bos_where_the_tokenizer_adds_it(tmp_path):
    tokenizer = Tokenizer(GOLDEN / "sentencepiece")
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n{"text": "c"}\n')
    row, _ = next(data.sequences(data.shards(tmp_path / "a.jsonl"), tokenizer, 6))
    assert row[0] == 1 and row.count(1) == 2 and row.count(2) >= 1


def test_held_out_sequences_are_not_trained_on(tmp_path):
    """Of a .txt too, which is one document."""
    tokenizer = Tokenizer(GOLDEN / "bytelevel")
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(1000))))
    rows = [row for row, _ in data.sequences(data.shards(tmp_path / "a.txt"), tokenizer, 32)]
    held = data.held_out(tmp_path / "a.txt", tokenizer, 32, 5)
    stream = data.batches(tmp_path / "a.txt", tokenizer, 1, 32, seed=0, skip=5)
    trained = [next(stream)[0][0].tolist() for _ in range(len(rows) - 5)]
    assert held.tolist() == rows[:5] and sorted(trained) == sorted(rows[5:])
    with pytest.raises(InputError, match="held out"):
        data.held_out(tmp_path / "a.txt", tokenizer, 32, 5000)


def test_a_parquet_column_of_numbers_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="int64"):
        next(data.documents(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b"", "too little text"),
        ("a.txt", b"", "too little text"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 3}\n', "line 2"),
        ("a.jsonl", b'{"text": 3}\n', "expected a string"),
        ("a.jsonl", b'{"text": "x"\n', "line 1"),
        ("a.txt", b"\xff\xfe\x00", "not readable"),
        ("a.jsonl.gz", b"no gzip", "not readable"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 999)[:12] + b"\xff" * 20, "not readable"),
        ("a.jsonl.xz", lzma.compress(b"{}" * 999)[:40], "not readable"),
        ("a.parquet", b"PAR1", "not readable"),
        ("a.csv", b"x", "expected a .txt"),
        ("a.txt", b"too short", "too little text"),
        ("missing.txt", None, "not readable"),
    ],
)
def test_bad_data_is_one_clear_line(tmp_path, backbone, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        next(data.batches(tmp_path / name, Tokenizer(backbone), 2, 32, 0))
    assert "\n" not in str(error.value)

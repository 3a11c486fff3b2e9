"""Text files, packing and the position from which a stream goes on."""

import gzip
import itertools
import json
import lzma
import signal
import subprocess
import sys
import tracemalloc

import pytest
import tiktoken
import torch
from conftest import GOLDEN, ROOT

from appendix import data
from appendix.tokenizer import GPT2_SPLIT
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
    expected = [(0, texts[0]), (1, texts[1]), (3, texts[3])]
    for name in ("a.jsonl", "a.jsonl.gz", "a.v2.jsonl.xz", "a.parquet"):
        assert list(data.documents(tmp_path / name)) == expected, name
        assert list(data.documents(tmp_path / name, skip=1)) == expected[1:], name
    assert list(data.documents(tmp_path / "a.txt")) == expected[:1]


def test_packing_loses_nothing_and_counts_truly(corpus):
    tokenizer = Tokenizer(GOLDEN / "bytelevel")
    stream = []
    for _, text in data.documents(corpus):
        stream += tokenizer.encode(text) + [tokenizer.eos_id]
    rows = [row for row, _ in data.sequences(data.shards(corpus), tokenizer, 32)]
    assert sum(rows, []) == stream[: len(stream) // 32 * 32]
    assert {len(row) for row in rows} == {32}
    count, batches = len(rows) // 4, data.batches(corpus, tokenizer, 4, 32, seed=0)
    shuffled = torch.cat([next(batches)[0] for _ in range(count)])  # an epoch
    assert shuffled.shape == (count * 4, 32)
    assert not torch.equal(shuffled[:40], torch.tensor(rows[:40]))
    assert {tuple(row) for row in shuffled.tolist()} <= {tuple(row) for row in rows}
    again, _ = next(data.batches(corpus, tokenizer, 4, 32, seed=0))
    assert torch.equal(again, shuffled[:4])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
@pytest.mark.parametrize("batch_size, seq_len, skip", [(3, 8, 5), (7, 32, 0)])
def test_the_stream_goes_on_from_any_position_as_if_it_had_never_stopped(
    tmp_path, corpus, monkeypatch, kind, batch_size, seq_len, skip
):
    """Over two epochs, with parts of 50 sequences and documents shorter and longer than a part.

    The position behind a batch gives the batches that followed it.
    """
    import pyarrow
    import pyarrow.parquet

    texts = [text for _, text in data.documents(corpus)][:60] + ["word " * 3000]
    path, tokenizer = tmp_path / f"a.{kind}", Tokenizer(GOLDEN / "bytelevel")
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
    elif kind == "txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    else:
        lines = [json.dumps({"text": text}) + "\n\n" for text in texts]
        path.write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(data, "SHUFFLE", 50)

    def stream(position=None):
        return data.batches(path, tokenizer, batch_size, seq_len, 3, skip, position)

    count = 2 * len(list(data.sequences(data.shards(path), tokenizer, seq_len))) // batch_size
    made = []
    for ids, position in itertools.islice(stream(), count):
        made.append((ids, json.loads(json.dumps(position))))
    for i in [0, 1, count // 2 - 1, count // 2, *range(3, count - 4, max(1, count // 12))]:
        followed = made[i + 1 : i + 30]
        again = itertools.islice(stream(made[i][1]), len(followed))
        for (ids, position), (other_ids, other) in zip(followed, again, strict=True):
            assert torch.equal(ids, other_ids) and position == other
    for _, position in made:
        assert sum(len(row) for row in position["left"]) < batch_size * seq_len


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


# ---- long texts, special tokens, end tokens ------------------------------------------------------


@pytest.fixture
def nothing_said(monkeypatch):
    """As at the start of a program: no line has been said yet."""
    monkeypatch.setattr(data, "SAID", set())


def rows_of(path, tokenizer, seq_len=32, **options):
    return [row for row, _ in data.sequences(data.shards(path), tokenizer, seq_len, **options)]


@pytest.mark.parametrize("name", ["bytelevel", "digits", "sentencepiece"])
@pytest.mark.parametrize("special", [False, True])
def test_a_long_txt_is_one_document_read_in_parts(tmp_path, corpus, monkeypatch, name, special):
    tokenizer = Tokenizer(GOLDEN / name)
    text = corpus.read_text(encoding="utf-8") + "🙂 <s> </s>  好\n\n" * 50
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    ids = tokenizer.encode(text, tokenizer.add_bos, special) + [tokenizer.eos_id]
    monkeypatch.setattr(data, "READ", 500)
    assert len(list(data.documents(tmp_path / "a.txt"))) > 50
    files = data.shards(tmp_path / "a.txt")
    stream = list(data.sequences(files, tokenizer, 32, special=special))
    rows = [row for row, _ in stream]
    assert sum(rows, []) == ids[: len(ids) // 32 * 32]
    # It goes on from any place in it.
    for i in range(0, len(stream), len(stream) // 4):
        place = json.loads(json.dumps(stream[i][1]))
        after = list(data.sequences(files, tokenizer, 32, place, special))
        assert after == stream[i + 1 :]


def test_memory_does_not_grow_with_a_txt(tmp_path, monkeypatch):
    """Bytes that Python holds at most while a text is read, encoded and cut into sequences."""
    tokenizer = Tokenizer(GOLDEN / "bytelevel")
    monkeypatch.setattr(data, "READ", 2**14)
    peaks = []
    for times in (2_000, 16_000):
        (tmp_path / "a.txt").write_text("All of these words are one text.\nAnd so on. " * times)
        tracemalloc.start()
        for _ in data.sequences(data.shards(tmp_path / "a.txt"), tokenizer, 64):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 16_000 * 45


def test_special_tokens_in_documents_are_text_until_they_are_asked_for(
    tmp_path, capsys, nothing_said
):
    tokenizer = Tokenizer(GOLDEN / "gpt2")
    lines = ["plain", "one<|end|>two", "three<|end|>"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines) * 20)
    rows = rows_of(path, tokenizer)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--special-tokens" in said and "<|end|>" in said
    assert f"{path}, document 2:" in said
    ends = sum(row.count(tokenizer.eos_id) for row in rows)
    asked = rows_of(path, tokenizer, special=True)
    # Of each three documents, there are two more end tokens.
    assert sum(row.count(tokenizer.eos_id) for row in asked) > 1.5 * ends > 0
    assert data.held_out(path, tokenizer, 32, 2, special=True).tolist() == asked[:2]
    batch, _ = next(data.batches(path, tokenizer, 1, 32, seed=0, special=True))
    assert batch[0].tolist() in asked
    rows_of(path, tokenizer)
    assert capsys.readouterr().err == ""  # once a run


def test_text_that_only_looks_like_a_special_token_is_passed_over(tmp_path, capsys, nothing_said):
    (tmp_path / "a.txt").write_text("<|end| > <think> </s> " * 20)
    rows_of(tmp_path / "a.txt", Tokenizer(GOLDEN / "gpt2"))
    assert capsys.readouterr().err == ""


def test_without_an_end_token_documents_are_packed_as_they_are_and_that_is_said(
    tmp_path, capsys, nothing_said
):
    (tmp_path / "tokenizer.json").write_bytes((GOLDEN / "gpt2" / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "one "}\n{"text": "two "}\n' * 40)
    expected = (tokenizer.encode("one ") + tokenizer.encode("two ")) * 40
    for _ in range(2):
        rows = rows_of(tmp_path / "a.jsonl", tokenizer, 16)
        assert sum(rows, []) == expected[: len(expected) // 16 * 16]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "end token" in said and str(tmp_path) in said


def test_a_document_that_the_tokenizer_gives_up_on_is_named(tmp_path, monkeypatch):
    raw = json.loads((GOLDEN / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": "(?:a|aa)+c|b"}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    monkeypatch.setattr("appendix.tokenizer.PATIENCE", 0.1)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "' + "a" * 60 + '"}\n')
    with pytest.raises(InputError, match="a.jsonl, document 2: .*split pattern") as error:
        rows_of(path, Tokenizer(tmp_path), 2)
    assert "\n" not in str(error.value)


# ---- what other programs write -------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
def test_byte_order_marks_are_no_text_and_line_ends_stay(tmp_path, encoding, name):
    text = "one é\r\ntwo\r\n"
    content = text if name == "a.txt" else json.dumps({"text": text}, ensure_ascii=False) + "\r\n"
    compress = {".gz": gzip.compress, ".xz": lzma.compress}.get(name[-3:], bytes)
    (tmp_path / name).write_bytes(compress(content.encode(encoding)))
    assert list(data.documents(tmp_path / name)) == [(0, text)]


def test_files_that_were_put_together_have_marks_inside(tmp_path):
    line = '{"text": "x"}\n'.encode("utf-8-sig")
    (tmp_path / "a.jsonl").write_bytes(line * 3)
    assert list(data.documents(tmp_path / "a.jsonl")) == [(0, "x"), (1, "x"), (2, "x")]


@pytest.mark.parametrize(
    "line", ['{"text": "x"', "[1]", '"text"', "7", "null", '{"text": null}', "[" * 100_000, "\0"]
)
def test_a_line_that_is_no_document_is_one_line_that_names_it(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line + "\n")
    with pytest.raises(InputError, match="a.jsonl, line 2: ") as error:
        list(data.documents(tmp_path / "a.jsonl"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["corpus", "no/such/folder", "../corpus", "corpus.txt"])
def test_a_wrong_path_is_said_to_be_one_first(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no such file or folder here"):
        next(data.batches(name, Tokenizer(GOLDEN / "gpt2"), 1, 8, seed=0))


def test_an_error_of_a_file_names_it_once(tmp_path):
    """It passes through the encoding of what stands before it."""
    tokenizer = Tokenizer(GOLDEN / "gpt2")
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    (tmp_path / "a.txt").write_bytes(b"fine " * data.READ + b"\xff")
    for name, words in (("a.jsonl", ", line 2: field"), ("a.txt", ": not readable")):
        with pytest.raises(InputError) as error:
            rows_of(tmp_path / name, tokenizer)
        assert str(error.value).startswith(f"{tmp_path / name}{words}")


# ---- in a thread ---------------------------------------------------------------------------------


def test_what_a_thread_makes_ahead_is_the_stream():
    assert list(data.ahead(iter(range(100)))) == list(range(100))
    assert list(data.ahead(iter([]))) == []


def broken(error):
    yield 1
    raise error


@pytest.mark.parametrize("error", [InputError("bad line"), KeyError(3), SystemExit(3), Exception()])
def test_whatever_ends_the_thread_is_raised_where_the_item_would_be_used(error):
    stream = data.ahead(broken(error))
    assert next(stream) == 1
    with pytest.raises(type(error)) as raised:
        next(stream)
    assert raised.value is error


def test_a_panic_of_tiktoken_is_raised_too():
    """It is no Exception, so a thread that catches Exception dies without a word."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding(
        "panics", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={}
    )
    stream = data.ahead(map(encoding.encode_ordinary, ["a", "a" + " " * 1_000_001 + "b"]))
    assert next(stream) == [97]
    with pytest.raises(BaseException) as panic:
        next(stream)
    assert type(panic.value).__name__ == "PanicException"


def test_ctrl_c_works_while_one_waits_for_the_thread():
    code = (
        "import signal, time\n"
        "from appendix.data import ahead\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # where a shell ignores it
        "def stream():\n"
        "    yield 1\n"
        "    time.sleep(1000)\n"
        "for item in ahead(stream()):\n"
        "    print('waiting', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as waiting:
        assert waiting.stdout.readline() == "waiting\n"
        waiting.send_signal(signal.SIGINT)
        try:
            _, errors = waiting.communicate(timeout=20)
        finally:
            waiting.kill()
    assert "KeyboardInterrupt" in errors and waiting.returncode != 0


def test_the_thread_has_ended_when_the_program_ends():
    """One that still computes while the interpreter is taken down aborts the program."""
    code = (
        "import atexit, sys, threading, time\n"
        "atexit.register(lambda: print(threading.active_count(), made))\n"  # the last to be called
        "from appendix.data import ahead\n"
        "made = []\n"
        "def stream():\n"
        "    while True:\n"
        "        time.sleep(0.1)\n"
        "        made.append(len(made))\n"
        "        yield made[-1]\n"
        "items = ahead(stream())\n"
        "next(items)\n"
        "sys.exit(2)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stdout in ("1 [0]\n", "1 [0, 1]\n", "1 [0, 1, 2]\n")

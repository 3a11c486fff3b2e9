"""A few spoilt files of each kind (fuzz.py tries thousands), and that fuzz.py tells what it saw."""

import signal
import time

import fuzz
import pytest

from loopus import InputError

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs signal.alarm")


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_spoilt_file_is_read_or_refused_in_one_line(kind):
    tries = 2 if kind == "trouble" else 22  # a whole command each
    counts, others = fuzz.fuzz(kind, range(tries))
    assert not others, f"seed, file and outcome: {others}"
    assert counts["refused"] > 0 or kind == "trouble"
    assert counts.total() == tries


def test_the_same_seed_spoils_a_file_in_the_same_way(tmp_path):
    files, _ = fuzz.tokenizer(tmp_path)
    content = files[0].read_bytes()
    spoilt = [fuzz.spoil("tokenizer.json", content, fuzz.random.Random(7)) for _ in range(2)]
    assert spoilt[0] == spoilt[1] != content


def raise_two_lines(path):
    raise InputError("one line\nand another")


def raise_another_error(path):
    raise KeyError("model")


def hang(path):
    while True:
        time.sleep(1)


def refuse(path):
    raise InputError(f"{path}: not readable; fetch it again")


@pytest.mark.parametrize(
    "read, words",
    [
        (raise_two_lines, "2 lines"),
        (raise_another_error, "KeyError"),
        (hang, "Hang"),
        (refuse, "refused"),
        (str, "fine"),
    ],
)
def test_what_else_may_happen_is_told(tmp_path, monkeypatch, read, words):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    (tmp_path / "a.txt").write_text("valid")
    assert words in fuzz.try_input(tmp_path / "a.txt", b"spoilt", read)
    assert (tmp_path / "a.txt").read_text() == "valid"

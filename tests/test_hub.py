"""Downloads, against a hub on loopback: the scripts as a user runs them, with the hub's own client."""

import io
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save

from conftest import BACKBONES, GOLDEN, backbone_tensors, script
from fake_hub import FakeHub

FINEWEB = "HuggingFaceFW/fineweb-edu"
RECIPE = [
    "--steps",
    2,
    "--batch-size",
    2,
    "--accumulate",
    1,
    "--seq-len",
    16,
    "--loops",
    3,
    "--supervised",
    1,
    "--eval-every",
    1,
    "--eval-sequences",
    2,
    "--dtype",
    "float32",
]


def directory_files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def backbone_files(kind, tokenizer, as_bin=False, vocab=700):
    """A random backbone in the layout that its real repository has."""
    config = BACKBONES[kind] | {"vocab_size": vocab}
    tensors = backbone_tensors(config)
    files = {
        "config.json": json.dumps(config).encode(),
        "README.md": b"a card",
        ".gitattributes": b"*",
    } | directory_files(GOLDEN / tokenizer)
    if as_bin:
        buffer = io.BytesIO()
        torch.save(
            tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, buffer
        )
        return files | {"pytorch_model.bin": buffer.getvalue()}
    return files | {
        "model.safetensors": save(tensors),
        "pytorch_model.bin": b"not wanted" * 1000,
        "onnx/model.onnx": b"not wanted" * 1000,
    }


def loopus_files(tmp_path, backbone, tokenizer):
    """A published LoopUS checkpoint: bf16 backbone, fp32 gate and head, the block under its early name."""
    import load_weights

    for name, content in backbone.items():
        if "/" not in name:
            (tmp_path / "base").mkdir(exist_ok=True)
            (tmp_path / "base" / name).write_bytes(content)
    model, tokenizer = load_weights.load(str(tmp_path / "base"), split=(1, 1), dtype=torch.bfloat16)
    load_weights.save(model, tokenizer, tmp_path / "recast")
    tensors = {
        name.replace("reasoning.", "plateau."): x
        for name, x in load_file(tmp_path / "recast" / "model.safetensors").items()
    }
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16, torch.float32}
    return directory_files(tmp_path / "recast") | {
        "model.safetensors": save(tensors),
        "combined_model.pt": b"a pickle" * 1000,
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    import pyarrow
    import pyarrow.parquet

    found = FakeHub()
    llama = backbone_files("llama_gqa", "sentencepiece", as_bin=True)
    found.repos["models", "TinyLlama/TinyLlama_v1.1"] = llama
    found.repos["models", "Qwen/Qwen3-1.7B"] = backbone_files("qwen3", "bytelevel")
    found.repos["models", "Thrillcrazyer/Qwen3_1.7B_LoopUS"] = loopus_files(
        tmp_path_factory.mktemp("loopus"), found.repos["models", "Qwen/Qwen3-1.7B"], "bytelevel"
    )
    found.repos["models", "org/pickle"] = {
        "config.json": b"{}",
        "combined_model.pt": b"a pickle" * 1000,
    }
    found.repos["models", "org/gated"] = found.repos["models", "org/private"] = llama
    found.closed |= {"org/gated": "gated", "org/private": "private"}

    def shard(first):
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(
            pyarrow.table(
                {"text": [f"document {i} of the shard " * 3 for i in range(first, first + 12)]}
            ),
            buffer,
            row_group_size=4,
        )
        return buffer.getvalue()

    crawl = "data/CC-MAIN-2025-26/"
    found.repos["datasets", FINEWEB] = {
        "README.md": b"card",
        "data/CC-MAIN-2013-20/000_00000.parquet": shard(900),
        **{f"{crawl}{i:03d}_00000.parquet": shard(100 * i) for i in range(3)},
    }
    found.repos["datasets", "org/split"] = {
        "train-00000-of-00001.parquet": shard(1),
        "test-00000-of-00001.parquet": shard(2),
    }
    return found


@pytest.fixture
def run(hub, tmp_path):
    """Run a script against the hub, with a cache of its own."""

    def call(*args, **env):
        return script(
            *args,
            cwd=tmp_path,
            **{
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_TOKEN": "",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                **env,
            },
        )

    hub.log.clear(), hub.faults.clear()
    return call


def refused(done, *words):
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and all(word in done.stderr for word in words)
    ), done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) < 600
    return done.stderr


def test_a_backbone_is_fetched_once_and_only_what_is_needed(hub, run, tmp_path):
    first = run("load_weights.py", "Qwen/Qwen3-1.7B")
    assert (
        first.returncode == 0 and "fetching" in first.stderr and "qwen3, 5 layers" in first.stdout
    ), first.stderr
    assert (
        hub.fetched("model.safetensors") == 1
        and not hub.fetched("pytorch_model.bin")
        and not hub.fetched("model.onnx")
        and not hub.fetched("README.md")
    )
    again, offline = (
        run("load_weights.py", "Qwen/Qwen3-1.7B"),
        run("load_weights.py", "Qwen/Qwen3-1.7B", HF_HUB_OFFLINE="1"),
    )
    assert hub.fetched("model.safetensors") == 1 and "fetching" not in again.stderr + offline.stderr
    assert first.stdout == again.stdout == offline.stdout
    hub.log.clear()
    refused(
        run("load_weights.py", "TinyLlama/TinyLlama_v1.1", HF_HUB_OFFLINE="1"),
        "HF_HUB_OFFLINE is set",
    )
    assert not hub.log
    unreachable = run("load_weights.py", "Qwen/Qwen3-1.7B", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.returncode == 0 and unreachable.stdout == first.stdout


def test_a_cut_connection_goes_on_where_it_broke(hub, run):
    hub.repos["models", "org/big"] = backbone_files(
        "qwen3", "bytelevel", vocab=160000
    )  # the client writes by 10 MiB
    hub.faults["model.safetensors"] = "cut"
    done = run("load_weights.py", "org/big")
    assert done.returncode == 0, done.stderr
    assert [
        span
        for method, path, span in hub.log
        if method == "GET" and path.startswith("/cdn/") and path.endswith("model.safetensors")
    ] == [None, "bytes=10485760-"]


def test_a_damaged_file_is_found_out_and_removed(hub, run, tmp_path):
    hub.faults["model.safetensors"] = "damage"
    refused(run("load_weights.py", "Qwen/Qwen3-1.7B"), "model.safetensors arrived damaged")
    assert not [path for path in (tmp_path / "hf").rglob("model.safetensors")]
    hub.faults.clear()
    assert (
        run("load_weights.py", "Qwen/Qwen3-1.7B").returncode == 0
        and hub.fetched("model.safetensors") == 2
    )


def test_a_server_that_stalls_or_is_away_ends_in_a_line(hub, run, tmp_path):
    hub.faults["model.safetensors"] = "stall"
    refused(
        run("load_weights.py", "Qwen/Qwen3-1.7B", HF_HUB_DOWNLOAD_TIMEOUT="1"),
        "could not be used",
        "the same command goes on",
    )
    refused(
        run(
            "load_weights.py",
            "Qwen/Qwen3-1.7B",
            HF_ENDPOINT="http://127.0.0.1:9",
            HF_HOME=str(tmp_path / "empty"),
        ),
        "could not be used",
        "HF_ENDPOINT",
    )


@pytest.mark.parametrize(
    "name, words",
    [
        ("org/gated", ["gated", "HF_TOKEN"]),
        ("org/private", ["HTTP 401", "HF_TOKEN"]),
        ("org/missing", ["HTTP 404", "check the id"]),
        ("Qwen/Qwen3-1.7B@v9", ["revision"]),
        ("org/pickle", ["combined_model.pt", "safetensors"]),
        ("qwen3-4b", ["Qwen/Qwen3-4B", "HTTP 404"]),
        ("org/a/b", ["nor a hub id"]),
    ],
)
def test_what_the_hub_refuses_is_a_line_that_says_what_to_do(run, name, words):
    refused(run("sample.py", "--model", name), *words)


def test_a_revision_is_what_it_was(hub, run):
    new = hub.repos["models", "org/moving"] = dict(hub.repos["models", "Qwen/Qwen3-1.7B"])
    old = hub.old["models", "org/moving"] = new | {
        "config.json": new["config.json"].replace(
            b'"max_position_embeddings": 128', b'"max_position_embeddings": 77'
        )
    }
    for name, context in (("org/moving", 128), (f"org/moving@{hub.commit(old)}", 77)):
        done = run("load_weights.py", name)
        assert done.returncode == 0 and f"context {context}" in done.stdout, done.stderr


def test_a_wrong_token_is_named(run):
    refused(run("load_weights.py", "Qwen/Qwen3-1.7B", HF_TOKEN="hf_wrong"), "refuses HF_TOKEN")


def test_a_token_opens_a_private_repository_and_a_full_disk_is_foreseen(run, tmp_path):
    assert run("load_weights.py", "org/private", HF_TOKEN="hf_right").returncode == 0
    code = "import shutil, collections; shutil.disk_usage = lambda path: collections.namedtuple('u', 'total used free')(1, 1, 1)"
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "sitecustomize.py").write_text(code)
    refused(
        run("load_weights.py", "Qwen/Qwen3-1.7B", PYTHONPATH=str(tmp_path / "small")),
        "HF_HOME",
        "free space",
    )


def test_tinyllama_from_nothing_to_training_and_on(hub, run, tmp_path):
    """pytorch_model.bin, FineWeb-Edu by default, its shards in turn; a run that goes on fetches no shard again and ends as the one that was never stopped."""
    whole = run("train.py", "--model", "tinyllama", *RECIPE, "--steps", 16, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    assert (
        hub.fetched("pytorch_model.bin") == 1
        and hub.fetched("data/CC-MAIN-2025-26/000_00000.parquet") == 1
        and not hub.fetched("data/CC-MAIN-2013-20/000_00000.parquet")
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "step-000016")
    state = json.loads((tmp_path / "part" / "step-000015" / "trainer.json").read_text())["data"]
    hub.log.clear()
    on = run("train.py", "--model", "tinyllama", *RECIPE, "--steps", 16, "--out", "part")
    assert on.returncode == 0 and "going on from" in on.stdout and state["made"] > 0, on.stderr
    assert not any(path.startswith("/cdn/") for _, path, _ in hub.log)
    a, b = (
        load_file(tmp_path / name / "step-000016" / "model.safetensors")
        for name in ("whole", "part")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_named_data_set_and_its_training_split(hub, run):
    done = run("train.py", "--model", "tinyllama", "--data", "org/split", *RECIPE)
    assert (
        done.returncode == 0
        and hub.fetched("train-00000-of-00001.parquet") == 1
        and not hub.fetched("test-00000-of-00001.parquet")
    ), done.stderr
    refused(
        run("train.py", "--model", "tinyllama", "--data", "org/none", *RECIPE, "--out", "b"),
        "org/none",
        "HTTP 404",
    )
    refused(
        run(
            "train.py", "--model", "tinyllama", "--data", "org/split/images", *RECIPE, "--out", "b"
        ),
        "no .txt",
        "below images/",
    )
    refused(run("train.py", "--model", "org/unknown", *RECIPE), "--data is needed")


def test_shards_follow_each_other_and_only_those_needed_are_fetched(hub, run, tmp_path):
    code = f"""
import load_weights
from appendix import data
tokenizer = load_weights.load("tinyllama")[1]
files = data.shards("{FINEWEB}/data/CC-MAIN-2025-26")
two = dict([*files.items()][:2])
rows = [row for row, place in data.sequences(two, tokenizer, 16)]
place = list(data.sequences(two, tokenizer, 16))[-3][1]
assert place["file"].endswith("001_00000.parquet") and [row for row, _ in data.sequences(files, tokenizer, 16, place)][:2] == rows[-2:]
text = "".join(tokenizer.decode(row) for row in rows)
assert "document 0" in text and "document 111" in text and "document 2" in text and "document 200" not in text
"""
    (tmp_path / "check.py").write_text(code)
    done = run(
        str(tmp_path / "check.py"),
        PYTHONPATH=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )
    assert done.returncode == 0, done.stderr
    assert (
        hub.fetched("001_00000.parquet") == 1 and hub.fetched("002_00000.parquet") == 1
    )  # the last of the three was read on into
    offline = run(
        str(tmp_path / "check.py"),
        PYTHONPATH=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        HF_HUB_OFFLINE="1",
    )
    assert offline.returncode == 0, offline.stderr


def test_a_shard_that_is_not_here_is_missed_not_left_out(hub, run, tmp_path):
    """Offline after one shard: the list is that of the whole data set, so the next shard is an error, and what was trained is kept."""
    hub.repos["datasets", "org/two"] = {
        f"data/{i}.jsonl": "".join(
            json.dumps({"text": f"document {i} {j} " * 30}) + "\n" for j in range(100 + 300 * i)
        ).encode()
        for i in range(2)
    }
    hub.repos["datasets", "org/two"] |= {"other/x.txt": b"no", "LICENSE.md": b"no"}
    flags = [
        "--model",
        "tinyllama",
        "--data",
        "org/two/data",
        *RECIPE,
        "--batch-size",
        32,
        "--loops",
        1,
        "--eval-every",
        500,
    ]
    assert run("train.py", *flags, "--steps", 1, "--out", "first").returncode == 0
    assert hub.fetched("data/0.jsonl") == 1 and not hub.fetched("data/1.jsonl")
    hub.log.clear()
    refused(
        run("train.py", *flags, "--steps", 400, "--out", "second", HF_HUB_OFFLINE="1"),
        "org/two",
        "HF_HUB_OFFLINE is set",
    )
    assert not hub.log and len([*(tmp_path / "second").glob("step-*")]) == 1
    done = run("train.py", *flags, "--steps", 400, "--out", "second")
    assert (
        done.returncode == 0
        and "going on from" in done.stdout
        and hub.fetched("data/1.jsonl") == 1
        and not hub.fetched("data/0.jsonl")
        and not hub.fetched("x.txt")
    ), done.stderr


def test_a_published_loopus_checkpoint_from_nothing_to_text(hub, run):
    done = run(
        "sample.py",
        "--model",
        "qwen3-1.7b-loopus",
        "--budget",
        8,
        "--prompt",
        "the",
        "--max-new-tokens",
        5,
        "--seed",
        0,
    )
    assert (
        done.returncode == 0 and "5 tokens, mean" in done.stdout and "untrained" not in done.stderr
    ), done.stderr
    assert hub.fetched("model.safetensors") == 1 and not hub.fetched("combined_model.pt")


def test_what_does_not_fit_is_said_with_what_would(monkeypatch, capsys):
    """TinyLlama's shape beside 20 GB: what is needed by its parts, and each flag's effect, before anything is read."""
    import argparse

    from appendix import memory
    from loopus import LoopUSConfig

    args = argparse.Namespace(batch_size=4, seq_len=1024, checkpoint_activations=False, shard=False)
    for free, words in ((20e9, True), (200e9, False)):
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        memory.plan(
            args,
            LoopUSConfig(num_key_value_heads=4),
            torch.bfloat16,
            torch.device("cpu"),
            1,
            3 * 2**24,
        )
        said = capsys.readouterr().err
        needs = memory.training_needs(
            LoopUSConfig(num_key_value_heads=4), torch.bfloat16, 4096, 3 * 2**24
        )
        assert (
            f"needs about {sum(needs.values()) / 1e9:.1f} GB" in said
            and f"{free / 1e9:.1f} GB are free" in said
        )
        assert all(
            (word in said) == words
            for word in ("will not fit", "--batch-size 4", "--checkpoint-activations", "--shard")
        )
    every, frozen = memory.count(LoopUSConfig(num_key_value_heads=4))
    assert (
        needs["weights"] == 2 * every
        and needs["masters, gradients and moments"] == 16 * (every - frozen)
        and 1.0e9 < every < 1.2e9
    )


def test_the_list_of_presets():
    done = script("load_weights.py", "--list")
    names = [
        "tinyllama",
        "qwen3-1.7b",
        "qwen3-4b",
        "qwen3-8b",
        "smollm2-135m",
        "tinyllama-loopus",
        "qwen3-1.7b-loopus",
        "qwen3-1.7b-loopus-sft",
        "qwen3-4b-loopus",
        "qwen3-8b-loopus",
    ]
    assert (
        done.returncode == 0
        and set(names) <= {line.split()[0] for line in done.stdout.splitlines()}
        and "Apache-2.0" in done.stdout
        and "GB" in done.stdout
    )

"""From names to models: presets, paths, runs and downloads.

Downloads are made from a hub on loopback (fake_hub.py), by the scripts as a user runs them, with
the hub's own client.
"""

import argparse
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, GOLDEN, ROOT, backbone_tensors, flags, script, small, write_backbone
from fake_hub import FakeHub
from safetensors.torch import load_file, save

import load_weights
from appendix import memory
from appendix.hub import PRESETS, find, newest_checkpoint, readable_checkpoints
from loopus import InputError, LoopUSConfig

FINEWEB = "HuggingFaceFW/fineweb-edu"
RECIPE = flags(
    "--steps 2 --batch-size 2 --accumulate 1 --seq-len 16 --loops 3 --supervised 1 "
    "--eval-every 1 --eval-sequences 2 --dtype float32"
)


# ---- what is on the hub --------------------------------------------------------------------------


def directory_files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def backbone_files(kind, tokenizer, as_bin=False, vocab=700, shards=1):
    """A random backbone in the layout that its real repository has."""
    config = BACKBONES[kind] | {"vocab_size": vocab}
    files = directory_files(GOLDEN / tokenizer) | {
        "config.json": json.dumps(config).encode(),
        "README.md": b"a card",
        ".gitattributes": b"*",
    }
    tensors = backbone_tensors(config)
    if as_bin:
        buffer = io.BytesIO()
        inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        torch.save(tensors | inv_freq, buffer)
        return files | {"pytorch_model.bin": buffer.getvalue()}
    files |= {"pytorch_model.bin": b"not wanted" * 1000, "onnx/model.onnx": b"not wanted" * 1000}
    if shards == 1:
        return files | {"model.safetensors": save(tensors)}
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(tensors)[i::shards]
        files[file] = save({name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = json.dumps({"weight_map": weight_map}).encode()
    return files | {"model.safetensors.index.json": index}


def loopus_files(tmp_path, backbone):
    """A published LoopUS checkpoint: bf16 backbone, fp32 gate and head, the block's early name."""
    (tmp_path / "base").mkdir()
    for name, content in backbone.items():
        if "/" not in name:
            (tmp_path / "base" / name).write_bytes(content)
    model, tokenizer = load_weights.load(tmp_path / "base", split=(1, 1), dtype=torch.bfloat16)
    load_weights.save(model, tokenizer, tmp_path / "recast")
    tensors = load_file(tmp_path / "recast" / "model.safetensors")
    early = {name.replace("reasoning.", "plateau."): x for name, x in tensors.items()}
    assert {x.dtype for x in early.values()} == {torch.bfloat16, torch.float32}
    weights = {"model.safetensors": save(early), "combined_model.pt": b"a pickle" * 1000}
    return directory_files(tmp_path / "recast") | weights


def parquet(first):
    """A shard of twelve documents, numbered from `first`."""
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    texts = [f"document {i} of the shard " * 3 for i in range(first, first + 12)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer, row_group_size=4)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = FakeHub()
    llama = backbone_files("llama_gqa", "sentencepiece", as_bin=True)
    qwen = backbone_files("qwen3", "bytelevel")
    loopus = loopus_files(tmp_path_factory.mktemp("loopus"), qwen)
    models = {
        "TinyLlama/TinyLlama_v1.1": llama,
        "Qwen/Qwen3-1.7B": qwen,
        "Thrillcrazyer/Qwen3_1.7B_LoopUS": loopus,
        "org/pickle": {"config.json": b"{}", "combined_model.pt": b"a pickle" * 1000},
        "org/gated": llama,
        "org/private": llama,
    }
    for name, files in models.items():
        hub.repos["models", name] = files
    hub.closed |= {"org/gated": "gated", "org/private": "private"}

    crawl = {f"data/CC-MAIN-2025-26/{i:03d}_00000.parquet": parquet(100 * i) for i in range(3)}
    other = {"data/CC-MAIN-2013-20/000_00000.parquet": parquet(900), "README.md": b"card"}
    hub.repos["datasets", FINEWEB] = crawl | other
    hub.repos["datasets", "org/split"] = {
        "train-00000-of-00001.parquet": parquet(1),
        "test-00000-of-00001.parquet": parquet(2),
    }
    return hub


@pytest.fixture
def run(hub, tmp_path):
    """Run a script against the hub, with a cache of its own."""

    def call(*args, **env):
        own = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return script(*args, cwd=tmp_path, **own | env)

    hub.log.clear()
    hub.faults.clear()
    return call


def refused(done, *words):
    """Assert that a script ended as it does for bad input, with these words; -> what it said."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) < 600
    return done.stderr


def succeeded(done, *words):
    """Assert that a script ended well and printed these words."""
    assert done.returncode == 0, done.stderr
    for word in words:
        assert word in done.stdout


# ---- models --------------------------------------------------------------------------------------


def test_a_backbone_is_fetched_once_and_only_what_is_needed(hub, run):
    first = run("load_weights.py", "Qwen/Qwen3-1.7B")
    succeeded(first, "qwen3, 5 layers")
    assert "fetching" in first.stderr
    assert hub.fetched("model.safetensors") == 1
    for file in ("pytorch_model.bin", "model.onnx", "README.md"):
        assert not hub.fetched(file)
    # The hub id of a preset has the preset's split.
    assert "layers 2-3" in first.stdout
    assert "no split is known" not in first.stderr

    again = run("load_weights.py", "Qwen/Qwen3-1.7B")
    offline = run("load_weights.py", "Qwen/Qwen3-1.7B", HF_HUB_OFFLINE="1")
    assert hub.fetched("model.safetensors") == 1
    assert "fetching" not in again.stderr + offline.stderr
    assert first.stdout == again.stdout == offline.stdout

    hub.log.clear()
    other = run("load_weights.py", "TinyLlama/TinyLlama_v1.1", HF_HUB_OFFLINE="1")
    refused(other, "HF_HUB_OFFLINE is set")
    assert not hub.log
    unreachable = run("load_weights.py", "Qwen/Qwen3-1.7B", HF_ENDPOINT="http://127.0.0.1:9")
    succeeded(unreachable)
    assert unreachable.stdout == first.stdout


def test_a_cache_that_another_program_filled_is_used(hub, run, tmp_path):
    """As transformers leaves it, which fetches file by file: no list of what the repository has."""
    hub.repos["models", "org/sharded"] = backbone_files("llama_gqa", "bytelevel", shards=2)
    (tmp_path / "fetch.py").write_text(
        "import sys\n"
        "from huggingface_hub import hf_hub_download\n"
        "for file in sys.argv[1:]:\n"
        "    print(hf_hub_download('org/sharded', file))\n"
    )
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    small_files = ["config.json", "tokenizer.json", "model.safetensors.index.json"]
    fetched = run(str(tmp_path / "fetch.py"), *small_files, *shards)
    succeeded(fetched)
    cache = tmp_path / "hf" / "hub" / "models--org--sharded"
    assert not (cache / "trees").exists()

    offline = run("load_weights.py", "org/sharded", HF_HUB_OFFLINE="1")
    succeeded(offline, "llama, 4 layers", "continued")
    unreachable = run("load_weights.py", "org/sharded", HF_ENDPOINT="http://127.0.0.1:9")
    succeeded(unreachable)
    assert unreachable.stdout == offline.stdout

    for file in (shards[1], "tokenizer.json"):
        os.remove(fetched.stdout.splitlines()[[*small_files, *shards].index(file)])
    partly = run("load_weights.py", "org/sharded", HF_HUB_OFFLINE="1")
    refused(partly, "HF_HUB_OFFLINE is set", f"lacks tokenizer.json, {shards[1]}")


def test_a_cut_connection_goes_on_where_it_broke(hub, run):
    # The client writes by 10 MiB.
    hub.repos["models", "org/big"] = backbone_files("qwen3", "bytelevel", vocab=160000)
    hub.faults["model.safetensors"] = "cut"
    succeeded(run("load_weights.py", "org/big"))
    spans = []
    for method, path, span in hub.log:
        if method == "GET" and path.startswith("/cdn/") and path.endswith("model.safetensors"):
            spans.append(span)
    assert spans == [None, "bytes=10485760-"]


def test_a_damaged_file_is_found_out_and_removed(hub, run, tmp_path):
    hub.faults["model.safetensors"] = "damage"
    refused(run("load_weights.py", "Qwen/Qwen3-1.7B"), "model.safetensors arrived damaged")
    assert not list((tmp_path / "hf").rglob("model.safetensors"))
    hub.faults.clear()
    succeeded(run("load_weights.py", "Qwen/Qwen3-1.7B"))
    assert hub.fetched("model.safetensors") == 2


def test_a_server_that_stalls_or_is_away_ends_in_a_line(hub, run, tmp_path):
    hub.faults["model.safetensors"] = "stall"
    stalled = run("load_weights.py", "Qwen/Qwen3-1.7B", HF_HUB_DOWNLOAD_TIMEOUT="1")
    refused(stalled, "could not be used", "the same command goes on")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "empty")}
    refused(
        run("load_weights.py", "Qwen/Qwen3-1.7B", **nowhere), "could not be used", "HF_ENDPOINT"
    )


@pytest.mark.parametrize(
    "name, words",
    [
        ("org/gated", ["gated", "HF_TOKEN"]),
        ("org/private", ["HTTP 401", "HF_TOKEN"]),
        ("org/missing", ["HTTP 404", "check the id", "no such file or folder here"]),
        ("Qwen/Qwen3-1.7B@v9", ["revision"]),
        ("org/pickle", ["combined_model.pt", "safetensors"]),
        ("qwen3-4b", ["Qwen/Qwen3-4B", "HTTP 404"]),
        ("org/a/b", ["nor a hub id"]),
    ],
)
def test_what_the_hub_refuses_is_a_line_that_says_what_to_do(run, name, words):
    refused(run("sample.py", "--model", name), *words)


def test_a_revision_is_what_it_was(hub, run):
    new = dict(hub.repos["models", "Qwen/Qwen3-1.7B"])
    context = b'"max_position_embeddings": 128'
    assert context in new["config.json"]
    shorter = new["config.json"].replace(context, b'"max_position_embeddings": 77')
    old = new | {"config.json": shorter}
    hub.repos["models", "org/moving"] = new
    hub.old["models", "org/moving"] = old
    succeeded(run("load_weights.py", "org/moving"), "context 128")
    succeeded(run("load_weights.py", f"org/moving@{hub.commit(old)}"), "context 77")


def test_a_wrong_token_is_named(run):
    refused(run("load_weights.py", "Qwen/Qwen3-1.7B", HF_TOKEN="hf_wrong"), "refuses HF_TOKEN")


def test_a_token_opens_a_private_repository_and_a_full_disk_is_foreseen(run, tmp_path):
    succeeded(run("load_weights.py", "org/private", HF_TOKEN="hf_right"))
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "sitecustomize.py").write_text(
        "import collections, shutil\n"
        "usage = collections.namedtuple('usage', 'total used free')(1, 1, 1)\n"
        "shutil.disk_usage = lambda path: usage\n"
    )
    full = run("load_weights.py", "Qwen/Qwen3-1.7B", PYTHONPATH=str(tmp_path / "small"))
    refused(full, "HF_HOME", "free space")


def test_a_published_loopus_checkpoint_from_nothing_to_text(hub, run):
    options = flags("--budget 8 --prompt the --max-new-tokens 5 --seed 0")
    done = run("sample.py", "--model", "qwen3-1.7b-loopus", *options)
    succeeded(done, "5 tokens, mean")
    assert "untrained" not in done.stderr
    assert hub.fetched("model.safetensors") == 1
    assert not hub.fetched("combined_model.pt")


# ---- data ----------------------------------------------------------------------------------------


def test_tinyllama_from_nothing_to_training_and_on(hub, run, tmp_path):
    """pytorch_model.bin, and FineWeb-Edu by default, its shards in turn.

    A run that goes on fetches no shard again and ends as the one that was never stopped.
    """
    command = ["train.py", "--model", "tinyllama", *RECIPE, "--steps", 16]
    succeeded(run(*command, "--out", "whole"))
    assert hub.fetched("pytorch_model.bin") == 1
    assert hub.fetched("data/CC-MAIN-2025-26/000_00000.parquet") == 1
    assert not hub.fetched("data/CC-MAIN-2013-20/000_00000.parquet")

    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "step-000016")
    state = json.loads((tmp_path / "part" / "step-000015" / "trainer.json").read_text())["data"]
    assert state["made"] > 0
    hub.log.clear()
    succeeded(run(*command, "--out", "part"), "going on from")
    assert not any(path.startswith("/cdn/") for _, path, _ in hub.log)
    whole = load_file(tmp_path / "whole" / "step-000016" / "model.safetensors")
    part = load_file(tmp_path / "part" / "step-000016" / "model.safetensors")
    assert all(torch.equal(whole[name], part[name]) for name in whole)


def test_a_named_data_set_and_its_training_split(hub, run):
    command = ["train.py", "--model", "tinyllama", *RECIPE]
    succeeded(run(*command, "--data", "org/split"))
    assert hub.fetched("train-00000-of-00001.parquet") == 1
    assert not hub.fetched("test-00000-of-00001.parquet")
    missing = run(*command, "--data", "org/none", "--out", "b")
    refused(missing, "org/none", "HTTP 404")
    folder = run(*command, "--data", "org/split/images", "--out", "b")
    refused(folder, "no .txt", "below images/")
    refused(run("train.py", "--model", "org/unknown", *RECIPE), "--data is needed")


def test_shards_follow_each_other_and_only_those_needed_are_fetched(hub, run, tmp_path):
    (tmp_path / "check.py").write_text(f"""
import load_weights
from appendix import data

tokenizer = load_weights.load("tinyllama")[1]
files = data.shards("{FINEWEB}/data/CC-MAIN-2025-26")
two = dict([*files.items()][:2])
rows = [row for row, place in data.sequences(two, tokenizer, 16)]
place = list(data.sequences(two, tokenizer, 16))[-3][1]
assert place["file"].endswith("001_00000.parquet")
assert [row for row, _ in data.sequences(files, tokenizer, 16, place)][:2] == rows[-2:]
text = "".join(tokenizer.decode(row) for row in rows)
for words in ("document 0", "document 111", "document 2"):
    assert words in text
assert "document 200" not in text
""")
    done = run(str(tmp_path / "check.py"), PYTHONPATH=str(ROOT))
    succeeded(done)
    assert hub.fetched("001_00000.parquet") == 1
    assert hub.fetched("002_00000.parquet") == 1  # the last of the three was read on into
    succeeded(run(str(tmp_path / "check.py"), PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1"))


def test_a_shard_that_is_not_here_is_missed_not_left_out(hub, run, tmp_path):
    """Offline after one shard: the list is that of the whole data set, so the next one is missed.

    That is an error, and what was trained is kept.
    """
    files = {}
    for i, documents in enumerate((100, 400)):
        texts = [f"document {i} {j} " * 30 for j in range(documents)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        files[f"data/{i}.jsonl"] = "".join(lines).encode()
    hub.repos["datasets", "org/two"] = files | {"other/x.txt": b"no", "LICENSE.md": b"no"}
    changes = flags("--batch-size 32 --loops 1 --eval-every 500")
    command = ["train.py", "--model", "tinyllama", "--data", "org/two/data", *RECIPE, *changes]
    succeeded(run(*command, "--steps", 1, "--out", "first"))
    assert hub.fetched("data/0.jsonl") == 1
    assert not hub.fetched("data/1.jsonl")

    hub.log.clear()
    offline = run(*command, "--steps", 400, "--out", "second", HF_HUB_OFFLINE="1")
    refused(offline, "org/two", "HF_HUB_OFFLINE is set")
    assert not hub.log
    assert len(list((tmp_path / "second").glob("step-*"))) == 1

    succeeded(run(*command, "--steps", 400, "--out", "second"), "going on from")
    assert hub.fetched("data/1.jsonl") == 1
    assert not hub.fetched("data/0.jsonl")
    assert not hub.fetched("x.txt")


# ---- names that are not the hub's ----------------------------------------------------------------


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder to work in, with a backbone: models/base."""
    write_backbone(tmp_path / "models" / "base", "llama_gqa")
    (tmp_path / "corpus.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "models"


@pytest.mark.parametrize(
    "name, meant",
    [
        ("./models/bsae", "models/base"),
        ("models/base/modle.safetensors", "models/base/model.safetensors"),
        ("models\\base", "models"),
        ("tinylama", "tinyllama"),
        ("qwen3-1.7", "qwen3-1.7b"),
        ("tiny_loopus", "tiny-loopus"),
        ("corpus", "corpus.txt"),
        ("somewhere/else/entirely", None),
        ("base/model.safetensors", None),
        ("x" * 5000, None),
        ("", None),
    ],
)
def test_a_name_that_is_nothing_here_is_said_so_first(models, name, meant):
    """Such a name is no hub id, so the hub is not asked."""
    with pytest.raises(InputError) as error:
        find(name)
    words = str(error.value).removeprefix(f"--model {name}: ")
    assert words.startswith("no such file or folder here")
    assert "\n" not in words
    if meant:
        assert f"did you mean {meant}" in words


def test_a_name_like_a_hub_id_is_said_to_be_nothing_here_too(models):
    done = script("load_weights.py", "models/bsae", cwd=models.parent)
    words = refused(done, "HF_HUB_OFFLINE is set")
    assert "models/bsae: no such file or folder here (did you mean models/base?)" in words


def test_a_file_where_a_folder_is_meant(models):
    with pytest.raises(InputError, match=r"a file, where a folder .* give --model models/base$"):
        find("models/base/model.safetensors")


def test_a_folder_without_a_model_says_what_is_missing(models):
    with pytest.raises(InputError, match="--model models: no config.json in this folder"):
        find("models")


def write_run(folder, steps, kind="step"):
    """A run's folder with a whole checkpoint at each of these steps, saved in this order."""
    for step in steps:
        load_weights.save(small(dtype=torch.float32), None, folder / f"{kind}-{step:06d}")


def test_a_runs_folder_stands_for_its_newest_checkpoint(tmp_path, capsys):
    """Newest by the number of the step: 1000003 comes after 999997, though not as text."""
    run = tmp_path / "out" / "run"
    write_run(run, [1000003, 999997])
    (run / "log.jsonl").write_text("")
    (run / "step-best").mkdir()
    (run / ".step-1000004.partial").mkdir()
    (run / "step-1000005").mkdir()  # without a model in it
    assert [path.name for path in readable_checkpoints(run)] == ["step-999997", "step-1000003"]
    for _ in range(2):
        assert find(run) == (run / "step-1000003", None)
    said = capsys.readouterr().err
    assert said == f"{run}: a run's folder; its newest checkpoint is taken, step-1000003\n"
    model, _ = load_weights.load(run)
    assert model.config.from_checkpoint

    write_run(tmp_path / "out" / "control", [3], kind="control")
    assert find(tmp_path / "out" / "control")[0].name == "control-000003"


def test_the_newest_checkpoint_is_the_newest_runs_last(tmp_path):
    assert newest_checkpoint(tmp_path / "out") == "tiny-loopus"
    write_run(tmp_path / "out" / "first", [1000003, 999997])
    write_run(tmp_path / "out" / "second", [5])
    write_run(tmp_path / "out" / "control", [9], kind="control")
    write_run(tmp_path / "out" / ".half.partial", [7])
    times = {"first/step-1000003": 200, "first/step-999997": 300, "second/step-000005": 100}
    for path, time in times.items():
        os.utime(tmp_path / "out" / path, (time, time))
    assert newest_checkpoint(tmp_path / "out") == tmp_path / "out" / "first" / "step-1000003"
    os.utime(tmp_path / "out" / "second" / "step-000005", (400, 400))
    assert newest_checkpoint(tmp_path / "out") == tmp_path / "out" / "second" / "step-000005"


def test_what_a_checkpoint_says_of_its_backbone_holds_elsewhere(models):
    """A preset's name for the embedded model, and a path only for what is a path."""
    assert load_weights.load("tiny")[0].config.base_model == "tiny"
    backbone, _ = load_weights.load("models/base", split=(1, 1))
    assert Path(backbone.config.base_model) == Path("models/base")


def test_the_list_of_presets():
    done = script("load_weights.py", "--list")
    succeeded(done, "Apache-2.0", "GB")
    listed = {line.split()[0] for line in done.stdout.splitlines()}
    assert set(PRESETS) <= listed
    assert {
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
    } <= listed


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("free, fits", [(20e9, False), (200e9, True)])
def test_what_does_not_fit_is_said_with_what_would(monkeypatch, capsys, free, fits):
    """TinyLlama's shape: what its parts need, beside what is free, and what each flag would do."""
    config = LoopUSConfig(num_key_value_heads=4)
    chunk = 3 * 2**24
    args = argparse.Namespace(
        batch_size=4, seq_len=1024, checkpoint_activations=False, shard=False, horizon=1
    )
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    cpu = torch.device("cpu")
    advice = memory.announce_training(args, config, torch.bfloat16, cpu, world=1, chunk=chunk)
    said = capsys.readouterr().err
    needs = memory.training_needs(config, torch.bfloat16, 4096, chunk)
    assert f"needs about {sum(needs.values()) / 1e9:.1f} GB" in said
    assert f"{free / 1e9:.1f} GB are free" in said
    assert ("will not fit" in said) != fits
    for word in ("--batch-size 4", "--checkpoint-activations", "--shard"):
        assert (word in said) != fits
        assert word in advice

    every, frozen = memory.count(config)
    assert 1.0e9 < every < 1.2e9
    assert needs["weights"] == 2 * every
    assert needs["masters, gradients and moments"] == 16 * (every - frozen)


def test_parameters_are_counted_as_a_model_has_them():
    for changes in ({}, {"encoder_layers": 2}, {"num_hidden_layers": 9, "decoder_layers": 3}):
        model = small(**changes)
        every, frozen = memory.count(model.config)
        assert every == sum(p.numel() for p in model.parameters())
        assert frozen == sum(p.numel() for p in model.encoder.parameters())

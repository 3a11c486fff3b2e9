"""From a model's name to the local folder that holds it: presets, runs below out/, downloads.

    find("tinyllama")          a preset
    find("org/name@revision")  a model on the Hugging Face hub (without @revision: as it is now)
    find("some/folder")        a folder in Hugging Face's layout
    find("out/run")            a run of train.py: its newest checkpoint

In this order: the presets; `find` and what it makes of a name; the checkpoints of runs; the hub.
huggingface_hub does the downloading, resuming and caching. Here is what it is asked for, how what
arrives is checked, and what its errors mean.
"""

import difflib
import functools
import glob
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from appendix.errors import InputError, first_line, require
from appendix.files import sha256
from appendix.resume import checkpoints
from appendix.tensors import find_index, read_index, weight_files

EMBEDDED = Path(__file__).resolve().parent.parent / "assets"  # what comes with this repository


class Preset(NamedTuple):
    source: str | Path  # a hub id, or a folder of this repository
    split: tuple[int, int] | None  # layers of encoder and decoder, the paper's (App. A.1)
    billions: float  # of parameters as loaded, with an output head of its own
    licence: str


# A preset without a split is a LoopUS checkpoint, whose config.json says how it is split.
PRESETS = {
    "tiny": Preset(EMBEDDED / "tiny" / "base", (1, 1), 0.0002, "MIT"),
    "tiny-loopus": Preset(EMBEDDED / "tiny" / "loopus", None, 0.0002, "MIT"),
    "stories15m": Preset("nm-testing/llama2.c-stories15M", (1, 1), 0.024, "MIT"),
    "smollm2-135m": Preset("HuggingFaceTB/SmolLM2-135M", (2, 1), 0.16, "Apache-2.0"),
    "tinyllama": Preset("TinyLlama/TinyLlama_v1.1", (1, 1), 1.10, "Apache-2.0"),
    "qwen3-1.7b": Preset("Qwen/Qwen3-1.7B", (2, 1), 2.03, "Apache-2.0"),
    "qwen3-4b": Preset("Qwen/Qwen3-4B", (2, 1), 4.41, "Apache-2.0"),
    "qwen3-8b": Preset("Qwen/Qwen3-8B", (6, 1), 8.19, "Apache-2.0"),
    "phi4": Preset("microsoft/phi-4", (6, 1), 14.66, "MIT"),
    "tinyllama-loopus": Preset("Thrillcrazyer/TinyLlama_v1.1_LoopUS", None, 1.10, "see its page"),
    "qwen3-1.7b-loopus": Preset("Thrillcrazyer/Qwen3_1.7B_LoopUS", None, 2.03, "see its page"),
    "qwen3-1.7b-loopus-sft": Preset(
        "Thrillcrazyer/Qwen3_1.7B_LoopUS_SFT", None, 2.03, "see its page"
    ),
    "qwen3-4b-loopus": Preset("Thrillcrazyer/Qwen3-4B_LoopUS", None, 4.41, "see its page"),
    "qwen3-8b-loopus": Preset("Thrillcrazyer/Qwen3-8B_LoopUS", None, 8.19, "see its page"),
    "phi4-loopus": Preset("Thrillcrazyer/Phi4_LoopUS", None, 14.66, "see its page"),
}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


# ---- from a name to a folder ---------------------------------------------------------------------


def find(name, weights=True):
    """A preset, a folder, a run's folder or a hub id -> (local folder, the preset's split or None).

    weights: False brings a hub's model here without its weights, for a look at its config.json.
    Raises InputError.
    """
    name = str(name)
    source = PRESETS[name].source if name in PRESETS else name
    if source and os.path.exists(source):
        return model_folder(Path(source)), known_split(Path(source))
    repo, _, revision = source.partition("@")
    require(
        is_hub_id(repo),
        f"--model {name}: {not_here(name)}; it is neither a preset nor a hub id like org/name",
    )
    return fetch_model(name, repo, revision or "main", weights), known_split(repo)


def known_split(source):
    """The split of the preset with this folder or hub id, or None."""
    return next((preset.split for preset in PRESETS.values() if preset.source == source), None)


def public_name(name, folder):
    """What a checkpoint says its backbone is: a name for other machines too, where there is one."""
    if name in PRESETS:
        return name if EMBEDDED in folder.parents else PRESETS[name].source
    return str(folder) if os.path.isdir(name) else name


def model_folder(path):
    """The folder with the model's files: `path` itself, or a run's newest checkpoint in it."""
    require(
        path.is_dir(),
        f"--model {path}: a file, where a folder is meant; give --model {path.parent}",
    )
    if (path / "config.json").exists():
        return path
    found = readable_checkpoints(path) or readable_checkpoints(path, "control")
    require(
        found,
        f"--model {path}: no config.json in this folder, so it is no model in Hugging Face's "
        "layout, and no checkpoint of train.py, so it is no run",
    )
    say_once(f"{path}: a run's folder; its newest checkpoint is taken, {found[-1].name}")
    return found[-1]


def is_hub_id(name):
    """Is it a name like org/name, and not that of a file?"""
    is_file = name.endswith((".safetensors", ".bin", ".json", ".pt", ".gguf"))
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not is_file


def not_here(name):
    """The first words about a name that is nothing on this machine, with what may be meant."""
    path = Path(name)
    near = [str(path.parent / file) for file in listing(path.parent)]
    known = [*PRESETS, *(str(preset.source) for preset in PRESETS.values())]
    close = difflib.get_close_matches(name, near + known, n=3)
    if not close:
        return "no such file or folder here"
    return f"no such file or folder here (did you mean {' or '.join(close)}?)"


def listing(folder):
    """The names in a folder; none where it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []


@functools.cache
def say_once(line):
    """Print a line to stderr, the first time only: a model is found more than once in a run."""
    print(line, file=sys.stderr, flush=True)


# ---- checkpoints of runs -------------------------------------------------------------------------


def readable_checkpoints(run, kind="step"):
    """A run's checkpoints that can be loaded: those with a config.json. The oldest first."""
    return [path for path in checkpoints(run, kind) if (path / "config.json").is_file()]


def newest_checkpoint(root="out"):
    """The newest checkpoint of the newest run below `root`; without one, the embedded model.

    A run's newest checkpoint is the one with the highest step, and the newest run is the one whose
    newest checkpoint was written last.
    """
    newest = []
    for run in {path.parent for path in Path(root).glob("**/step-*")}:
        is_hidden = any(part.startswith(".") for part in run.relative_to(root).parts)
        if not is_hidden:
            newest += readable_checkpoints(run)[-1:]
    return max(newest, key=written, default="tiny-loopus")


def written(path):
    """When a file or folder was written, in seconds."""
    return path.stat().st_mtime


# ---- the hub -------------------------------------------------------------------------------------


@contextmanager
def hub_errors(name, first_words=""):
    """Whatever goes wrong with the hub in this block becomes one line."""
    try:
        yield
    except Exception as error:  # of the hub's client and of the libraries below it
        raise InputError(f"{name}: {first_words}{explain(error)}") from None


def explain(error):
    """What an error of the hub's client means, and what to do about it."""
    from huggingface_hub import constants, errors

    chain = [error]
    while chain[-1].__cause__:
        chain.append(chain[-1].__cause__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = first_line(chain[-1])

    def is_a(*kinds):
        return any(isinstance(link, kinds) for link in chain)

    if is_a(errors.GatedRepoError):
        return "gated: accept its terms on its page, then set HF_TOKEN to a token of your account"
    if is_a(errors.OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not hold all of it; "
            "unset it, or fetch it once where there is a network"
        )
    if status == 401 and not is_a(errors.RepositoryNotFoundError):
        return (
            f"{constants.ENDPOINT} refuses HF_TOKEN (HTTP 401); "
            "correct it, or unset it for what is public"
        )
    if is_a(errors.RepositoryNotFoundError):
        return (
            f"not found on {constants.ENDPOINT}, or private (HTTP {status}); "
            "check the id, and HF_TOKEN if it is private"
        )
    if is_a(errors.RevisionNotFoundError, errors.EntryNotFoundError) and status == 404:
        return f"no such revision or file (HTTP 404: {reason})"
    if is_a(errors.HFValidationError):
        return f"not a hub id ({reason})"
    return (
        f"{constants.ENDPOINT} could not be used ({reason}); check the network, HF_ENDPOINT and "
        "free space; whole files are kept, and the same command goes on"
    )


@functools.lru_cache
def hub_files(repo, revision, kind="model"):
    """What a repository on the hub has now; without a network, what the hub's cache knows of it.

    kind: model or dataset. -> the revision's commit, and {file name: (bytes, SHA-256 or None)}.
    """
    from huggingface_hub import resolve_revision

    is_preset = any(preset.source == repo for preset in PRESETS.values())
    first_words = "" if is_preset else f"{not_here(repo)}; on the hub: "
    with hub_errors(repo, first_words):
        commit = resolve_revision(repo, repo_type=kind, revision=revision)
    try:
        with hub_errors(repo, first_words):
            return commit, list_repository(repo, commit, kind)
    except InputError as error:
        # The cache has no list of a repository that another program fetched. Of a data set one
        # cannot tell then what is missing; of a model one can.
        snapshot = cached_snapshot(repo, commit)
        if kind != "model" or not snapshot.is_dir():
            raise
        lacking = lacking_files(snapshot)
        require(not lacking, f"{error} ({snapshot} lacks {', '.join(lacking)})")
        files = [path for path in snapshot.iterdir() if path.is_file()]
        return commit, {file.name: (file.stat().st_size, None) for file in files}


def list_repository(repo, commit, kind):
    """{file name: (bytes, SHA-256 or None)} of a commit, as the cache knows it, else the hub."""
    from huggingface_hub import HfApi, errors, get_cached_repo_tree

    try:
        tree = get_cached_repo_tree(repo, repo_type=kind, revision=commit.resolved)
    except errors.CachedRepoTreeNotFoundError:
        tree = HfApi().list_repo_tree(
            repo, recursive=True, repo_type=kind, revision=commit.resolved
        )
    files = [entry for entry in tree if hasattr(entry, "size")]  # the others are folders
    return {file.path: (file.size or 0, file.lfs and file.lfs.sha256) for file in files}


def cached_snapshot(repo, commit):
    """The folder in which the hub's cache keeps a commit of a model."""
    from huggingface_hub import constants

    folder = f"models--{repo.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / commit.resolved


def lacking_files(snapshot):
    """What a cached model lacks: config, tokenizer, or some of its weights."""
    names = [path.name for path in snapshot.iterdir() if path.exists()]
    wanted = ["config.json", "tokenizer.json"]
    try:
        index = find_index(weight_files(names, snapshot))
    except InputError:
        wanted.append("model.safetensors")
    else:
        if index:
            wanted += sorted(set(read_index(snapshot / index).values()))
    return [name for name in wanted if name not in names]


def fetch(repo, commit, files, kind="model"):
    """Bring files of a repository here; -> the local folder that they are in.

    files: some of hub_files', {name: (bytes, SHA-256 or None)}. What arrives is held against its
    SHA-256. Raises InputError.
    """
    paths = {name: cached_path(repo, commit, name, kind) for name in files}
    new = [name for name in files if paths[name] is None]
    if not new:
        name, path = next(iter(paths.items()))
        return path.parents[name.count("/")]
    announce_download(repo, {name: files[name][0] for name in new})
    # The small files together, then one large file at a time, so that a damaged one is known early.
    small = [name for name in new if not files[name][1]]
    large = [name for name in new if files[name][1]]
    if small:
        folder = download(repo, commit, small, kind)
    for name in large:
        folder = download(repo, commit, [name], kind)
        check_digest(repo, folder / name, files[name][1])
    return folder


def cached_path(repo, commit, name, kind):
    """Where the hub's cache has a file, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, repo_type=kind, revision=commit.resolved)
    return Path(found) if isinstance(found, str) else None


def announce_download(repo, sizes):
    """Say what is fetched, {name: bytes}, unless it is small. InputError where the disk is full."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    size = sum(sizes.values())
    free = shutil.disk_usage(existing).free
    if size > 1e5:
        print(
            f"{repo}: fetching {', '.join(sorted(sizes))} ({size / 1e6:.1f} MB) "
            f"from {constants.ENDPOINT} into {cache} ({free / 1e9:.0f} GB free)",
            file=sys.stderr,
            flush=True,
        )
    require(
        size < free,
        f"{cache}: {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB needed for {repo}; "
        "free space, or set HF_HOME to another disk",
    )


def download(repo, commit, names, kind):
    """Have the hub's client fetch files; -> the folder of its cache that they are in."""
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    with hub_errors(repo):
        return Path(
            snapshot_download(repo, repo_type=kind, revision=commit, allow_patterns=patterns)
        )


def check_digest(repo, path, expected):
    """Remove a file that is not what the hub says it is, with an InputError."""
    if sha256(path) == expected:
        return
    path.resolve().unlink()  # the content; `path` is a link to it
    path.unlink(missing_ok=True)
    raise InputError(
        f"{repo}: {path.name} arrived damaged (its SHA-256 is not {expected[:12]}…) "
        "and was removed; run the same command again"
    )


def fetch_model(name, repo, revision, weights):
    """A model on the hub -> the local folder that it is in. weights: as in `find`."""
    where = f"--model {name}: {repo}"
    commit, files = hub_files(repo, revision)
    require(
        "config.json" in files,
        f"{where} has no config.json, so it is no model in Hugging Face's layout",
    )
    wanted = ["config.json"]
    found = weight_files(files, where)
    if weights:
        wanted += [file for file in TOKENIZER_FILES if file in files] + found
    return fetch(repo, commit, {file: files[file] for file in wanted})

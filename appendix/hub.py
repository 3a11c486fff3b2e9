"""Presets, downloads from the hub, and which directory a model's name stands for."""

import contextlib, functools, glob, re, shutil, sys
from pathlib import Path
from appendix.errors import InputError, require
from appendix.files import sha256


EMBEDDED = Path(__file__).resolve().parent.parent / "assets"  # what comes with this repository


# name: (hub id or directory, revision, (encoder layers, decoder layers), billions of parameters, licence). The splits are the paper's (App. A.1); a
# LoopUS checkpoint knows its own. Parameters as loaded: with an output head of its own.
PRESETS = {
    "tiny": (EMBEDDED / "tiny" / "base", None, (1, 1), 0.0002, "MIT"),
    "tiny-loopus": (EMBEDDED / "tiny" / "loopus", None, None, 0.0002, "MIT"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", "main", (2, 1), 0.16, "Apache-2.0"),
    "tinyllama": ("TinyLlama/TinyLlama_v1.1", "main", (1, 1), 1.10, "Apache-2.0"),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", "main", (2, 1), 2.03, "Apache-2.0"),
    "qwen3-4b": ("Qwen/Qwen3-4B", "main", (2, 1), 4.41, "Apache-2.0"),
    "qwen3-8b": ("Qwen/Qwen3-8B", "main", (6, 1), 8.19, "Apache-2.0"),
    "tinyllama-loopus": ("Thrillcrazyer/TinyLlama_v1.1_LoopUS", "main", None, 1.10, "see its page"),
    "qwen3-1.7b-loopus": ("Thrillcrazyer/Qwen3_1.7B_LoopUS", "main", None, 2.03, "see its page"),
    "qwen3-1.7b-loopus-sft": (
        "Thrillcrazyer/Qwen3_1.7B_LoopUS_SFT",
        "main",
        None,
        2.03,
        "see its page",
    ),
    "qwen3-4b-loopus": ("Thrillcrazyer/Qwen3-4B_LoopUS", "main", None, 4.41, "see its page"),
    "qwen3-8b-loopus": ("Thrillcrazyer/Qwen3-8B_LoopUS", "main", None, 8.19, "see its page"),
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


@contextlib.contextmanager
def hub_errors(name):
    """What goes wrong with the hub, as a line that says what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except Exception as error:
        chain, status = [error], getattr(getattr(error, "response", None), "status_code", None)
        while chain[-1].__cause__:
            chain.append(chain[-1].__cause__)
        is_a = lambda *kinds: any(isinstance(e, kinds) for e in chain)
        words = (str(chain[-1]) or type(chain[-1]).__name__).splitlines()[0]
        if is_a(errors.GatedRepoError):
            words = (
                "gated: accept its terms on its page, then set HF_TOKEN to a token of your account"
            )
        elif is_a(errors.OfflineModeIsEnabled):
            words = f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not hold all of it; unset it, or fetch it once where there is a network"
        elif status == 401 and not is_a(errors.RepositoryNotFoundError):
            words = f"{constants.ENDPOINT} refuses HF_TOKEN (HTTP 401); correct it, or unset it for what is public"
        elif is_a(errors.RepositoryNotFoundError):
            words = f"not found on {constants.ENDPOINT}, or private (HTTP {status}); check the id, and HF_TOKEN if it is private"
        elif is_a(errors.RevisionNotFoundError, errors.EntryNotFoundError) and status == 404:
            words = f"no such revision or file (HTTP 404: {words})"
        elif is_a(errors.HFValidationError):
            words = f"not a hub id ({words})"
        else:
            words = f"{constants.ENDPOINT} could not be used ({words}); check the network, HF_ENDPOINT and free space; whole files are kept, and the same command goes on"
        raise InputError(f"{name}: {words}") from None


@functools.lru_cache
def hub_files(repo, revision, kind="model"):
    """What a revision of a hub repository is now, and {file name: (bytes, SHA-256 or None)} of it; without a network, as the cache knows it."""
    from huggingface_hub import HfApi, errors, get_cached_repo_tree, resolve_revision

    with hub_errors(repo):
        pinned = resolve_revision(repo, repo_type=kind, revision=revision)
        try:
            tree = get_cached_repo_tree(repo, repo_type=kind, revision=pinned.resolved)
        except errors.CachedRepoTreeNotFoundError:
            tree = HfApi().list_repo_tree(
                repo, recursive=True, repo_type=kind, revision=pinned.resolved
            )
        return pinned, {
            file.path: (file.size or 0, file.lfs and file.lfs.sha256)
            for file in tree
            if hasattr(file, "size")
        }


def fetch(repo, pinned, files, kind="model"):
    """Bring some of hub_files' {file name: (bytes, SHA-256 or None)} here -> the local directory they lie in. What arrives is held against its SHA-256."""
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    new = {
        name
        for name in files
        if not isinstance(
            try_to_load_from_cache(repo, name, repo_type=kind, revision=pinned.resolved), str
        )
    }
    cache, size = Path(constants.HF_HUB_CACHE), sum(files[name][0] for name in new)
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if size > 1e5:
        print(
            f"{repo}: fetching {', '.join(sorted(new))} ({size / 1e6:.1f} MB) from {constants.ENDPOINT} into {cache} ({free / 1e9:.0f} GB free)",
            file=sys.stderr,
            flush=True,
        )
    require(
        size < free,
        f"{cache}: {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB needed for {repo}; free space, or set HF_HOME to another disk",
    )
    large = [name for name, (_, sha) in files.items() if sha]
    for group in ([name for name in files if name not in large], *([name] for name in large)):
        if not group:
            continue
        with hub_errors(repo):
            directory = Path(
                snapshot_download(
                    repo,
                    repo_type=kind,
                    revision=pinned,
                    allow_patterns=[glob.escape(name) for name in group],
                )
            )
        for path, sha in (
            (directory / name, files[name][1]) for name in group if name in new and files[name][1]
        ):
            if sha256(path) != sha:
                path.resolve().unlink(), path.unlink(missing_ok=True)
                raise InputError(
                    f"{repo}: {path.name} arrived damaged (its SHA-256 is not {sha[:12]}…) and was removed; run the same command again"
                )
    return directory


def weight_files(names, where):
    """Which of these file names hold a model's weights: safetensors, else PyTorch's .bin. InputError where there are none."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        stem, kind = whole.split(".")
        if found := [
            name
            for name in names
            if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.{kind}(\.index\.json)?", name)
        ]:
            return found
    require(
        "combined_model.pt" not in names,
        f"{where}: holds only combined_model.pt, a pickle that can run code as it is opened; "
        "load it in the program that wrote it, and save it there as safetensors",
    )
    raise InputError(
        f"{where}: no model.safetensors (or model.safetensors.index.json with its shards) in it, and no pytorch_model.bin"
    )


def find(name, plan=lambda directory, split: None):
    """A preset, directory or hub id -> (local directory, the preset's split or None). plan(directory, split) is called once config.json is there."""
    source, revision, split, *_ = PRESETS.get(str(name), (name, None, None))
    if Path(source).is_dir():
        plan(Path(source), split)
        return Path(source), split
    source, _, asked = str(source).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise InputError(
            f"--model {name}: neither a directory nor one of {', '.join(PRESETS)} nor a hub id like org/name"
        )
    pinned, files = hub_files(source, revision or asked or "main")
    require(
        "config.json" in files,
        f"--model {name}: {source} has no config.json, so it is no model in Hugging Face's layout",
    )
    weights = weight_files(files, f"--model {name}: {source}")
    plan(fetch(source, pinned, {"config.json": files["config.json"]}), split)
    return fetch(
        source,
        pinned,
        {
            file: files[file]
            for file in (*TOKENIZER_FILES, "config.json", *weights)
            if file in files
        },
    ), split


def newest_checkpoint(root="out"):
    """The checkpoint that train.py last wrote below `root`; without one, the embedded model."""
    return max(
        Path(root).glob("**/step-*"), key=lambda path: path.stat().st_mtime, default="tiny-loopus"
    )

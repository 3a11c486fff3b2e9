"""lm-evaluation-harness: its tasks, from the network or from a folder, and what it asks of a model.

The package is optional, and this file needs it: evaluate.py imports it last. Reading order: the
tasks, then the Adapter, which is a model in the harness' eyes.
"""

import difflib
import itertools
import json
import re
import sys

import datasets
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.tasks.wikitext import preprocess_wikitext

from appendix.errors import InputError, require
from appendix.files import shorten

COMMON = ["hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "openbookqa"]
TABLES = {"table1": ["wikitext", "lambada_openai", "mmlu", *COMMON], "table2": COMMON}


# ---- tasks ---------------------------------------------------------------------------------------


def tasks_by_name(names, folder):
    """Names with commas, or a table's -> {name: what the harness takes for a task}.

    folder: of .jsonl files, the tasks' items; None: the harness' own tasks, from the network.
    """
    wanted = TABLES.get(names) or names.split(",")
    if folder is None:
        manager = TaskManager()
        known = [*manager.all_subtasks, *manager.all_groups]
        for name in wanted:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            require(name in known, f"--tasks {name}: the harness has no such task{hint}")
        return {name: name for name in wanted}

    require(folder.is_dir(), f"--local {folder}: no such folder here")
    here = [name for name in LOCAL if local_file(folder, name)]
    if names in TABLES:
        missing = [name for name in wanted if name not in here]
        wanted = [name for name in wanted if name in here]
        require(wanted, f"--local {folder}: none of the tasks of {names} is in this folder")
        if missing:
            print(f"not in {folder}, left out: {', '.join(missing)}", file=sys.stderr)
    for name in wanted:
        require(
            name in here,
            f"--tasks {name}: not in --local {folder}; these are: {', '.join(here) or 'none'}",
        )
    return {name: local_task(folder, name) for name in wanted}


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
}
# What an item holds, and how the harness is told of it. winogrande's contexts differ and its
# continuation is one, so to the harness the gold index stands in place of the text.
LOCAL = {
    "wikitext": ({"page": str}, {"output_type": "loglikelihood_rolling", "doc_to_text": ""}),
    "lambada_openai": (
        {"query": str, "target": str},
        {
            "output_type": "loglikelihood",
            "doc_to_text": "query",
            "doc_to_target": "target",
            "target_delimiter": "",
        },
    ),
    "winogrande": (
        {"contexts": list, "continuation": str, "gold": int},
        CHOICE
        | {"doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "continuation"},
    ),
    **{
        name: ({"query": str, "choices": list, "gold": int}, CHOICE)
        for name in COMMON
        if name != "winogrande"
    },
}


METRICS = {
    "wikitext": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "lambada_openai": ("perplexity", "acc"),
    "winogrande": ("acc",),
}


def local_file(folder, name):
    """The file of a task, or None. WikiText may also be the raw text it is published as."""
    found = [folder / f"{name}.jsonl"]
    if name == "wikitext":
        found += sorted(folder.glob("wikitext*raw*test*.txt"))
    return next((path for path in found if path.is_file()), None)


def local_items(path, fields):
    """The items of a file, each with these fields {name: type}."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            found = [{"page": page} for page in pages(text)]
            require(found, f'{path}: no heading like " = Name = ", with which an article begins')
            return found
        items = [json.loads(line) for line in text.splitlines() if line.strip()]
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as lines of JSON ({error})") from None
    for number, item in enumerate(items, 1):
        for name, kind in fields.items():
            found = item.get(name) if isinstance(item, dict) else None
            require(
                type(found) is kind,
                f'{path}, line {number}: expected "{name}" to be of type {kind.__name__}, found '
                f"{type(found).__name__}",
            )
        if "gold" in fields:
            check_choices(item, f"{path}, line {number}")
    require(items, f"{path}: no item in it")
    return [{name: item[name] for name in fields} for item in items]


def check_choices(item, where):
    """InputError if an item's choices are no texts, or its gold is the number of none of them."""
    choices = item["contexts"] if "contexts" in item else item["choices"]
    for choice in choices:
        require(
            isinstance(choice, str) and choice,
            f"{where}: a choice is {shorten(choice)}, expected some text",
        )
    require(
        0 <= item["gold"] < len(choices),
        f"{where}: gold is {item['gold']}, expected the number of a choice, from 0",
    )


def pages(text):
    """WikiText's articles: each begins at a heading of one equals sign, " = Name = "."""
    heading = re.compile(r"^ = [^=].*[^=] = $")
    lines = text.splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if heading.match(line.rstrip("\n"))]
    return ["".join(lines[a:b]) for a, b in itertools.pairwise([*starts, len(lines)])]


def local_task(folder, name):
    """A task of the harness on a folder's items."""
    fields, config = LOCAL[name]
    items = local_items(local_file(folder, name), fields)
    config = {
        "task": name,
        "test_split": "test",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)},
        "metric_list": [{"metric": metric} for metric in METRICS.get(name, ("acc", "acc_norm"))],
        **config,
    }
    if name == "wikitext":
        config["doc_to_target"] = preprocess_wikitext.wikitext_detokenizer
        config["process_results"] = preprocess_wikitext.process_results
    return ConfigurableTask(config=config)


# ---- the adapter ---------------------------------------------------------------------------------


class Adapter(TemplateLM):
    """A model as the harness knows it. `budget`: which of the scorer's budgets it answers for."""

    def __init__(self, scorer, tokenizer, authors_protocol, special):
        super().__init__()
        self.scorer = scorer
        self.words = tokenizer
        self.authors_protocol = authors_protocol
        self.special = special  # are texts of special tokens these tokens?
        self.budget = None
        self.loops = {}  # {arguments of a request: [the loops that it took]}
        self.longest = scorer.model.config.max_position_embeddings
        if authors_protocol:
            self.longest = min(self.longest, 1024)

    @property
    def eot_token_id(self):
        return self.words.eos_id

    @property
    def prefix_token_id(self):
        """What stands before a text that has nothing before it."""
        found = self.words.eos_id if self.words.bos_id is None else self.words.bos_id
        require(
            found is not None,
            f"{self.words.path}: names neither a first nor an end token, and one of them has to "
            "stand before a text that has nothing before it",
        )
        return found

    def tok_encode(self, string, add_special_tokens=None, **_):
        """Ids; with a first token where the tokenizer puts one and the text has none."""
        if self.authors_protocol:
            return self.words.encode(string, special=self.special)
        bos = self.words.add_bos if add_special_tokens is None else add_special_tokens
        if bos and string.startswith(self.words.decode([self.words.bos_id])):
            bos = False
        return self.words.encode(string, bos=bos, special=self.special)

    def _encode_pair(self, context, continuation):
        if self.authors_protocol:
            return self.tok_encode(context), self.tok_encode(continuation)
        return super()._encode_pair(context, continuation)

    def _loglikelihood_tokens(self, requests, **_):
        rows = []
        for (context, continuation), before, after in requests:
            require(
                0 < len(after) <= self.longest,
                f"{continuation[:40]!r} behind {context[-40:]!r}: {len(after)} tokens; the model "
                f"takes 1 to {self.longest}",
            )
            before = before or [self.prefix_token_id]  # the context was white space
            rows.append((before[-(self.longest + 1 - len(after)) :], after))
        answers = []
        for (asked, _, _), scores in zip(requests, self.scorer.score(rows), strict=True):
            found = scores[self.budget]
            self.loops.setdefault(asked, []).append(found.loops)
            answers.append((found.loglikelihood, found.greedy))
        return answers

    def loglikelihood_rolling(self, requests, **_):
        overlap = 513 if self.authors_protocol else 1  # tokens that a window sees before its own
        rows = []
        owners = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            windows = utils.get_rolling_token_windows(
                ids, self.prefix_token_id, self.longest, overlap
            )
            for window in windows:
                rows.append(utils.make_disjoint_window(window))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, scores in zip(owners, self.scorer.score(rows), strict=True):
            found = scores[self.budget]
            totals[i] += found.loglikelihood
            self.loops.setdefault(requests[i].args, []).append(found.loops)
        return totals

    def generate_until(self, requests, **_):
        return [self.continue_text(*request.args) for request in requests]

    def continue_text(self, context, asked):
        """A continuation, greedy or drawn, up to one of the stop strings that are asked."""
        wanted = normalize_gen_kwargs(asked, 256)
        stops = [stop for stop in handle_stop_sequences(wanted["until"], None) if stop]
        count = wanted["max_gen_toks"]
        require(
            count < self.longest,
            f"{count} new tokens are asked for, and the model's context is {self.longest}",
        )
        ids = self.tok_encode(context)[-(self.longest - count) :] or [self.prefix_token_id]
        options = {name: wanted.get(name) for name in ("top_k", "top_p")}
        options["temperature"] = wanted["temperature"] if wanted["do_sample"] else 0
        made = []
        loops = []
        for step in self.scorer.generate(ids, count, self.budget, self.words.eos_ids, **options):
            loops.append(step.loops.item())
            if step.tokens.item() in self.words.eos_ids:
                break
            made.append(step.tokens.item())
            text = self.words.decode(made)
            if any(stop in text for stop in stops):
                break
        self.loops.setdefault(context, []).extend(loops)
        return postprocess_generated_text(self.words.decode(made), stops, None)

    def loops_of(self, sample):
        """Mean loops of an item's requests."""
        found = []
        for arguments in map(tuple, sample["arguments"]):
            of_text = self.loops.get(arguments[0], [])  # of one that was continued
            found += of_text or self.loops.get(arguments, [])
        return sum(found) / max(len(found), 1)

"""sample.py, visualize.py and bench.py, run as a user runs them; what bad input leads to."""

import json
import shutil
import signal
import subprocess
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from conftest import command_line, environment, flags, refused, script, small, succeeded

import visualize
from load_weights import load, save
from sample import SHADES, Made, shade, summary
from train import next_tokens

PNG = b"\x89PNG\r\n\x1a\n"  # how every PNG file begins


def run_records():
    """log.jsonl of a run of three steps, as train.py writes it."""
    records = [{"step": 0, "eval": {"pretrained": 5.0, "1": 6.0, "2": 7.0, "4": 8.0, "8": 9.0}}]
    for step in (1, 2, 3):
        losses = {"loss": 9.0 - step, "lm": 8.0 - step, "mono": 0.1, "q": 0.9}
        progress = {"step": step, "tokens": 9 * step, "lr": 1e-3, "tokens_per_s": 5.0}
        by_loop = {"1": [7.5, 0.2, 0.8], str(step + 1): [7.0, 0.0, 0.7]}
        records.append(progress | losses | {"by_loop": by_loop})
    records.append({"step": 3, "eval": {"pretrained": 5.0, "1": 5.5, "2": 5.6, "4": 5.7, "8": 5.8}})
    return records


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, backbone):
    """A LoopUS checkpoint whose gate is half open, below a folder like a run's."""
    run = tmp_path_factory.mktemp("work") / "out" / "toy"
    torch.manual_seed(0)  # of the gate and the head
    model, tokenizer = load(backbone, split=(1, 1))
    save(model, tokenizer, run / "step-000003")
    lines = [json.dumps(record) + "\n" for record in run_records()]
    (run / "log.jsonl").write_text("".join(lines))
    return run / "step-000003"


# ---- sample.py -----------------------------------------------------------------------------------


def test_sample_prints_what_generate_gives(checkpoint):
    options = flags("--max-new-tokens 12 --temperature 0 --budget 3 --threshold 0.5")
    exactly = flags("--dtype float32 --device cpu")
    done = script("sample.py", "--model", checkpoint, "--prompt", "the gate", *options, *exactly)
    succeeded(done)
    assert done.stderr == ""

    model, tokenizer = load(checkpoint)
    prompt = tokenizer.encode("the gate")
    choices = {"budget": 3, "exit_threshold": 0.5, "temperature": 0, "eos_id": tokenizer.eos_id}
    steps = list(model.generate(torch.tensor([prompt]), 12, **choices))
    tokens = [step.tokens.item() for step in steps]
    loops = [step.loops.item() for step in steps]

    kept = [token for token in tokens if token != tokenizer.eos_id]
    assert done.stdout.startswith(tokenizer.decode(prompt + kept))
    assert "\x1b" not in done.stdout  # no colours where the output is no terminal
    mean = sum(loops) / len(loops)
    assert f"{len(steps)} tokens, mean {mean:.2f} of 3 loops" in done.stdout
    for n in set(loops):
        name = "loop " if n == 1 else "loops"
        assert f"{n} {name} {loops.count(n):5d} █" in done.stdout


def test_sample_takes_the_newest_checkpoint_and_compares(checkpoint, backbone):
    options = flags("--budget 8 --max-new-tokens 5 --temperature 0 --compare --dtype float32")
    done = script("sample.py", *options, cwd=checkpoint.parents[2])
    succeeded(done)

    model, tokenizer = load(backbone, split=(1, 1))
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    for _ in range(5):
        next_id = model.forward_pretrained(ids)[:, -1:].argmax(-1)
        ids = torch.cat((ids, next_id), dim=1)
    text = tokenizer.decode(ids[0].tolist())

    assert "pretrained (" in done.stdout
    assert done.stdout.rstrip("\n").endswith(text.rstrip("\n"))


def test_sample_warns_of_an_untrained_recast(backbone):
    done = script("sample.py", "--model", backbone, "--max-new-tokens", 2, "--split", "1,1")
    succeeded(done)
    assert "untrained" in done.stderr


def test_a_text_longer_than_the_context_slides(checkpoint):
    options = flags("--max-new-tokens 4 --window 20 --temperature 0 --device cpu --dtype float32")
    done = script("sample.py", "--model", checkpoint, "--prompt", "long " * 40, *options)
    succeeded(done, "mean")
    assert "attends to the last 20" in done.stderr


def heed_interrupts():
    """In a child: Ctrl-C is heard, also where the shell that started the tests ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_what_was_generated_and_prints_the_summary(checkpoint):
    options = flags("--max-new-tokens 1000000 --temperature 1 --seed 3 --halt none")
    command = command_line("sample.py", "--model", checkpoint, "--prompt", "the gate", *options)
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": heed_interrupts}
    with subprocess.Popen(command, **how, env=environment()) as running:
        first = running.stdout.read(60)  # some tokens are out
        running.send_signal(signal.SIGINT)
        rest, errors = running.communicate(timeout=60)
    assert running.returncode == 0, errors
    assert b"Traceback" not in errors
    assert first.startswith(b"the gate")
    assert b"mean 8.00 of 8 loops" in rest


def test_shading_darkens_with_the_loops_and_keeps_the_text():
    light = "\x1b[48;5;231m\x1b[38;5;16m"
    assert shade("a\nb", 1, 8) == f"{light}a\x1b[0m\n{light}b\x1b[0m"
    assert light in shade("x", 1, 1)
    for n, (back, _) in enumerate(SHADES, start=1):
        assert f"48;5;{back}m" in shade("x", n, 8)
    assert len(SHADES) == 8


def test_the_summary_of_nothing_says_so():
    assert summary(Made(), 8) == "no token was generated"


# ---- visualize.py and bench.py -------------------------------------------------------------------


def test_visualize_writes_every_figure(checkpoint, corpus, tmp_path):
    prompts = ["--prompt", "gate", "--prompt", "the state $h$"]
    source = ["--model", checkpoint, "--data", corpus]
    done = script("visualize.py", *source, *prompts, "--loops", 6, "--out", tmp_path)
    succeeded(done, "proposed", "AUC: right")
    for name in ("trajectories", "next", "profile", "confidence", "budget", "training", "loops"):
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(PNG)
        assert len(picture) > 10000
    assert len(list(tmp_path.iterdir())) == 8
    page = (tmp_path / "text.html").read_text(encoding="utf-8")
    assert page.count("the state $h$") == 1
    assert "http" not in page.replace("<!doctype html>", "")  # it needs no network


def test_what_the_figures_show():
    """The states and gates of the last token, from the model's own loops and eq. 5 solved for α."""
    model = small(1)
    ids = torch.randint(0, 50, (1, 6))
    states, alphas = visualize.follow(model, ids, 3)
    h = model.encode(ids)
    for b in range(3):
        new, _ = model.loop(h)
        proposal = model.pretrained_loop(h)
        alpha = ((new - h) / (proposal - h))[0, -1].float()
        torch.testing.assert_close(states[b], h[0, -1].float())
        torch.testing.assert_close(alphas[b], alpha, rtol=1e-3, atol=1e-4)
        h = new


def test_distances_and_principal_components_of_a_path():
    states = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    cosine, euclid = visualize.distances(states)
    similarity = torch.cosine_similarity(states[0], states[1], dim=0).item()
    distance = (states[1] - states[0]).norm().item()
    assert cosine[0].item() == pytest.approx(1 - similarity, abs=1e-6)
    assert euclid[0].item() == pytest.approx(distance, rel=1e-5)

    points, share = visualize.pca(states)
    covariance = torch.cov(states.double().T, correction=0)
    variances = torch.linalg.eigvalsh(covariance).flip(0)  # the largest first
    assert share == pytest.approx((variances[:2] / variances.sum()).tolist())
    assert points.square().mean(0).tolist() == pytest.approx(variances[:2].tolist())


def test_the_profile_and_the_losses_are_the_models():
    model = small(1)
    ids = torch.randint(0, 50, (1, 6))
    layers = visualize.layer_states(model, [ids])
    assert layers.shape == (5, 6, 32)  # before and after each of four layers
    torch.testing.assert_close(layers[1], model.encode(ids)[0].float())

    losses = visualize.loss_by_budget(model, ids, 4)
    assert set(losses) == {"pretrained", 1, 2, 4}
    loss = F.cross_entropy(model(ids, 2)[0, :-1], ids[0, 1:]).item()
    assert losses[2] == pytest.approx(loss)


class Letters:
    """A tokenizer: token i is a character, and some of them mean something in HTML."""

    eos_ids = ()

    def decode(self, ids):
        return "".join(chr(33 + i) for i in ids)  # ! " # $ % & …


def test_the_page_holds_the_text_its_loops_and_what_was_likely():
    model = small(3, dtype=torch.float32)
    model.config.exit_threshold = 0.5
    ids = torch.tensor([[3, 1, 4]])
    made = list(model.generate(ids, 20, budget=4, exit_threshold=0.5, temperature=0))
    shown = visualize.continue_for_page(model, Letters(), "<prompt>", ids, 4, 20)
    reader = Page()
    reader.feed(shown)
    assert reader.text[0] == "<prompt>"
    assert "".join(reader.text[1:]) == Letters().decode([s.tokens.item() for s in made])
    for facts, step in zip(reader.facts, made, strict=True):
        loops = step.loops.item()
        assert facts.startswith(f"{loops} loop") and f"q {step.confidence.item():.3f}" in facts
        assert len(facts.splitlines()) == 5  # and a line for each of four loops

    shares = visualize.next_shares(model, ids, 4)
    torch.testing.assert_close(shares[2], model(ids, loops=3)[0, -1].softmax(-1))
    first = reader.facts[0].splitlines()[3]  # what was likely at loop 3 behind the prompt
    best = shares[2].topk(5)
    for token, share in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        assert f"{chr(33 + token)!r} {share:.2f}" in first


class Page(HTMLParser):
    """The text of a page, apart from what the pointer shows."""

    def __init__(self):
        super().__init__()
        self.text, self.facts, self.kinds = [], [], []

    def handle_starttag(self, tag, attrs):
        self.kinds.append(dict(attrs).get("class"))

    def handle_endtag(self, tag):
        self.kinds.pop()

    def handle_data(self, data):
        (self.facts if self.kinds[-1:] == ["facts"] else self.text).append(data)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_the_page(tmp_path):
    """The pointer's facts are hidden, and what is said is seen: by the page's own layout."""
    model = small(3, dtype=torch.float32)
    text = visualize.continue_for_page(model, Letters(), "prompt", torch.tensor([[3, 1, 4]]), 4, 9)
    visualize.write_page([text], 4, tmp_path / "text.html")
    ask = (
        "<script>document.title = [...document.querySelectorAll('p .facts')].every("
        "e => getComputedStyle(e).display === 'none') && document.body.innerText.includes('prompt')"
        " ? 'as it should be' : 'not so'</script>"
    )
    page = tmp_path / "asked.html"
    page.write_text((tmp_path / "text.html").read_text(encoding="utf-8") + ask, encoding="utf-8")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>as it should be</title>" in done.stdout, done.stderr


@pytest.mark.parametrize("rule", ["confidence", "cdf", "convergence", "argmax", "kl"])
def test_where_a_token_stops_is_where_generation_stops(rule):
    """The last token of prompts, whose tokens are looped alike in generation too."""
    model = small(3, dtype=torch.float32)
    ids = torch.randint(0, 50, (20, 7), generator=torch.Generator().manual_seed(1))
    targets = torch.full_like(ids, -100)
    targets[:, -1] = 1
    facts = visualize.follow_tokens(model, [(ids, targets)], 5)
    statistic = visualize.statistics(facts)[rule]
    threshold = statistic[:-1].flatten().sort().values[30].item() + 1e-6
    given = {"confidence": -threshold, "cdf": 1 - threshold}.get(rule, threshold)
    if rule == "argmax":
        threshold = given = 0.0
    step = next(model.generate(ids, 1, budget=5, halt=rule, exit_threshold=given, temperature=0))
    stops = visualize.last_loop(statistic <= threshold) + 1
    assert stops.tolist() == step.loops.tolist()
    assert len(set(stops.tolist())) > 1


def test_what_the_head_knows():
    """The area under the curve by all pairs, bins of equal size, and the price of fixed budgets."""
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 5, (40,), generator=generator).float()
    label = torch.randint(0, 2, (40,), generator=generator).float()
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a in score[label == 1].tolist()
        for b in score[label == 0].tolist()
    ]
    assert visualize.auc(score, label) == pytest.approx(sum(pairs) / len(pairs))

    q = torch.rand(1000, generator=generator)
    right = (torch.rand(1000, generator=generator) < q).float()
    mean_q, share = visualize.calibration(q, right)
    assert mean_q.tolist() == pytest.approx([0.05 + 0.1 * i for i in range(10)], abs=0.03)
    assert (mean_q - share).abs().mean() < 0.1

    model = small(1, dtype=torch.float32)
    ids = torch.randint(0, 50, (4, 6), generator=generator)
    facts = visualize.follow_tokens(model, [(ids, next_tokens(ids))], 4)
    found = visualize.frontiers(facts)
    for b, (loops, loss) in enumerate(found["fixed"], 1):
        expected = F.cross_entropy(model(ids, b)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert (loops, loss) == (b, pytest.approx(expected.item(), rel=1e-5))
    (_, least), *_ = found["oracle"]
    for outcomes in found.values():
        assert all(1 <= n <= 4 and loss >= least for n, loss in outcomes)


@pytest.mark.parametrize(
    "change, split",
    [
        ([0.98, 0.16, 0.04, 0.03, 0.04, 0.05, 0.25], (2, 1)),
        ([0.5, 0.1, 0.1, 0.1], (1, 1)),
        ([0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.5, 0.5], (3, 2)),
        ([0.1] * 5, (1, 1)),
        ([0.9, 0.1, 0.9], (1, 1)),
    ],
)
def test_proposed_split(change, split):
    assert visualize.propose_split(torch.tensor(change)) == split


def test_bench_prints_its_table_and_visualize_draws_it(tmp_path):
    options = flags("--shape tiny --rounds 2 --contexts 4 8 --batches 1 2")
    done = script("bench.py", *options, "--out", tmp_path / "bench.json")
    succeeded(done, "of the bound", "x the line")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [row["context"] for row in found["contexts"]] == [4, 8]
    assert found["read_rate"] > 1e8
    assert found["eager 1"] > 0

    drawn = script("visualize.py", "--bench", tmp_path / "bench.json", "--out", tmp_path)
    succeeded(drawn)
    assert (tmp_path / "speed.png").read_bytes().startswith(PNG)


# ---- terminals, and no network -------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize(
    "command",
    [
        "sample.py --help",
        "sample.py --budget 4",
        "visualize.py",
        "train.py --help",
        "load_weights.py tiny",
    ],
)
def test_a_terminal_that_lacks_characters_gets_the_rest(tmp_path, command, encoding):
    """In Windows' encoding and in the plainest one; and no hub answers."""
    no_hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = script(*flags(command), cwd=tmp_path, PYTHONIOENCODING=encoding, **no_hub)
    succeeded(done)
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) > 5


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, words",
    [
        (["sample.py", "--budget", 0], "--budget"),
        (["sample.py", "--threshold", 1.5], "--threshold"),
        (["sample.py", "--top-p", 0], "--top-p"),
        (["sample.py", "--temperature", -1], "--temperature"),
        (["sample.py", "--halt", "never"], "--halt"),
        (["sample.py", "--model", "tiny-loopus", "--compare"], "--prompt"),
        (["sample.py", "--prompt", ""], "--prompt"),
        (["sample.py", "--device", "cuda:77"], "--device cuda:77"),
        (["sample.py", "--device", "abacus"], "--device abacus"),
        (["sample.py", "--split", "1"], "--split"),
        (["sample.py", "--split", "9,9"], "split"),
        (["sample.py", "--max-new-tokens", 0], "--max-new-tokens"),
        (["visualize.py", "--loops", 0], "--loops"),
        (["visualize.py", "--prompt", ""], "--prompt"),
        (["visualize.py", "--data", "none.txt"], "none.txt"),
        (["train.py", "--seq-len", 32, "--data", "none.txt"], "none.txt"),
        (["train.py", "--seq-len", 4096, "--data", "none.txt"], "--seq-len 4096"),
        (["train.py", "--loops", 3, "--supervised", 4, "--data", "x"], "--supervised"),
        (["train.py"], "--data"),
        (["train.py", "--steps", "many"], "--steps"),
        (["train.py", "--gate-init", "shut"], "--gate-init"),
    ],
)
def test_bad_flags(checkpoint, command, words, tmp_path):
    model = [] if "--model" in command else ["--model", checkpoint]
    done = script(*command, *model, cwd=tmp_path)
    refused(done, words)
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_unwritable_out(checkpoint, corpus, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    recipe = ["--data", corpus, "--seq-len", 32, "--steps", 1]
    done = script("train.py", "--model", checkpoint, *recipe, "--out", file / "run")
    refused(done, "--out")
    assert file.read_text() == "mine"

    done = script("visualize.py", "--model", checkpoint, "--loops", 2, "--out", file)
    refused(done, "--out")
    assert file.read_text() == "mine"

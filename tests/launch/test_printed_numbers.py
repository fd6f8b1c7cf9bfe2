"""Numbers that commands print, against counts made here in another way: by formula, by file size, by the tokenizer alone."""

import json
import math
import re
import shutil
import statistics
import warnings
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from data.tokenizer.tokenizer import Tokenizer
from launch.cli import app
from launch.commands.quickstart import outcome
from launch.engine import make_engine
from launch.inputs import open_data
from launch.load_config import load_config
from launch.network import build_network
from launch.summary import start_summary
from model.parallel.mesh import Mesh, make_mesh
from tests.launch.test_train import run as train
from tests.ranks import run_ranks
from trainer.monitoring.progress import format_count, format_duration

VOCABULARY, WIDTH, MLP, LAYERS, LENGTH, BATCH, STEPS = 330, 256, 512, 2, 32, 8, 4
SIZES = [f"model.hidden_size={WIDTH}", f"model.intermediate_size={MLP}", f"model.num_hidden_layers={LAYERS}"]
BLOCK = WIDTH * WIDTH * (1 + 0.5 + 0.5 + 1) + 3 * WIDTH * MLP  # two of the four heads of keys and values
PARAMETERS = int(VOCABULARY * WIDTH + LAYERS * (BLOCK + 2 * WIDTH) + WIDTH)
SCORES = {"causal": (LENGTH + 1) / 2, "full": LENGTH}
FLOPS = {how: 3 * (2 * (LAYERS * BLOCK + VOCABULARY * WIDTH) + LAYERS * 4 * seen * WIDTH) for how, seen in SCORES.items()}


def tell(*words: object) -> str:
    """What a command prints."""
    environment = {"COLUMNS": "240", "TERM": "dumb"}
    told = CliRunner().invoke(app, [str(word) for word in words], env=environment, catch_exceptions=False)
    assert told.exit_code == 0, told.output
    return told.output


def table(text: str, *heads: str, gap: str = r"[│┃]") -> list[dict[str, str]]:
    """Rows of a table by its heads: the first line that has them all, and the lines of as many columns after it."""
    lines = [[cell.strip() for cell in re.split(gap, line.strip(" │┃")) if cell.strip()] for line in text.splitlines()]
    first = next(index for index, cells in enumerate(lines) if set(heads) <= set(cells))
    return [dict(zip(lines[first], cells, strict=True)) for cells in lines[first + 1 :] if len(cells) == len(lines[first])]


def number(text: str) -> float:
    """The first number of a text, with the letter or unit behind it."""
    found = re.search(r"(-?[\d,]*\.?\d+(?:e-?\d+)?)\s?(GiB|MiB|[kMGT]B|[kMBT]\b)?", text)
    assert found, text
    units = {"GiB": 2**30, "MiB": 2**20, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    return float(found[1].replace(",", "")) * units.get(found[2] or "", 1.0)


def said(text: str, pattern: str) -> float:
    """The number behind a pattern."""
    found = re.search(pattern + r"(.*)", text)
    assert found, f"{pattern} is not in:\n{text}"
    return number(found[1])


@pytest.fixture(scope="module")
def ran(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A finished run of four steps: its directory, its configuration, what was on the screen."""
    directory = tmp_path_factory.mktemp("ran")
    path = directory / "run.toml"
    path.write_text(
        f"""
        run = {{dir = "{directory}/run", device = "cpu"}}
        model = {{vocab_size = {VOCABULARY}, hidden_size = {WIDTH}, intermediate_size = {MLP}, num_hidden_layers = {LAYERS},
            num_attention_heads = 4, num_key_value_heads = 2}}
        data = {{tokenizer = "{corpus}/tokenizer", train = "{corpus}/shards/train", validation = "{corpus}/shards/validation"}}
        optimizer = {{name = "adamw"}}
        schedule = {{warmup_steps = 2, kind = "linear", final_fraction = 0.25}}
        train = {{steps = {STEPS}, sequence_length = {LENGTH}, global_batch_size = {BATCH}, micro_batch_size = 2,
            precision = "fp32"}}
        checkpoint = {{every_steps = 3}}
        evaluate = {{tokens = 512}}
        log = {{every_steps = 1, tensorboard = false}}
        """.replace(",\n            ", ", ")
    )
    return directory / "run", str(path), train(str(path))


def records(directory: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_the_start_of_a_run(ran: tuple[Path, str, str]):
    _, _, screen = ran
    assert said(screen, "model ") == pytest.approx(PARAMETERS, rel=5e-3)
    assert f"{LAYERS} layers of {WIDTH}, GQA 4:2" in screen
    assert f"{BATCH * LENGTH} tokens = {BATCH} x {LENGTH}, 4 micro-batches per rank, adamw at 0.001" in screen
    assert "\nattention  causal on cpu: cpu_dense\n" in screen
    assert f"goal       {STEPS} steps, {STEPS * BATCH * LENGTH:,} tokens" in screen


STARTS: list[
    tuple[tuple[str, ...], float, float]
] = [  # of two ranks: options; bytes of weights, masters and states per parameter
    (("optimizer.name=adamw",), 4, 6),
    (("parallel.zero_stage=2", "train.precision=bf16"), 2, 4),
    (("parallel.zero_stage=3",), 2, 4),
    (("parallel.zero_stage=3", "train.precision=bf16", "optimizer.name=adamw"), 1, 6),
    (("parallel.engine=fold", "train.precision=bf16", "train.micro_batch_size=4"), 2, 2),
    (("parallel.engine=fold",), 4, 4),
]


def starts(rank: int, world_size: int, configuration: str) -> list[list[str]]:
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    mesh, told = make_mesh(1, torch.device("cpu")), []
    for options, *_ in STARTS:
        config = load_config(configuration, ["optimizer.name=tiger", *SIZES, "train.steps=1", *options])
        engine = make_engine(config, mesh)
        told.append(start_summary(config, mesh, engine))
        engine.close()
    return told


def test_memory_at_the_start(configuration: str):
    for told in run_ranks(starts, 2, configuration):
        for (options, weights, rest), lines in zip(STARTS, told, strict=True):
            line = next(line for line in lines if line.startswith("memory"))
            sizes = [PARAMETERS * each for each in (weights, rest, weights + rest)]
            assert [number(value) for value in re.findall(r"[\d.]+ [kM]B", line)] == pytest.approx(sizes, rel=0.006), options
            assert ("of masters" in line) == ("parallel.engine=fold" not in options)
            update = next(line for line in lines if line.startswith("update"))
            assert ("1 micro-batch per rank" if "train.micro_batch_size=4" in options else "2 micro-batches per rank") in update
            assert lines[-1].startswith(f"goal       1 step, {BATCH * LENGTH} tokens")


def test_the_first_loss_and_gradient_norm(ran: tuple[Path, str, str]):
    """The whole global batch through the initial network at once, by autograd."""
    directory, configuration, screen = ran
    config = load_config(configuration)
    model, data = build_network(config, Mesh()), open_data(config, 0, 1)
    batches = data.train.batches(0)
    inputs, targets = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("inputs_BS", "targets_BS"))
    data.close()
    logits = model(inputs)
    assert inputs.shape == (BATCH, LENGTH)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt().item()
    first = records(directory, "train")[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5) and first["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert said(screen, r"step 1/4  loss ") == pytest.approx(first["loss"], abs=5.1e-5)


def test_metrics_agree_with_each_other_and_with_the_screen(ran: tuple[Path, str, str]):
    directory, _, screen = ran
    train_records = records(directory, "train")
    assert [record["step"] for record in train_records] == [1, 2, 3, 4]
    assert [record["learning_rate"] for record in train_records] == [1e-3 * 0.5, 1e-3, 1e-3 * 0.625, 1e-3 * 0.25]
    for record in train_records:
        step, speed = record["step"], record["tokens_per_second"]
        assert record["tokens"] == step * BATCH * LENGTH
        assert speed * record["step_seconds"] == pytest.approx(BATCH * LENGTH)
        assert record["tokens_per_second_per_device"] == speed
        assert record["mfu_full"] / record["mfu"] == pytest.approx(FLOPS["full"] / FLOPS["causal"])
        assert 0 < record["mfu"] < 1 and record["memory_bytes"] > 16 * PARAMETERS
        assert sum(value for key, value in record.items() if key.endswith("_share")) == pytest.approx(1.0)
        left = (STEPS - step) * BATCH * LENGTH / speed
        line = next(line for line in screen.splitlines() if line.startswith(f"step {step}/{STEPS}"))
        assert f"loss {record['loss']:.4f}  {format_count(speed)} tokens/s  ETA {format_duration(left)}  " in line
    held_out = records(directory, "evaluate")
    assert f"step 4: validation loss {held_out[-1]['loss']:.4f} at context {LENGTH}" in screen


def test_a_resumed_run_does_not_know_the_age_of_its_checkpoint(ran: tuple[Path, str, str], tmp_path: Path):
    directory, configuration, _ = ran
    shutil.copytree(directory, tmp_path / "run")
    screen = train(configuration, f"run.dir={tmp_path}/run", "train.steps=8", "checkpoint.asynchronous=false")
    wanted = 1 - 0.75 * (5 - 2) / (8 - 2)
    assert f"the schedule's multiplier was 0.25 at update 4 and is {wanted:.4g} at update 5" in screen
    assert re.search(r"step 5/8 .* saved at step 4\n", screen) and re.search(r"step 8/8 .* saved \d+s ago\n", screen)


def test_checkpoints(ran: tuple[Path, str, str]):
    directory, *_ = ran
    rows = table(tell("checkpoint", "list", directory), "step", "tokens", "size", "files", "tensors")
    assert [row["step"] for row in rows] == ["3", "4"]
    for row in rows:
        files = sorted((directory / f"checkpoints/step-{int(row['step']):08d}").glob("*.safetensors"))
        assert int(row["tokens"].replace(",", "")) == int(row["step"]) * BATCH * LENGTH
        assert number(row["size"]) == pytest.approx(sum(file.stat().st_size for file in files), rel=5e-3)
        assert int(row["files"]) == len(files) == 1 and int(row["tensors"]) == 3 * (2 + 9 * LAYERS)
    shown = tell("checkpoint", "show", directory, "--numbers")
    assert f"step: {STEPS}\n" in shown and f"tokens: {STEPS * BATCH * LENGTH:,}\n" in shown
    stored = load_file(directory / "checkpoints/step-00000004/rank-00000.safetensors")
    held = torch.cat([value.flatten() for name, value in stored.items() if "weight/model.norm.weight" in name]).double()
    row = next(row for row in table(shown, "tensor", "shape", "mean", "rms") if row["tensor"] == "weight/model.norm.weight")
    wanted = [held.mean(), held.square().mean().sqrt(), held.min(), held.max()]
    assert [float(row[key]) for key in ("mean", "rms", "least", "greatest")] == pytest.approx(
        [float(x) for x in wanted], rel=1e-3
    )


def test_evaluate(ran: tuple[Path, str, str]):
    directory, *_ = ran
    row = table(tell("evaluate", directory, "--device", "cpu"), "context", "tokens", "loss (nats)", "perplexity")[0]
    assert int(row["context"]) == LENGTH and row["tokens"].replace(",", "") == "512"
    assert float(row["perplexity"]) == pytest.approx(math.exp(float(row["loss (nats)"])), abs=0.02)


def test_report_and_the_outcome_of_a_quickstart(ran: tuple[Path, str, str]):
    directory, *_ = ran
    tell("report", directory)
    page = (directory / "report/report.html").read_text()
    told = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", page))
    rows, loss = records(directory, "train"), records(directory, "evaluate")[-1]["loss"]
    median = {
        key: statistics.median(row[key] for row in rows) for key in ("tokens_per_second", "mfu", "mfu_full", "step_seconds")
    }
    assert f"step {STEPS} of {STEPS}: done<" in page
    assert (told["steps"], told["tokens"]) == (f"{STEPS} of {STEPS}", f"{STEPS * BATCH * LENGTH:,}")
    assert (told["first loss"], told["last loss"]) == (f"{rows[0]['loss']:.4f}", f"{rows[-1]['loss']:.4f}")
    held_out = next(value for key, value in told.items() if key.startswith("validation"))
    assert held_out.startswith(f"{loss:.4f} (perplexity {math.exp(loss):,.2f})")
    assert number(told["MFU, causal"]) == pytest.approx(100 * median["mfu"], abs=0.06)
    assert number(told["MFU, full attention"]) == pytest.approx(100 * median["mfu_full"], abs=0.06)
    assert number(told["median step"]) == pytest.approx(1000 * median["step_seconds"], abs=0.6)
    assert number(told["peak memory of rank 0"]) == pytest.approx(max(row["memory_bytes"] for row in rows), rel=0.006)
    speed = next(value for key, value in told.items() if key.startswith("tokens") and key != "tokens")
    assert speed == format_count(median["tokens_per_second"])
    first, last = rows[0]["loss"], rows[-1]["loss"]
    assert outcome(directory) == f"{STEPS} steps, training loss {first:.2f} -> {last:.2f}, validation loss {loss:.2f}"


def test_tokenizer_train_and_prepare_measure_the_same_text(tmp_path: Path, corpus: Path):
    documents = [path.read_text() for path in sorted(corpus.glob("text-*.txt"))]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    told = tell("tokenizer", "train", tmp_path / "text.jsonl", "--vocab-size", 330, "--output", tmp_path / "tokenizer")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer/tokenizer.model"))
    tokens = [len(model.encode(text)) + 1 for text in documents]
    size = sum(len(text.encode()) for text in documents)
    lines = sum(line != "" for text in documents for line in text.split("\n"))
    row = table(told, "source", "documents", "text", "bytes per token")[0]
    assert row["documents"] == "200" and number(row["text"]) == pytest.approx(size, rel=5e-3)
    assert row["bytes per token"] == f"{size / sum(tokens):.2f}"
    assert f" of {lines:,}; training" in told and "330 pieces" in told
    options = ["--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "shards", "--validation-fraction", 0.1]
    told = tell("prepare", tmp_path / "text.jsonl", *options)
    assert f"200 documents, {row['text']} of text, {size / sum(tokens):.2f} bytes per token" in told
    parts = {part: said(told, f"shards/{part}: ") for part in ("train", "validation")}
    assert sum(parts.values()) == sum(tokens) and parts["validation"] > 0
    for part, held in parts.items():
        files = list((tmp_path / "shards" / part).glob("*.arrow"))
        assert f"{held:,.0f} tokens in {len(files)} shard" in told
        audited = tell("data", "audit", tmp_path / "shards" / part)
        documents_here = said(audited, f"{part}: ")
        assert f"{held:,.0f} tokens in {len(files)} shard" in audited
        assert sum(int(row.split("tokens")[1].split()[0]) for row in re.findall(r"\d+ to .*", audited)) == documents_here
        if part == "train":
            assert said(audited, "longest ") == max(tokens)


def test_the_audit_of_a_run(ran: tuple[Path, str, str]):
    _, configuration, _ = ran
    config = load_config(configuration)
    told = tell("data", "audit", configuration, "--samples", 0, "train.steps=600")
    row = next(row for row in table(told, "corpus", "tokens", "samples read", "epochs") if row["corpus"].endswith("train"))
    tokens = _tokens(Path(str(config.data.train)), Tokenizer.load(config.data.tokenizer))
    assert int(row["tokens"].replace(",", "")) == tokens and int(row["samples read"].replace(",", "")) == 600 * BATCH
    assert float(row["epochs"]) == pytest.approx(600 * BATCH / math.ceil(tokens / LENGTH), abs=6e-4)


def _tokens(shards: Path, tokenizer: Tokenizer) -> int:
    """Tokens of the training part, from the text beside it, without what went into the validation part."""
    held = json.loads((shards / "manifest.json").read_text())
    files = sorted(shards.parents[1].glob("text-*.txt"))
    every = sum(len(tokenizer.encode(file.read_text())) + 1 for file in files)
    assert every == held["counts"]["tokens"]
    other = json.loads((shards.parent / "validation/manifest.json").read_text())
    return every - sum(shard["tokens"] for shard in other["shards"])


def test_doctor(ran: tuple[Path, str, str]):
    directory, configuration, _ = ran
    told = CliRunner().invoke(app, ["doctor", configuration]).output
    config = load_config(configuration)
    assert f"{_tokens(Path(str(config.data.train)), Tokenizer.load(config.data.tokenizer)):,} tokens in 1 shard\n" in told
    kept = next((directory / "checkpoints/step-00000004").glob("*.safetensors")).stat().st_size
    assert f"{config.checkpoint.keep + 1} checkpoints of " in told
    assert said(told, "checkpoints of ") == pytest.approx(kept, rel=0.01)
    free = shutil.disk_usage(directory).free
    assert said(told, r"ok      (?=[\d.]+ [kMGT]?B free)") == pytest.approx(free, rel=0.05)


@pytest.mark.parametrize(("precision", "peak"), [("fp32", 67e12), ("bf16", 989e12)])
def test_plan(ran: tuple[Path, str, str], precision: str, peak: float):
    _, configuration, _ = ran
    told = tell("plan", configuration, f"train.precision={precision}", "--gpus", 2, "--gpu", "h100")
    parts = table(told, "embedding", "attention", "mlp", "norms", "head", "total", gap=" ")[0]
    wanted = {
        "embedding": VOCABULARY * WIDTH,
        "attention": LAYERS * 3 * WIDTH * WIDTH,
        "mlp": LAYERS * 3 * WIDTH * MLP,
        "norms": (2 * LAYERS + 1) * WIDTH,
        "head": 0,
        "total": PARAMETERS,
    }
    assert {part: number(text) for part, text in parts.items()} == pytest.approx(wanted, rel=5e-4)
    assert said(told, r"(?=[\d.]+ GFLOP)") == pytest.approx(FLOPS["causal"] / 1e9, rel=5e-3)
    assert said(told, "causally\\), ") == pytest.approx(FLOPS["full"] / 1e9, rel=5e-3)
    assert f"{BATCH} sequences x {LENGTH} = {BATCH * LENGTH} tokens per update" in told
    assert "2 data-parallel ranks x 2 micro-batches x 2 sequences" in told
    in_all = STEPS * BATCH * LENGTH
    assert said(told, f"{STEPS} updates read ") == pytest.approx(in_all, rel=5e-4)
    assert said(told, r"tokens, (?=\S+ per parameter)") == pytest.approx(in_all / PARAMETERS, rel=5e-3)
    shards = load_config(configuration).data.train
    tokens = _tokens(Path(str(shards)), Tokenizer.load(load_config(configuration).data.tokenizer))
    assert said(told, f"{shards}: ") == pytest.approx(in_all, rel=5e-4)
    assert said(told, "tokens needed, ") == pytest.approx(tokens, rel=5e-4)
    assert said(told, "available: ") == pytest.approx(in_all / tokens, abs=6e-3)
    low = 4 if precision == "fp32" else 2
    rows = {row[""]: row for row in _memory_table(told)}
    for name, (weights, masters, states) in {
        "ZeRO-1": (low, 2, 4), "ZeRO-2": (low, 2, 4), "ZeRO-3": (low / 2, 2, 4), "fold": (low, 0, 2 * low),
    }.items():  # fmt: skip
        for key, each in (("weights", weights), ("masters", masters), ("states", states)):
            held = 0.0 if rows[name][key] == "-" else float(rows[name][key]) * 1e6
            assert held == pytest.approx(each * PARAMETERS, abs=6e3), (name, key)
    speed, mfu = said(told, r"(?=[\d,]+ tokens/s per rank)"), said(told, "MFU ") / 100
    assert mfu == pytest.approx(speed * FLOPS["causal"] / peak, rel=0.02, abs=6e-4)
    seconds = said(told, r"\ntotal\s+")
    assert speed == pytest.approx(BATCH * LENGTH / seconds / 2, rel=6e-3)
    assert said(told, r"causal, ") == pytest.approx(seconds * STEPS / 60, abs=0.06)


def _memory_table(told: str) -> list[dict[str, str]]:
    rows = [line.split() for line in told.splitlines()]
    first = next(index for index, cells in enumerate(rows) if cells[:2] == ["weights", "masters"])
    heads = ["", *rows[first]]
    return [dict(zip(heads, cells, strict=True)) for cells in rows[first + 1 : first + 6] if len(cells) == len(heads)]

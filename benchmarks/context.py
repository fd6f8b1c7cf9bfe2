"""Loss against context length for every position map, the headline of ReRoPE (Su 2023, kexue.fm/archives/9708, 9728) in small.

    python -m benchmarks.context --output docs/results

Trains a small network at 128 tokens on the Python source that comes with this Python, three seeds, and reads it at up to
16 times that with the same last tokens scored. One network is trained with RoPE, one with RoPE and log n, one with
inverse Leaky ReRoPE (evaluated with plain RoPE), two with ReRoPE itself, and one with latent attention. Results of finished
networks are kept in the work directory, so that an interrupted run resumes. What more training and a longer sequence
change:

    python -m benchmarks.context --length 256 --steps 3000 --networks log-n --seeds 0 --page context_longer
"""

import argparse
import json
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.context_page import write_page
from data.corpus.stream import NOT_SCORED, Batch
from data.tokenizer.tokenizer import Tokenizer
from data.tokenizer.train import TokenizerBudget, train_tokenizer
from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh
from model.positions.config import PositionConfig
from model.sizes import parameter_counts
from trainer.config import ScheduleConfig
from trainer.evaluate import evaluate_context
from trainer.optimizers.config import OptimizerConfig
from trainer.optimizers.fragments import Fragment, whole_fragments
from trainer.optimizers.rates import UpdateStep
from trainer.optimizers.step import Optimizer
from trainer.schedule import multiplier

VOCABULARY = 1024
WIDTH, LAYERS = 256, 4
BATCH = 16
RATE = 3e-3

ROPE = PositionConfig(kind="rope")
LOGN = PositionConfig(kind="rope", log_n="trained")


@dataclass(frozen=True)
class Trained:
    """A network to train, and the maps to read it with."""

    name: str
    attention: str
    position: PositionConfig
    readings: dict[str, PositionConfig]


def within(window: int) -> PositionConfig:
    """ReRoPE with log n; a network trained with it has met every distance there is."""
    return PositionConfig(kind="rerope", window=window, log_n="trained")


def plan(length: int) -> list[Trained]:
    """What is trained and how it is read. Frequency methods are set for 8 times the trained length, as in the posts."""
    factor, half, quarter = 8.0, length // 2, length // 4
    inverse = PositionConfig(kind="leaky-rerope", window=quarter, leak=1 / 16)
    plain = {
        "RoPE": ROPE,
        "PI": PositionConfig(kind="pi", factor=factor),
        "NTK": PositionConfig(kind="ntk", factor=factor),
        "NTK-mixed": PositionConfig(kind="ntk-mixed", factor=factor),
        "YaRN": PositionConfig(kind="yarn", factor=factor),
        f"ReRoPE w{half}": PositionConfig(kind="rerope", window=half),
        f"ReRoPE w{half}, log n when read": PositionConfig(kind="rerope", window=half, log_n="inference"),
        f"Leaky ReRoPE w{half} k16, log n when read": PositionConfig(
            kind="leaky-rerope", window=half, leak=16, log_n="inference"
        ),
    }
    trained = {
        "RoPE, log n": LOGN,
        "NTK-mixed, log n": PositionConfig(kind="ntk-mixed", factor=factor, log_n="trained"),
        f"ReRoPE w{quarter}, log n": within(quarter),
        f"ReRoPE w{half}, log n": within(half),
        f"Leaky ReRoPE w{half} k16, log n": PositionConfig(kind="leaky-rerope", window=half, leak=16, log_n="trained"),
    }
    return [
        Trained("rope", "gqa", ROPE, plain),
        Trained("log-n", "gqa", LOGN, trained),
        Trained("inverse-leaky", "gqa", inverse, {f"inverse Leaky w{quarter} k1/16, evaluated with RoPE": ROPE}),
        *(
            Trained(f"rerope-{window}", "gqa", within(window), {f"trained with ReRoPE w{window}, log n": within(window)})
            for window in (quarter, quarter // 2)
        ),
        Trained("mla", "mla", ROPE, {"MLA, RoPE": ROPE, f"MLA, ReRoPE w{half}": PositionConfig(kind="rerope", window=half)}),
    ]


def model_config(attention: str) -> ModelConfig:
    """Grouped-query and latent attention with about the same number of parameters."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 672, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "initializer_range": 0.02,
    }  # fmt: skip
    latent = {"kv_lora_rank": 64, "qk_nope_head_dim": 48, "qk_rope_head_dim": 32, "v_head_dim": 64}
    grouped = {"head_dim": 64, "num_key_value_heads": 2}
    return ModelConfig.model_validate({**sizes, "attention": attention, **(latent if attention == "mla" else grouped)})


def corpus(work: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out tokens: every tenth file is held out; test packages are left out."""
    kept = work / "tokens.npz"
    if not kept.exists():
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
        files = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
        work.mkdir(parents=True, exist_ok=True)
        words = train_tokenizer([str(p) for p in files], str(work / "tokenizer"), VOCABULARY, budget=TokenizerBudget(2_000_000))
        parts = [list(_encode(words, [f for i, f in enumerate(files) if (i % 10 == 9) == held])) for held in (False, True)]
        np.savez(kept, train=np.concatenate(parts[0]), held_out=np.concatenate(parts[1]))
    stored = np.load(kept)
    return stored["train"], stored["held_out"]


def _encode(words: Tokenizer, files: list[Path]) -> Iterator[np.ndarray]:
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        yield np.concatenate((np.array([words.end_of_text], dtype=np.int32), words.encode_array(text)))


def rows(tokens: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """Sequences of `length` tokens and their targets from given places."""
    cut = torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    return Batch(cut[:, :-1].contiguous(), cut[:, 1:].contiguous())


def train(settings: Trained, seed: int, tokens: np.ndarray, length: int, steps: int) -> tuple[Decoder, dict[str, float]]:
    """One network, trained with AdamW on float32 masters of bfloat16 weights; and its last loss and speed."""
    torch.manual_seed(seed)
    decoder = Decoder(model_config(settings.attention), settings.position, length, serial_kit())
    initialise(decoder, seed)
    masters = whole_fragments(dict(decoder.named_parameters()), Mesh())
    decoder.to(torch.bfloat16)
    for block in decoder.model.layers:
        block.compile()
    optimizer = Optimizer(OptimizerConfig(name="adamw"), masters, Mesh(), {}, partitioned=False)
    schedule = ScheduleConfig(kind="linear", warmup_steps=steps // 20, final_fraction=0.0)
    places = np.random.default_rng(seed)
    losses, begin = [], time.process_time()
    for step in range(steps):
        batch = rows(tokens, places.integers(0, len(tokens) - length - 1, BATCH), length)
        loss, count = decoder(batch.inputs_BS, batch.targets_BS)
        (loss / count).backward()
        losses.append(float(loss.detach() / count))
        move(decoder, masters, optimizer, RATE * multiplier(schedule, step, steps), step + 1)
        if step % 100 == 0:
            print(f"{settings.name} seed {seed} step {step} loss {np.mean(losses[-100:]):.3f}", flush=True)
    seconds = time.process_time() - begin
    return decoder, {"loss": float(np.mean(losses[-50:])), "tokens_per_cpu_second": steps * BATCH * length / seconds}


def move(decoder: Decoder, masters: list[Fragment], optimizer: Optimizer, rate: float, step: int) -> None:
    """One update of the masters, and of the weights from them."""
    for weight, master in zip(decoder.parameters(), masters, strict=True):
        assert weight.grad is not None
        master.gradient, weight.grad = weight.grad.float().view(-1), None
    optimizer.update(UpdateStep(step, rate))
    for weight, master in zip(decoder.parameters(), masters, strict=True):
        weight.data.copy_(master.values.view_as(weight))


def inside(tokens: np.ndarray, length: int, count: int) -> np.ndarray:
    """`count` places from which length + 1 tokens lie within one file, spread evenly over all such places."""
    marks = np.append(np.flatnonzero(tokens == tokens[0]), len(tokens))  # every file begins with the same mark
    begins, ends = marks[:-1], marks[1:] - length
    places = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True) if end > begin])
    return places[np.linspace(0, len(places) - 1, count).astype(np.int64)]


def last_scored(batch: Batch, scored: int) -> Batch:
    """The batch with its last `scored` targets of each row only."""
    batch.targets_BS[:, :-scored] = NOT_SCORED
    return batch


def measure(
    settings: Trained, decoder: Decoder, held_out: np.ndarray, contexts: list[int], count: int
) -> dict[str, list[float]]:
    """Loss at each context by each reading, of the same tokens; every sequence lies within one file."""
    ends = inside(held_out, contexts[-1], count) + contexts[-1]
    parts, scored, found = np.array_split(ends, max(1, count // 4)), contexts[0] // 2, {}
    for name, position in settings.readings.items():
        found[name] = []
        for context in contexts:
            batches = (last_scored(rows(held_out, part - context, context), scored) for part in parts)
            found[name].append(evaluate_context(decoder, batches, Mesh(), position).loss)
        print(name, [round(loss, 3) for loss in found[name]], flush=True)
    return found


def facts(settings: Trained) -> dict[str, int]:
    """Parameters, and numbers cached a token and layer."""
    config = model_config(settings.attention)
    latent = (config.kv_lora_rank or 0) + (config.qk_rope_head_dim or 0)
    cached = latent if config.attention == "mla" else 2 * config.kv_heads * config.head_size
    return {"parameters": parameter_counts(config)["total"], "cached_numbers": cached}


def main() -> None:
    """Train what is missing, read everything, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--page", default="context", help="name of the page and of its figures")
    parser.add_argument("--work", type=Path, default=Path("runs/context"), help="corpus, tokenizer and finished networks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="several processes may share them")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence in training")
    parser.add_argument("--networks", nargs="+", help="their names (default: all)")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=64, help="held-out sequences")
    options = parser.parse_args()
    known = [settings.name for settings in plan(options.length)]
    if unknown := set(options.networks or ()) - set(known):
        parser.error(f"--networks: {', '.join(sorted(unknown))}: there is no such network; choose from {', '.join(known)}")
    torch.set_num_threads(1)
    tokens, held_out = corpus(options.work)
    print(f"{len(tokens):,} training and {len(held_out):,} held-out tokens", flush=True)
    length, contexts = options.length, [options.length << doubling for doubling in range(5)]
    run = f"{length}-{options.steps}"
    for seed in options.seeds:
        for settings in (settings for settings in plan(length) if settings.name in (options.networks or settings.name)):
            kept = options.work / f"{settings.name}-{seed}-{run}.json"
            if kept.exists():
                continue
            decoder, speed = train(settings, seed, tokens, length, options.steps)
            losses = measure(settings, decoder, held_out, contexts, options.rows)
            result = {"name": settings.name, "seed": seed, "losses": losses, **speed, **facts(settings)}
            kept.write_text(json.dumps(result | {"position": settings.position.model_dump(mode="json")}))
    results = [json.loads(path.read_text()) for path in sorted(options.work.glob(f"*-{run}.json"))]
    about = {"steps": options.steps, "batch": BATCH, "tokens": len(tokens), "rows": options.rows}
    write_page(options.output, options.page, results, contexts, length, about)


if __name__ == "__main__":
    main()

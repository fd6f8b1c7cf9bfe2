"""Loss against context length for every position map: the headline of kexue 9708 and 9728 in small.

    python -m benchmarks.context --output docs/results

Trains a small network at 128 tokens on the Python source that comes with this Python, three seeds, and reads it at up to
16 times that with the same last tokens scored. One network is trained with RoPE, one with RoPE and log n, one with
inverse Leaky ReRoPE (read with plain RoPE), and with the first seed one with latent attention. Results of finished
networks are kept in the work directory, so that an interrupted run goes on.
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
from data.stream import Batch
from data.tokenizer import Tokenizer, train_tokenizer
from model.config import ModelConfig, PositionConfig
from model.decoder import Decoder, initialise
from model.flops import tensors
from model.parallel import Topology, serial
from trainer.config import OptimizerConfig, ScheduleConfig
from trainer.evaluate import evaluate_contexts
from trainer.fold import Fold
from trainer.schedule import multiplier

LENGTH = 128
CONTEXTS = [128, 256, 512, 1024, 2048]
VOCABULARY = 1024
WIDTH, LAYERS = 64, 4
BATCH = 16
RATE = 4e-2

ROPE = PositionConfig(kind="rope")
LOGN = PositionConfig(kind="rope", log_n="trained")
INVERSE = PositionConfig(kind="leaky-rerope", window=LENGTH // 4, leak=1 / 16)


@dataclass(frozen=True)
class Trained:
    """A network to train, and the maps to read it with."""

    name: str
    attention: str
    position: PositionConfig
    readings: dict[str, PositionConfig]


def plan() -> list[Trained]:
    """What is trained and how it is read. Frequency methods are set for 8 times the trained length, as in the posts."""
    factor = 8.0
    plain = {
        "RoPE": ROPE,
        "PI": PositionConfig(kind="pi", factor=factor),
        "NTK": PositionConfig(kind="ntk", factor=factor),
        "NTK-mixed": PositionConfig(kind="ntk-mixed", factor=factor),
        "YaRN": PositionConfig(kind="yarn", factor=factor),
        "ReRoPE w64": PositionConfig(kind="rerope", window=64),
        "ReRoPE w64, log n when read": PositionConfig(kind="rerope", window=64, log_n="inference"),
        "Leaky ReRoPE w64 k16, log n when read": PositionConfig(kind="leaky-rerope", window=64, leak=16, log_n="inference"),
    }
    trained = {
        "RoPE, log n": LOGN,
        "NTK-mixed, log n": PositionConfig(kind="ntk-mixed", factor=factor, log_n="trained"),
        "ReRoPE w32, log n": PositionConfig(kind="rerope", window=32, log_n="trained"),
        "ReRoPE w64, log n": PositionConfig(kind="rerope", window=64, log_n="trained"),
        "Leaky ReRoPE w64 k16, log n": PositionConfig(kind="leaky-rerope", window=64, leak=16, log_n="trained"),
    }
    return [
        Trained("rope", "gqa", ROPE, plain),
        Trained("log-n", "gqa", LOGN, trained),
        Trained("inverse-leaky", "gqa", INVERSE, {"inverse Leaky w32 k1/16, read with RoPE": ROPE}),
        Trained("mla", "mla", ROPE, {"MLA, RoPE": ROPE, "MLA, ReRoPE w64": PositionConfig(kind="rerope", window=64)}),
    ]


def model_config(attention: str) -> ModelConfig:
    """Grouped-query and latent attention with about the same number of parameters."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 176, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "initializer_range": 0.02,
    }  # fmt: skip
    latent = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    grouped = {"head_dim": 32, "num_key_value_heads": 1}
    return ModelConfig.model_validate({**sizes, "attention": attention, **(latent if attention == "mla" else grouped)})


def corpus(work: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out tokens: every tenth file is held out; test packages are left out."""
    kept = work / "tokens.npz"
    if not kept.exists():
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
        files = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
        work.mkdir(parents=True, exist_ok=True)
        words = train_tokenizer([str(p) for p in files], str(work / "tokenizer"), VOCABULARY, sample_bytes=2_000_000)
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


def train(settings: Trained, seed: int, tokens: np.ndarray, steps: int) -> tuple[Decoder, dict[str, float]]:
    """One network, trained with Tiger; and its last loss and speed."""
    torch.manual_seed(seed)
    decoder = Decoder(model_config(settings.attention), settings.position, LENGTH, serial())
    initialise(decoder, seed)
    optimizer = OptimizerConfig(name="tiger", learning_rate=RATE, max_grad_norm=0)
    engine = Fold(decoder, optimizer, Topology(), seed=seed, rms_floor=0.02, bucket_numbers=10**7)
    schedule = ScheduleConfig(kind="linear", warmup_steps=steps // 20, final_fraction=0.0)
    places = np.random.default_rng(seed)
    losses, begin = [], time.process_time()
    for step in range(steps):
        batch = rows(tokens, places.integers(0, len(tokens) - LENGTH - 1, BATCH), LENGTH)
        losses.append(float(engine.accumulate([batch])))
        engine.update(RATE * multiplier(schedule, step, steps))
        if step % 100 == 0:
            print(f"{settings.name} seed {seed} step {step} loss {np.mean(losses[-100:]):.3f}", flush=True)
    engine.close()
    seconds = time.process_time() - begin
    return decoder, {"loss": float(np.mean(losses[-50:])), "tokens_per_cpu_second": steps * BATCH * LENGTH / seconds}


def measure(settings: Trained, decoder: Decoder, held_out: np.ndarray, count: int) -> dict[str, list[float]]:
    """Loss at each context by each reading, of the same tokens."""
    longest = CONTEXTS[-1]
    starts = np.linspace(0, len(held_out) - longest - 2, count).astype(np.int64)
    batches = [[rows(held_out, part, longest)] for part in np.array_split(starts, max(1, count // 4))]
    found = {}
    for name, position in settings.readings.items():
        found[name] = [score.loss for score in evaluate_contexts(decoder, batches, CONTEXTS, Topology(), position)]
        print(name, [round(loss, 3) for loss in found[name]], flush=True)
    return found


def facts(settings: Trained) -> dict[str, int]:
    """Parameters, and numbers cached a token and layer."""
    config = model_config(settings.attention)
    latent = (config.kv_lora_rank or 0) + (config.qk_rope_head_dim or 0)
    cached = latent if config.attention == "mla" else 2 * config.kv_heads * config.head_size
    return {"parameters": sum(tensor.numbers for tensor in tensors(config)), "cached_numbers": cached}


def main() -> None:
    """Train what is missing, read everything, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/context"), help="corpus, tokenizer and finished networks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="several processes may share them")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=32, help="held-out sequences")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokens, held_out = corpus(options.work)
    print(f"{len(tokens):,} training and {len(held_out):,} held-out tokens", flush=True)
    for seed in options.seeds:
        for settings in plan():
            if settings.attention == "mla" and seed > 0:
                continue
            kept = options.work / f"{settings.name}-{seed}-{options.steps}.json"
            if kept.exists():
                continue
            decoder, speed = train(settings, seed, tokens, options.steps)
            losses = measure(settings, decoder, held_out, options.rows)
            result = {"name": settings.name, "seed": seed, "losses": losses, **speed, **facts(settings)}
            kept.write_text(json.dumps(result | {"position": settings.position.model_dump(mode="json")}))
    results = [json.loads(path.read_text()) for path in sorted(options.work.glob(f"*-{options.steps}.json"))]
    about = {"steps": options.steps, "batch": BATCH, "tokens": len(tokens), "rows": options.rows}
    write_page(options.output, results, CONTEXTS, LENGTH, about)


if __name__ == "__main__":
    main()

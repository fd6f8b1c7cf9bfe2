"""What experts cost: the layer and a small network beside transformers' own, and the optimizer's update.

    python -m benchmarks.experts [--rounds 5] [--device cpu] [--output docs/results]

Experts of a layer have the same joint width and a token passes the same width at every number of them: only how finely both
are cut changes. transformers' block is Mixtral's, whose experts run as it chooses by default (grouped_mm) or one after the
other (eager); both layers get the same weights and must give the same result before they are timed. Beside them a dense mlp of
the width that a token passes, which does the same products without a choice. Variants take turns; the least of the rounds
counts, in CPU time of one thread, and only ratios within a run mean anything. Peak memory is that of the
tensors that a forward and backward holds at once, gradients among them, weights not. The update is that of float32 masters, of
a network with the most experts and of a dense one as wide as all of them together. Writes experts.json, .md and .png.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.optimizer import best, ours
from launch.config import RunConfig
from launch.load_config import build_config
from launch.network import build_network
from model.config import ModelConfig
from model.feed_forward.moe import MixtureOfExperts
from model.feed_forward.swiglu import SwiGLU
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh
from model.sizes import parameter_counts

COUNTS = (8, 32, 128)
HIDDEN, JOINT, PASSED, ROWS, LENGTH = 256, 8192, 2048, 4, 256
"""Width of the stream, of all experts of a layer together, of those that a token passes; sequences and tokens of each."""
SIZES: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": HIDDEN, "intermediate_size": PASSED, "num_hidden_layers": 4, "num_attention_heads": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
THEIRS = {"transformers, grouped_mm": "grouped_mm", "transformers, eager": "eager"}
"""Ways in which transformers computes experts; batched_mm copies the weights of its experts for every token: gigabytes here."""
NAMES = ("dense", "tiglon", *THEIRS)
UPDATED = {"Tiger": "tiger", "AdamW": "adamw", "Muon": "muon"}


def mixture(experts: int) -> ModelConfig:
    """Mixtral's layers in our keys."""
    width = JOINT // experts
    return ModelConfig(
        **SIZES, tied_head="plain", feed_forward="moe", n_routed_experts=experts, num_experts_per_tok=PASSED // width,
        moe_intermediate_size=width, n_shared_experts=0, scoring_func="softmax", router_bias=False,
    )  # fmt: skip


def their_config(experts: int, implementation: str) -> Any:
    """The same in transformers' keys."""
    width = JOINT // experts
    keys: dict[str, Any] = SIZES | {"intermediate_size": width, "num_key_value_heads": SIZES["num_attention_heads"]}
    made = transformers.MixtralConfig(**keys, num_local_experts=experts, num_experts_per_tok=PASSED // width)
    made._experts_implementation = implementation
    return made


def layer(name: str, experts: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Forward and backward of one layer by one of NAMES, on the same tokens and weights as the others; gives its output."""
    generator = torch.Generator(device).manual_seed(0)
    h_BSD, config = torch.randn(ROWS, LENGTH, HIDDEN, generator=generator, device=device).to(dtype), mixture(experts)
    shapes = [(experts, HIDDEN), *[(experts, JOINT // experts, HIDDEN)] * 2, (experts, HIDDEN, JOINT // experts)]
    router, gate, up, down = (torch.randn(each, generator=generator, device=device) * HIDDEN**-0.5 for each in shapes)
    made: Any
    if name == "dense":
        made = SwiGLU(config, serial_kit(), PASSED)
        for parameter in made.parameters():
            parameter.data.normal_(0.0, HIDDEN**-0.5)
    elif name == "tiglon":
        made = MixtureOfExperts(config, serial_kit())
        for parameter, value in zip(made.parameters(), (router, gate, up, down), strict=True):
            parameter.data.copy_(value)
    else:
        made = MixtralSparseMoeBlock(their_config(experts, THEIRS[name])).train()
        for parameter, value in zip(made.parameters(), (router, torch.cat((gate, up), 1), down), strict=True):
            parameter.data.copy_(value)
    arguments = (h_BSD,) if name in THEIRS else (h_BSD.flatten(0, 1), ROWS)
    return partial(_pass, made.to(device, dtype), *arguments)


def _pass(made: nn.Module, h: Tensor, *arguments: Any) -> Tensor:
    h = h.detach().requires_grad_()
    y = made(h, *arguments)
    y.sum().backward()
    made.zero_grad()
    return y.detach().view(-1, HIDDEN)


def check(found: dict[str, Callable[[], Tensor]]) -> None:
    """Raises RuntimeError unless everyone with experts computes the same."""
    expected = found["tiglon"]().double()
    for name in THEIRS:
        difference = (found[name]().double() - expected).norm() / expected.norm()
        if difference > 1e-5:
            raise RuntimeError(f"{name} computes another layer: off by {difference:.1e}")


def network(name: str, experts: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Forward, loss and backward of a small network by one of NAMES."""
    ids = torch.randint(
        SIZES["vocab_size"], (ROWS, LENGTH + 1), device=device, generator=torch.Generator(device).manual_seed(0)
    )
    inputs, targets = ids[:, :-1], ids[:, 1:]
    if name in THEIRS:
        theirs: Any = transformers.MixtralForCausalLM(their_config(experts, THEIRS[name]))
        return partial(_step, theirs.to(device, dtype).train(), partial(_their_loss, theirs, inputs, targets))
    config = ModelConfig(**SIZES) if name == "dense" else mixture(experts)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    model = build_network(_configuration(config, precision), Mesh(device=device))
    return partial(_step, model, lambda: model(inputs, targets)[0] / targets.numel())


def _configuration(model: ModelConfig, precision: str = "fp32") -> RunConfig:
    return build_config({"model": model.model_dump(), "train": {"sequence_length": LENGTH, "precision": precision}})


def _their_loss(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs, use_cache=False).logits.flatten(0, 1).float(), targets.flatten())


def _step(model: nn.Module, loss_of: Callable[[], Tensor]) -> Tensor:
    loss = loss_of()
    loss.backward()
    model.zero_grad()
    return loss.detach()


def peak(run: Callable[[], Any]) -> float:
    """Megabytes of tensors that one run holds at most, beyond those before it, by what torch's allocator is asked for: the same
    in every run, libraries left out."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    held = most = 0
    for event in events:
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most / 1e6


def updates(device: torch.device) -> tuple[dict[str, dict[str, Callable[[], Any]]], dict[str, float]]:
    """The update, by optimizer, of a dense network and of one with the most experts; parameters in millions and matrices."""
    mesh, most = Mesh(device=device), max(COUNTS)
    wide: dict[str, Any] = SIZES | {"intermediate_size": JOINT}
    configs = {"dense": ModelConfig(**wide), "experts": mixture(most)}
    models = {kind: build_network(_configuration(config), mesh) for kind, config in configs.items()}
    found = {title: {kind: ours(name, model, mesh) for kind, model in models.items()} for title, name in UPDATED.items()}
    sizes = {f"{kind}, millions": parameter_counts(config)["total"] / 1e6 for kind, config in configs.items()}
    return found, sizes | {"matrices": 3 * most * SIZES["num_hidden_layers"]}


MEASURED = (
    ("One layer, float32", layer, torch.float32), ("One layer, bfloat16", layer, torch.bfloat16),
    ("A network of four layers, bfloat16", network, torch.bfloat16),
)  # fmt: skip


def table(rows: list[dict[str, Any]], unit: str) -> list[str]:
    """A line for each number of experts; ratios are transformers' over ours."""
    names = list(rows[0]["found"])
    ratios = [f"{name.removeprefix('transformers, ')} over tiglon" for name in names if name.startswith("transformers")]
    lines = [f"| experts, of each token | {' | '.join(f'{name}, {unit}' for name in names)} | {' | '.join(ratios)} |"]
    lines.append("|---|" + "---:|" * (len(names) + len(ratios)))
    for row in rows:
        found = row["found"]
        cells = [f"{found[name]:,.0f}" for name in names]
        cells += [f"**{found[name] / found['tiglon']:.2f}**" for name in names if name.startswith("transformers")]
        lines.append(f"| {row['experts']}, {PASSED * row['experts'] // JOINT} | {' | '.join(cells)} |")
    return lines


def draw(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Time over that without experts, by their number."""
    timed = {title: rows for title, rows in tables.items() if "memory" not in title}
    figure, axes = plt.subplots(1, len(timed), figsize=(4.2 * len(timed), 3.4), squeeze=False)
    for axis, (title, rows) in zip(axes[0], timed.items(), strict=True):
        for name in rows[0]["found"]:
            values = [row["found"][name] / row["found"]["dense"] for row in rows]
            axis.plot([row["experts"] for row in rows], values, "o-", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["experts"] for row in rows], labels=[str(row["experts"]) for row in rows])
        axis.set_ylim(bottom=0)
        axis.set(title=title.partition(":")[0], xlabel="experts in a layer", ylabel="time, of the dense one's")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


PAGE = """# What experts cost

{about}

![time by number of experts](experts.png)

{tables}

## The optimizer's update

A network of {parameters:.1f} million parameters, {matrices:,} of whose matrices are experts', against a dense one of
{dense:.1f} million; masters in float32. Every expert's matrix is one of its own to the optimizer: its rate follows its own RMS
(Tiger), its direction its own singular vectors (Muon). The last column is the difference divided by their number.

| | dense, ms | experts, ms | experts over dense | microseconds for each expert's matrix |
|---|---:|---:|---:|---:|
{updates}
"""


def page(record: dict[str, Any]) -> str:
    """experts.md from what experts.json holds."""
    parts, sizes = [], record["sizes"]
    for title, rows in record["tables"].items():
        parts += [f"## {title}", "", *table(rows, "MB" if "memory" in title else "ms"), ""]
    lines = []
    for name, ms in record["updates"].items():
        each = f"{1e3 * (ms['experts'] - ms['dense']) / sizes['matrices']:+,.0f}"
        lines.append(f"| {name} | {ms['dense']:,.0f} | {ms['experts']:,.0f} | **{ms['experts'] / ms['dense']:.2f}** | {each} |")
    return PAGE.format(
        about=record["about"], tables="\n".join(parts).rstrip(), matrices=sizes["matrices"], dense=sizes["dense, millions"],
        parameters=sizes["experts, millions"], updates="\n".join(lines),
    )  # fmt: skip


def write(record: dict[str, Any], output: Path) -> None:
    """experts.json, experts.md and experts.png."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "experts.json").write_text(json.dumps(record, indent=1) + "\n")
    (output / "experts.md").write_text(page(record))
    draw(record["tables"], output / "experts.png")


def measure(counts: list[int], rounds: int, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """A table of times, and on a CPU one of memory, for each of MEASURED."""
    timed, held = dict[str, list[dict[str, Any]]](), dict[str, list[dict[str, Any]]]()
    for title, make, dtype in MEASURED:
        for experts in counts:
            variants = {name: make(name, experts, device, dtype) for name in NAMES}
            if make is layer and dtype == torch.float32:
                check(variants)
            found = best(variants, rounds, device)
            timed.setdefault(f"{title}: forward and backward", []).append({"experts": experts, "found": found})
            if device.type == "cpu":
                peaks = {name: peak(run) for name, run in variants.items()}
                held.setdefault(f"{title}: peak memory", []).append({"experts": experts, "found": peaks})
            print(title, experts, found, flush=True)
    return timed | held


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(given.device)
    tables = measure(given.counts, given.rounds, device)
    variants, sizes = updates(device)
    updated = {name: best(each, given.rounds, device) for name, each in variants.items()}
    print(updated, flush=True)
    where = "one CPU thread, CPU time" if device.type == "cpu" else torch.cuda.get_device_name(device)
    about = (
        f"`python -m benchmarks.experts --rounds {given.rounds}`: a stream of {HIDDEN}, experts of a joint width of {JOINT:,}, "
        f"of which a token passes {PASSED:,}, {ROWS * LENGTH:,} tokens; {where}; the least of {given.rounds} rounds; "
        f"transformers {transformers.__version__}, torch {torch.__version__}."
    )
    write({"about": about, "tables": tables, "sizes": sizes, "updates": updated}, given.output)


if __name__ == "__main__":
    main()

"""The Python interface of tiglon: read a trained network, use it, train one.

    import tiglon

    model = tiglon.load("runs/quickstart")
    model.logits([[1, 2, 3]])
    model.generate("def ", tokens=50)
    tiglon.train("quickstart", ["train.steps=10"])

What `__all__` lists is public and documented in docs/python.md: it changes only with a line in CHANGELOG.md. Everything else in
the packages `data`, `launch`, `model` and `trainer` may change at any time.

Importing this takes milliseconds; torch is imported by the first call. Errors that a user can fix are ValueError or
FileNotFoundError, one sentence each.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.tokenizer.tokenizer import Tokenizer
    from launch.config import RunConfig
    from launch.trained import Trained
    from model.positions.config import PositionConfig
    from trainer.evaluate import Score
    from trainer.session import RunEnded

__all__ = [
    "Model",
    "PositionConfig",
    "RunConfig",
    "RunEnded",
    "Score",
    "Tokenizer",
    "TrainingResult",
    "__version__",
    "load",
    "train",
]

__version__: Final = version("tiglon")

_DEFINED_IN = {
    "PositionConfig": "model.positions.config",
    "RunConfig": "launch.config",
    "RunEnded": "trainer.session",
    "Score": "trainer.evaluate",
    "Tokenizer": "data.tokenizer.tokenizer",
}
"""Public names of modules that import torch: they are imported when they are asked for."""


def __getattr__(name: str) -> Any:
    if name in _DEFINED_IN:
        return getattr(importlib.import_module(_DEFINED_IN[name]), name)
    raise AttributeError(f"module 'tiglon' has no attribute '{name}'")


def _import_launch() -> None:
    """Import our `launch`, which then looks whether `data`, `model` and `trainer` are ours too.

    Raises:
        ImportError: a file of the user's has the name of one of them.
    """
    loaded, root = sys.modules.get("launch"), Path(__file__).resolve().parent
    spec = loaded.__spec__ if loaded is not None else PathFinder.find_spec("launch")
    if spec is not None and spec.origin is None:  # a folder without Python, which a package at the end comes before
        sys.path.append(str(root))
    elif spec is not None and Path(str(spec.origin)).resolve() != root / "launch/__init__.py":
        raise ImportError(f"tiglon needs its package 'launch', but {spec.origin} comes first on sys.path; rename it")
    importlib.import_module("launch")


_import_launch()


class Model:
    """A trained network on one device. Nothing here computes gradients; `load` makes it.

    Attributes:
        path: the checkpoint it was read from.
        step: optimizer updates that made it.
        config: the configuration of its run.
        position: the position map that it is evaluated with.
    """

    def __init__(self, trained: Trained, position: PositionConfig) -> None:
        self._trained = trained
        self._tokenizer: Tokenizer | None = None
        self.path: Final = trained.path
        self.step: Final = trained.step
        self.config: Final = trained.config
        self.position: Final = position

    def __repr__(self) -> str:
        return f"<tiglon.Model {self.path}, position {self.position.kind}, {self.device}>"

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._trained.decoder.device

    @property
    def tokenizer(self) -> Tokenizer:
        """That of its run, with `encode(text)`, `decode(ids)`, `vocab_size` and `end_of_text`.

        Raises:
            FileNotFoundError, ValueError: the checkpoint names none, or it is no longer there.
        """
        if self._tokenizer is None:
            from launch.trained import open_tokenizer

            self._tokenizer = open_tokenizer(self._trained)
        return self._tokenizer

    def with_position(self, position: PositionConfig | Mapping[str, Any] | str) -> Model:
        """The same weights, which are shared, evaluated with another position map, given as for `load`."""
        from launch.trained import evaluation_position

        other = Model(self._trained, evaluation_position(self._trained, position))
        other._tokenizer = self._tokenizer
        return other

    def logits(self, ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Scores of the next token after each token.

        Args:
            ids: token ids [B, S].

        Returns:
            float32 [B, S, V] on the model's device; V is model.vocab_size, which may exceed the tokenizer's.

        Raises:
            ValueError: `ids` are not rows of equal length of ids below V.
        """
        import torch

        with torch.no_grad():
            return self._trained.decoder(self._ids(ids), position=self.position).float()

    def loss(self, ids: Tensor | Sequence[Sequence[int]]) -> float:
        """Mean of -log p over the B * (S - 1) tokens that follow another, in nats per target token.

        Args:
            ids: token ids [B, S], S at least 2. The logits of all tokens never exist at once.

        Raises:
            ValueError: as `logits`, or there is nothing to predict.
        """
        import torch

        ids_BS = self._ids(ids)
        if ids_BS.shape[1] < 2:
            raise ValueError("loss: rows of 1 token leave nothing to predict; give at least 2 tokens per row")
        with torch.no_grad():
            total, count = self._trained.decoder(ids_BS[:, :-1], ids_BS[:, 1:], position=self.position)
        return float(total / count)

    @overload
    def generate(
        self, prompt: str, tokens: int = 0, *, temperature: float = ..., top_k: int = ..., top_p: float = ..., seed: int = ...
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: Sequence[int],
        tokens: int = 0,
        *,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int = ...,
    ) -> list[int]: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        tokens: int = 0,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> str | list[int]:
        """What follows a prompt, without the prompt and without the token that may end it.

        Args:
            prompt: text, which begins a document, or token ids, which are taken as they are.
            tokens: to add at most; 0 = up to 200, within the context that the position map can use.
            temperature: divides the logits; 0 = greedy.
            top_k: only the k most likely tokens; 0 = all.
            top_p: only the most likely tokens up to this total probability.
            seed: of the sampling; the same seed gives the same tokens.

        Returns:
            Text for text, ids for ids.

        Raises:
            ValueError: a value out of its range, or a text longer than the position map can use.
            FileNotFoundError: the prompt is text, and there is no tokenizer.
        """
        from launch.trained import end_tokens, new_tokens
        from model.generate import Sampling, generate

        ids = self.tokenizer.prompt(prompt) if isinstance(prompt, str) else [int(token) for token in self._ids([prompt])[0]]
        tokenizer = self._tokenizer_if_any()
        never, pieces = (tokenizer.unused_ids(), tokenizer.vocab_size) if tokenizer else ((), None)
        sampling, ends = Sampling(temperature, top_k, top_p, seed, never), end_tokens(self._trained, tokenizer)
        count = new_tokens(self.config, self.position, len(ids), tokens)
        steps = generate(self._trained.decoder, [ids], count, sampling, ends, self.position, pieces)
        sampled = [token for (token,) in steps if token is not None and token not in ends]
        return self.tokenizer.continuation(ids, sampled) if isinstance(prompt, str) else sampled

    def _tokenizer_if_any(self) -> Tokenizer | None:
        try:
            return self.tokenizer
        except (FileNotFoundError, ValueError):
            return None

    def evaluate(
        self, contexts: Sequence[int] = (), *, data: str = "", tokens: int | None = None, chunk_tokens: int | None = None
    ) -> list[Score]:
        """Held-out loss, as `tiglon evaluate` measures it.

        Args:
            contexts: lengths in tokens; each is measured on the same tokens. Default the trained one.
            data: prepared shards; "" = data.validation of the run.
            tokens: scored at most; 0 = all; None = evaluate.tokens of the run.
            chunk_tokens: rows of longer contexts pass through the network in chunks of so many tokens; 0 = whole; None =
                evaluate.chunk_tokens of the run.

        Returns:
            One score per context, ascending: `loss` (nats per token), `standard_error`, `tokens`, `context`.

        Raises:
            ValueError, FileNotFoundError: there is no such text, or it is too short for a context.
        """
        from launch import runtime
        from launch.long_contexts import check_contexts_alone
        from launch.trained import open_validation, with_chunks
        from model.parallel.mesh import Mesh
        from trainer.evaluate import evaluate, evaluate_context

        decoder, mesh, lengths = self._trained.decoder, Mesh(device=self.device), sorted(contexts)
        options, capacity = (mesh, self.position), runtime.memory_capacity_bytes(self.device, runtime.ALONE)
        config = with_chunks(self._trained, chunk_tokens).config
        check_contexts_alone(config, lengths, self.position, capacity)
        with closing(open_validation(self.config, data, lengths, tokens)) as text:
            if not lengths:
                return [evaluate(decoder, text.whole(), *options)]
            chunk = config.evaluate.chunk_tokens
            return [evaluate_context(decoder, text.at(length), *options, chunk_tokens=chunk) for length in lengths]

    def _ids(self, ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Token ids as int64 [B, S] on the model's device."""
        import torch

        try:
            ids_BS = torch.as_tensor(ids)
        except (ValueError, TypeError) as error:
            raise ValueError(f"ids must be rows of equal length of token ids ({error})") from None
        if ids_BS.dim() != 2 or not ids_BS.numel() or ids_BS.is_floating_point() or ids_BS.dtype == torch.bool:
            raise ValueError(
                f"ids must be integers [B, S], at least one; got {str(ids_BS.dtype)[6:]} of shape {list(ids_BS.shape)}"
            )
        least, most, size = int(ids_BS.min()), int(ids_BS.max()), self.config.model.vocab_size
        if least < 0 or most >= size:
            raise ValueError(f"ids must lie between 0 and {size - 1}, got {least if least < 0 else most}")
        return ids_BS.to(self.device, torch.int64)


def load(
    run_or_checkpoint: str | Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    position: PositionConfig | Mapping[str, Any] | str | None = None,
) -> Model:
    """Read a trained network.

    Args:
        run_or_checkpoint: a run directory (its newest complete checkpoint), a checkpoint, also an imported one, or the address
            of either in an object store.
        device: auto (cuda where there is one), cpu, cuda, or a torch.device.
        dtype: of the weights, torch.float32 or torch.bfloat16; None = as trained (train.precision).
        position: the position map to evaluate with, as {"kind": "rerope", "window": 256} or "rerope,window=256"; what training
            depends on (rope_theta, trained_length, log_n) is as trained unless it is given. None = evaluate.position of the
            run, else the trained map.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, or a value is not legal.
    """
    import torch

    from launch import runtime
    from launch.trained import evaluation_position, open_checkpoint

    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype = {dtype}; legal: torch.float32, torch.bfloat16, None (as trained)")
    place = device if isinstance(device, torch.device) else runtime.choose_device(device, runtime.world())
    trained = open_checkpoint(str(run_or_checkpoint), place, dtype)
    return Model(trained, evaluation_position(trained, position))


@dataclass(frozen=True)
class TrainingResult:
    """A run that is done."""

    directory: str
    """The run directory."""
    step: int
    checkpoint: str
    """The checkpoint of this step, for `load`."""


def train(config: str | Path | Mapping[str, Any] | RunConfig, overrides: Sequence[str] = ()) -> TrainingResult:
    """Train, or resume, to the last step: as one rank in this process, or as a rank of torchrun where that started the program.

    Lines of progress go to stderr. What libraries print goes to the rank's log meanwhile. Afterwards output, signal handlers,
    environment and warning filters are as before, and another run can be trained.

    The first Ctrl-C saves, and raises KeyboardInterrupt when it is saved; a second one raises it without waiting. The watchdog
    (health.hang_seconds) is off unless torchrun started the program, because it would end the process.

    Args:
        config: path of a TOML file, name of a shipped one ("quickstart"), tables of values, or a RunConfig.
        overrides: "section.key=value", as on the command line.

    Raises:
        ValueError, FileNotFoundError, PermissionError: a mistake in the configuration, or data or a checkpoint that do not fit.
        RunEnded: the run failed; the sentence says why and what there is to resume from.
        KeyboardInterrupt: it was stopped by a signal and is saved. (Under torchrun the rank leaves with status 0.)
    """
    from launch.config import RunConfig
    from launch.in_process import train_here
    from launch.load_config import build_config, load_config

    overrides = [overrides] if isinstance(overrides, str) else overrides
    if isinstance(config, RunConfig):
        config = config.model_dump(mode="json", exclude_unset=True)
    if isinstance(config, Mapping):
        asked = build_config(dict(config), list(overrides), settled=False)
    else:
        asked = load_config(config, list(overrides), settled=False)
    step, checkpoint = train_here(asked)
    return TrainingResult(asked.run.dir, step, checkpoint)

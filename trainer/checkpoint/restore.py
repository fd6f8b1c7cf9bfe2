"""Reading a checkpoint: any layout fills its shards from rectangles that any other layout wrote."""

import math
from collections.abc import Callable
from functools import cached_property

import torch

from trainer.checkpoint.format import WantedRectangles, check_file, read_tensors, verify_file
from trainer.checkpoint.manifest import DTYPES, FILE, CheckpointManifest, CheckpointMeta, decode_manifest
from trainer.checkpoint.plausibility import MAX_MANIFEST_BYTES, check_manifest
from trainer.checkpoint.rectangles import Rectangle, Shard, check_shard, shard_rectangles
from trainer.checkpoint.store import Store


class CheckpointReader:
    """One checkpoint, read without any model or process group.

    Args:
        store: its directory.
        manifest: where it has been read already; default read when it is needed.
    """

    def __init__(self, store: Store, manifest: CheckpointManifest | None = None) -> None:
        self.store = store
        if manifest is not None:
            self.manifest = manifest

    @cached_property
    def manifest(self) -> CheckpointManifest:
        """Everything about the checkpoint but the values.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when it is damaged, of a newer version, or says what cannot be.
        """
        try:
            if (size := self.store.size(FILE)) > MAX_MANIFEST_BYTES:
                raise ValueError(f"{self.store.join(FILE)} has {size} bytes, a manifest has at most {MAX_MANIFEST_BYTES}")
            content = self.store.read(FILE)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.store.address} is not a checkpoint: it has no {FILE}; give a directory like step-00000100"
            ) from None
        manifest = decode_manifest(content, self.store.join(FILE))
        check_manifest(manifest, self.store.join(FILE))
        return manifest

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Every tensor: name -> (shape, dtype)."""
        return {name: (shape, DTYPES[self.manifest.dtypes[name]]) for name, shape in self.manifest.shapes.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """One full tensor, as it was saved, in host memory.

        Raises:
            ValueError: when there is no such tensor, or the checkpoint is damaged.
        """
        if name not in self.manifest.shapes:
            raise ValueError(f"{self.store.address} has no tensor {name}; `tiglon checkpoint show` lists what it has")
        shape = self.manifest.shapes[name]
        for file, held in self.manifest.files.items():
            if name in held.shapes:
                check_file(self.store, file, self.store.join(file), held)  # before memory is taken for it
        values = torch.empty(math.prod(shape), dtype=DTYPES[self.manifest.dtypes[name]])
        self._read({name: [(Rectangle((0,) * len(shape), shape), values)]}, values.numel(), lambda: None)
        return values.view(shape)

    def load(
        self, shards: list[Shard], only: Callable[[str], bool] | None = None, heartbeat: Callable[[], None] = lambda: None
    ) -> CheckpointMeta:
        """Fill shards in place, whatever layout wrote them; bf16 and fp32 convert into each other. No collectives.

        Args:
            only: Which names to fill; the others keep their values. Default all.
            heartbeat: Called after each file.

        Raises:
            FileNotFoundError, ValueError: no checkpoint there, damaged, or without a tensor that is wanted.
        """
        wanted: WantedRectangles = {}
        elements = 0
        for shard in shards:
            if only is not None and not only(shard.name):
                continue
            check_shard(shard)
            self._check_shape(shard)
            rectangles = [*shard_rectangles(shard)]
            wanted.setdefault(shard.name, []).extend(rectangles)
            elements += sum(rectangle.numel for rectangle, _ in rectangles)
        with torch.no_grad():
            self._read(wanted, elements, heartbeat)
        return self.manifest.meta

    def verify(self, share: tuple[int, int] = (0, 1), heartbeat: Callable[[], None] = lambda: None) -> None:
        """Read the files and check every byte; (i, n) checks every n-th file from the i-th on. `heartbeat` is called meanwhile.

        Raises:
            FileNotFoundError, ValueError: with what is wrong.
        """
        first, ranks = share
        for name in list(self.manifest.files)[first::ranks]:
            verify_file(self.store, name, self.manifest, heartbeat)

    def _check_shape(self, shard: Shard) -> None:
        shapes = self.manifest.shapes
        if shard.name not in shapes:
            raise ValueError(missing_tensor(self.store.address, shard.name, self.manifest))
        if shapes[shard.name] != tuple(shard.shape):
            raise ValueError(
                f"checkpoint {self.store.address} has {shard.name} of shape {shapes[shard.name]}, "
                f"this run wants {tuple(shard.shape)}; resume with its own [model]"
            )

    def _read(self, wanted: WantedRectangles, elements: int, heartbeat: Callable[[], None]) -> None:
        filled = 0
        for name in self.manifest.files:
            filled += read_tensors(self.store, name, self.manifest, wanted)
            heartbeat()
        if filled != elements:
            raise ValueError(
                f"checkpoint {self.store.address} covers {filled} of the {elements} elements wanted of it: "
                "a fault when it was written"
            )


def missing_tensor(path: str, name: str, manifest: CheckpointManifest) -> str:
    """That a checkpoint does not hold what is wanted, and what to do."""
    kind = name.partition("/")[0]
    has = sorted({held.partition("/")[0] for held in manifest.shapes})
    new_run = f"start a new run from its weights: run.dir=NEW checkpoint.resume={path} checkpoint.reset_optimizer=true"
    advice = "resume with its own [model]" if kind == "weight" else new_run
    return f"checkpoint {path} has no {name} (it holds {', '.join(has)}); {advice}"

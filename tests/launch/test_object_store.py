"""Whole runs of two ranks whose checkpoints lie in an object store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import tiglon
from data.storage import join_address, open_store
from launch.checkpoints import read_tensor, tensor_names, verify_checkpoint
from tests.launch.test_train import losses, run
from tests.object_store import served_bucket
from trainer.checkpoint.api import Checkpoints
from trainer.config import CheckpointConfig


@pytest.fixture
def bucket() -> Iterator[str]:
    with served_bucket() as address:
        yield address


@pytest.mark.parametrize("engine", ["zero", "fold"])
def test_two_ranks_save_and_resume_bit_for_bit(configuration: str, tmp_path: Path, bucket: str, engine: str):
    options = [f"parallel.engine={engine}", "optimizer.name=tiger", "optimizer.max_grad_norm=0"]
    remote = [*options, f"checkpoint.directory={bucket}", "parallel.tensor_parallel_size=1"]
    run(configuration, *options, f"run.dir={tmp_path}/whole", ranks=2)
    run(configuration, *remote, "train.steps=6", ranks=2)
    said = run(configuration, *remote, ranks=2)
    assert "resumed from" in said and "step-00000006" in said and "step 6" in said
    assert open_store(bucket).entries() == [".lock", "step-00000008", "step-00000012"]
    last = join_address(bucket, "step-00000012")
    verify_checkpoint(last)
    files = open_store(last).entries()
    assert files == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    whole = tmp_path / "whole/checkpoints/step-00000012"
    assert tensor_names(last) == tensor_names(whole)
    assert all(read_tensor(last, name).equal(read_tensor(whole, name)) for name in tensor_names(whole))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_second_run_at_the_same_address_ends_with_a_sentence(configuration: str, tmp_path: Path, bucket: str):
    run(configuration, f"checkpoint.directory={bucket}", "train.steps=4", ranks=2)
    before = open_store(join_address(bucket, "step-00000004")).entries()
    first = Checkpoints(open_store, str(tmp_path / "first"), CheckpointConfig(directory=bucket), None, lambda text: None)
    said = run(configuration, f"checkpoint.directory={bucket}", f"run.dir={tmp_path}/second", ranks=2, status=2)
    sentences = [line for line in said.splitlines() if line.startswith("tiglon")]
    assert len(sentences) == 1 and "belongs to a run that is still going (process" in sentences[0]
    first.close()
    assert open_store(join_address(bucket, "step-00000004")).entries() == before
    verify_checkpoint(join_address(bucket, "step-00000004"))
    assert "resumed from" in run(configuration, f"checkpoint.directory={bucket}", "train.steps=5", ranks=2)


def test_a_network_is_loaded_from_there(run_directory: Path, bucket: str):
    local = tiglon.load(run_directory)
    store = open_store(join_address(bucket, "step-00000003"))
    for file in Path(local.path).iterdir():
        store.write(file.name, file.read_bytes())
    remote = tiglon.load(bucket)
    assert remote.path.startswith("s3://") and remote.generate("def", 3) == local.generate("def", 3)

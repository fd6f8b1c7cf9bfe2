"""The plan printed, and as JSON."""

import json
from collections.abc import Sequence
from io import StringIO

import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from launch.commands.plan import _layers, plan_command, show
from launch.config import RunConfig
from launch.load_config import load_config
from launch.planner.layouts import Plan, make_plan
from launch.shipped import shipped_names
from tests.launch.conftest import save_checkpoint
from tests.launch.planner.test_layouts import llama


@pytest.mark.parametrize("name", shipped_names())
def test_no_number_of_a_shipped_configuration_is_cut(name: str):
    config, text = load_config(name), StringIO()
    show(make_plan(config, 8, "h200"), config, Console(width=80, file=text))
    assert "…" not in text.getvalue()


def test_the_tables_fit_eighty_columns():
    config = llama()
    console = Console(width=80, record=True, file=StringIO())
    show(make_plan(config, 64, "h200", {"web": 10**12}), config, console)
    text = console.export_text()
    assert "…" not in text
    for words in ("Parameters", "masters", "sum of gradients", "tokens/s per rank", "fold 1x64", "epochs", "not prepared yet"):
        assert words in text


def shown(config: RunConfig) -> tuple[Plan, str]:
    """A plan for 64 GPUs, and what it prints on a terminal of 80 columns: nothing cut off."""
    console = Console(width=80, record=True, file=StringIO())
    plan = make_plan(config, 64, "h200")
    show(plan, config, console)
    text = console.export_text()
    assert "…" not in text
    return plan, text


def test_a_plan_of_shared_sequences_says_what_each_exchange_costs():
    config = llama("parallel.context_parallel_size=2", "train.sequence_length=16384", "train.micro_batch_size=1")
    plan, text = shown(config)
    for words in (
        "32 data-parallel ranks x 8 micro-batches x 1 sequence", "each sequence on 2", "keys, values: second half",
        "ZeRO-1 1x2x32", "parallel.context_exchange: gather", "; heads", "tensor x context x data",
    ):  # fmt: skip
        assert words in " ".join(text.split()), words
    values = plan.as_dict()
    assert [each["layout"]["context_exchange"] for each in values["exchanges"]] == ["gather", "heads"]
    assert values["batch"]["context_parallel_ranks"] == 2 and values["batch"]["tokens_a_micro_batch"] == 8192
    json.dumps(values, allow_nan=False)


def test_a_plan_of_a_pipeline_says_how_it_is_cut_and_what_it_waits_for():
    config = llama("parallel.pipeline_parallel_size=4", "parallel.pipeline_schedule=interleaved", "parallel.engine=zero")
    plan, text = shown(config)
    for words in (
        "through 4 pipeline-parallel ranks", "of the fullest rank", "tensor- and pipeline-parallel sizes", "in flight",
        "Pipeline, interleaved: idle 15.8% of forward and backward, 3 / (2 x 8 + 3)", "bubble of the pipeline",
        "streams to the next stages", "ZeRO-1 1x16 pipeline 4 interleaved 2", "tensor x data ranks, of every stage of a",
    ):  # fmt: skip
        assert words in " ".join(text.split()), words
    values = plan.as_dict()
    assert [name["engine"] for name in values["engines"]] == ["ZeRO-1", "ZeRO-2", "fold"]
    found = values["pipeline"]
    assert found["schedule"] == values["configured"]["layout"]["pipeline_schedule"] == "interleaved"
    assert found["idle_share"] == pytest.approx(3 / 19)
    assert [rank["in_flight"] for rank in found["ranks"]] == [11, 9, 7, 5]
    assert sum(sum(rank["layers"]) for rank in found["ranks"]) == 32
    assert max(rank["memory"]["peak"] for rank in found["ranks"]) == values["configured"]["memory"]["peak"]
    assert values["configured"]["step"]["bubble"] > 0 and values["batch"]["pipeline_parallel_ranks"] == 4
    json.dumps(values, allow_nan=False)


def test_heads_that_cannot_be_exchanged_are_told():
    config = llama("parallel.context_parallel_size=2", "model.num_attention_heads=5", "model.num_key_value_heads=5",
                   "model.head_dim=128")  # fmt: skip
    console = Console(width=200, record=True, file=StringIO())
    show(make_plan(config, 8, "h200"), config, console)
    assert "these heads cannot be exchanged" in console.export_text()


def test_the_command_prints_json(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[train]\nglobal_batch_size = 32\n")
    app = Typer()
    app.command()(plan_command)
    result = CliRunner().invoke(app, [str(path), "train.micro_batch_size=4", "--gpus", "2", "--gpu", "h100", "--json"])
    assert result.exit_code == 0, result.output
    made = json.loads(result.output)
    assert made["configured"]["layout"]["micro_batches"] == 4
    assert made["ranked"][0]["memory"]["peak"] > 0


def told(*words: str):
    app = Typer()
    app.command()(plan_command)
    return CliRunner().invoke(app, [*words, "--gpus", "1", "--gpu", "cpu"], env={"COLUMNS": "200"}, catch_exceptions=False)


def test_a_plan_goes_on_from_a_checkpoint(configuration, tmp_path):
    """4 updates of 4 sequences are done, 4 of 8 are to come; the past does not divide by the micro-batch."""
    path = save_checkpoint(load_config(configuration, ["train.steps=8", "train.global_batch_size=4"]), 4, tokens=16 * 32)
    larger = ["train.steps=8", "train.micro_batch_size=8"]
    for target in ([], [f"run.dir={tmp_path}/other", f"checkpoint.resume={path}"]):
        result = told(configuration, *larger, *target, "--json")
        assert f"tiglon: as it resumes from {path}, step 4" in result.stderr
        made = json.loads(result.stdout)
        assert made["problem"] == "" and made["batch"]["tokens_in_all"] == (16 + 32) * 32 and made["batch"]["updates_done"] == 4
        assert [item["tokens_wanted"] for item in made["coverage"]] == [(16 + 32) * 32]
        fresh = json.loads(told(configuration, *larger, f"run.dir={tmp_path}/new", "--json").stdout)
        assert fresh["batch"]["tokens_in_all"] == 64 * 32 and fresh["configured"]["days"] == 2 * made["configured"]["days"]
        text = told(configuration, *larger, *target).stdout
        assert (
            "8 sequences (4 until batch 4, then 8) x 32" in text and "for the 4 updates that remain, to 1.536k tokens" in text
        )


def test_shorter_rows_are_planned_as_whole_sequences(configuration):
    plain, shorter = (told(configuration, *ramp).stdout for ramp in ([], ["train.length_ramp=[[4,8]]"]))
    assert "8 sequences x 32 in rows of 8 until batch 4, then 32 = " in shorter
    assert shorter.replace(" in rows of 8 until batch 4, then 32", "") == plain


def test_a_plan_after_rewinds_counts_batches(configuration):
    """Step 6 is batch 10 of 8 x 4 and then 8 sequences; 3 updates remain, whatever the 10 batches were trained on."""
    ramped = ["train.steps=9", "train.batch_ramp=[[8,4]]"]
    save_checkpoint(load_config(configuration, ramped), 6, 10, tokens=6 * 4 * 32)
    made = json.loads(told(configuration, *ramped, "--json").stdout)
    assert made["batch"]["tokens_in_all"] == (6 * 4 + 3 * 8) * 32
    assert [item["tokens_wanted"] for item in made["coverage"]] == [(8 * 4 + 5 * 8) * 32]


def test_a_checkpoint_on_another_computer_is_told(configuration, tmp_path):
    result = told(configuration, f"checkpoint.resume={tmp_path}/elsewhere", "--json")
    assert result.exit_code == 0 and "tiglon: taken as a run from step 0: " in result.stderr
    assert json.loads(result.stdout)["batch"]["updates_done"] == 0


def test_help_fits_a_screen_and_has_an_example():
    app = Typer()
    app.command()(plan_command)
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert "Example: tiglon plan" in text
    assert len(text.splitlines()) <= 40


@pytest.mark.parametrize(
    ("counts", "words"), [((4, 4, 5), "4 + 4 + 5"), ([2] * 6, "2 + 2 + 2 + 2 + 2 + 2"), ([1] * 39 + [2], "39 x 1 + 2")]
)
def test_the_layers_of_many_stages_fit_a_table(counts: Sequence[int], words: str):
    assert _layers(counts) == words

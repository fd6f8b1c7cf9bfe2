"""The command line: one program, one file of commands. Each command's work is in a room of its own."""

import sys
from typing import Annotated

import typer

from launch.checkpoints import checkpoint_app
from launch.config import load, micro_batches
from launch.convert import export_command, import_command
from launch.corpus import data_app, prepare_command, tokenizer_app
from launch.doctor import doctor_command
from launch.plan_command import plan_command
from launch.quickstart import quickstart_command
from launch.ranks import run_ranks
from launch.read import evaluate_command, generate_command
from launch.report import report_command
from launch.slurm import slurm_command
from launch.train import main as train_main
from launch.train import open_data

app = typer.Typer(
    name="tiglon",
    help="Pretrain decoder-only language models, from a laptop to many nodes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def train_command(
    config: Annotated[str, typer.Argument(help="TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    nproc: Annotated[int, typer.Option(help="Ranks on this computer; more than one goes through torchrun.")] = 1,
    max_restarts: Annotated[int, typer.Option(help="Restarts of the ranks after a failure; they resume.")] = 0,
) -> None:
    """Train, or carry on training.

    Example: tiglon train launch/configs/quickstart.toml --nproc 2 train.steps=100
    """
    arguments = [config, *(overrides or [])]
    if nproc == 1 and not max_restarts:
        raise typer.Exit(train_main(arguments))
    settings = load(config, overrides or [])
    micro_batches(settings, nproc)
    for stream in open_data(settings, 0, nproc).values():  # a mistake is told once, before any rank starts
        stream.close()
    raise typer.Exit(run_ranks(nproc, max_restarts, settings.health.grace_seconds, arguments))


app.command("quickstart")(quickstart_command)
app.add_typer(tokenizer_app, name="tokenizer")
app.command("prepare")(prepare_command)
app.add_typer(data_app, name="data")
app.command("train")(train_command)
app.command("evaluate")(evaluate_command)
app.command("generate")(generate_command)
app.add_typer(checkpoint_app, name="checkpoint")
app.command("export")(export_command)
app.command("import")(import_command)
app.command("plan")(plan_command)
app.command("slurm")(slurm_command)
app.command("doctor")(doctor_command)
app.command("report")(report_command)


def main() -> None:
    """Run a command; a mistake of the user's is one sentence on stderr and exit status 2."""
    try:
        app()
    except (ValueError, FileNotFoundError, PermissionError) as error:
        print(f"tiglon: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

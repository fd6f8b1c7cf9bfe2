"""The command line: the list of commands. Each command has a module in launch/commands."""

import importlib
import sys
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from launch import program
from launch.interrupts import interrupts_end_at_once

COMMANDS = {
    "quickstart": (
        "launch.commands.quickstart:quickstart_command",
        "Train a small language model of Python source from scratch, on this computer, in minutes.",
    ),
    "init": (
        "launch.commands.init:init_command",
        "Print a shipped configuration with every key and its meaning, to make your own from.",
    ),
    "tokenizer": ("launch.commands.tokenizer:tokenizer_app", "Train or import a tokenizer."),
    "prepare": (
        "launch.commands.prepare:prepare_command",
        "Tokenize text into shards. An interrupted command resumes where it stopped.",
    ),
    "data": ("launch.commands.data:data_app", "Import or audit prepared shards."),
    "train": ("launch.commands.train:train_command", "Train, or resume training."),
    "evaluate": (
        "launch.commands.evaluate:evaluate_command",
        "Measure held-out loss; with --contexts at several context lengths, on the same tokens each time.",
    ),
    "generate": ("launch.commands.generate:generate_command", "Continue a prompt; the text streams as it is sampled."),
    "checkpoint": ("launch.commands.checkpoint:checkpoint_app", "Inspect checkpoints: list, verify, show, diff."),
    "export": (
        "launch.commands.export:export_command",
        "Export a checkpoint as a Hugging Face model that stock transformers loads.",
    ),
    "import": (
        "launch.commands.import_model:import_command",
        "Import a Hugging Face model as a checkpoint to train from.",
    ),
    "plan": (
        "launch.commands.plan:plan_command",
        "Predict memory, FLOPs, communication and days of a run, before anything is bought or queued.",
    ),
    "slurm": (
        "launch.commands.slurm:slurm_command",
        "Write the sbatch script of a run: srun, one torchrun per node, save and requeue before the time limit.",
    ),
    "doctor": (
        "launch.commands.doctor:doctor_command",
        "Check this environment for a configuration; exit status 1 if something will stop the run.",
    ),
    "report": ("launch.commands.report:report_command", "Plot runs and compare them on one page."),
}
"""Name -> (module:function, help line). Only the command that runs is imported: torch alone takes seconds."""


_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
"""click's, or that of the copy of click that newer versions of typer carry."""


class _Commands(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] in COMMANDS:
            self.commands[args[0]] = command(args[0])
        return super().resolve_command(ctx, args)


def command(name: str) -> Any:
    """The click command (or group) of a name in COMMANDS; imports its module."""
    module, attribute = COMMANDS[name][0].split(":")
    with interrupts_end_at_once():
        target = getattr(importlib.import_module(module), attribute)
    if isinstance(target, typer.Typer):
        return typer.main.get_command(target)
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command(name)(target)
    return typer.main.get_command(single)


app = typer.Typer(
    name="tiglon",
    cls=_Commands,
    help="Pretrain decoder-only language models, from a laptop to many nodes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tiglon {version('tiglon')}")
        raise typer.Exit


_VersionOption = Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")]


@app.callback()
def _options(show_version: _VersionOption = False) -> None: ...


for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


def main() -> NoReturn:
    """Run the command that sys.argv names and exit with its status; errors are one sentence each (launch/program.py)."""
    program.run(_invoke)


def _invoke() -> int:
    """Run the command that sys.argv names; its exit status.

    Not through typer's own `main`, which prints boxes, tracebacks and "Aborted!" of its own.
    """
    group = typer.main.get_command(app)
    try:
        with group.make_context("tiglon", sys.argv[1:]) as context:
            group.invoke(context)
    except typer.Exit as exit_:
        return exit_.exit_code
    except _UsageError as error:
        return _usage_error(error)
    return 0


def _usage_error(error: Any) -> int:
    """Show the help for a group without a command; for every other usage error raise ValueError with one sentence."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    sentence = " ".join(error.format_message().split()).rstrip(".?").replace(". Did you mean", ", did you mean")
    sentence = sentence.partition(", unable to parse")[0].replace("Value error, ", "")  # pydantic's, in newer versions of typer
    value = _option_value(getattr(error, "param", None))
    if value and value not in sentence:
        sentence += f" (got '{value}')"
    path = error.ctx.command_path if error.ctx else "tiglon"
    raise ValueError(f"{sentence[:1].lower()}{sentence[1:]}; see {path} --help") from None


def _option_value(parameter: Any) -> str:
    """Value that the command line gives for an option, "" if none."""
    for word, following in zip(sys.argv[1:], [*sys.argv[2:], ""]):
        for option in getattr(parameter, "opts", ()):
            if option.startswith("-") and (word == option or word.startswith(f"{option}=")):
                return word.partition("=")[2] or following
    return ""


if __name__ == "__main__":
    main()

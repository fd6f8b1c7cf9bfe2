"""The command line: one program, one file of commands. Each command's work is in a room of its own."""

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from launch import program

COMMANDS = {
    "quickstart": (
        "launch.quickstart:quickstart_command",
        "From nothing to a small language model of Python source, on this computer, in minutes.",
    ),
    "tokenizer": ("launch.corpus:tokenizer_app", "Make a tokenizer."),
    "prepare": (
        "launch.corpus:prepare_command",
        "Turn text into token shards. Started again after a kill, it goes on where it was.",
    ),
    "data": ("launch.corpus:data_app", "Look into prepared shards."),
    "train": ("launch.ranks:train_command", "Train, or carry on training."),
    "evaluate": (
        "launch.read:evaluate_command",
        "Measure held-out loss, also by context length with the same tokens scored each time.",
    ),
    "generate": ("launch.read:generate_command", "Continue a text; pieces appear as they are made."),
    "checkpoint": ("launch.checkpoints:checkpoint_app", "Look at checkpoints: list, verify, show, diff."),
    "export": ("launch.convert:export_command", "Write a checkpoint as a Hugging Face model that stock transformers loads."),
    "import": ("launch.convert:import_command", "Bring a Hugging Face model in as a checkpoint to go on training from."),
    "plan": (
        "launch.plan_command:plan_command",
        "Memory, operations, communication and days of a run, before anything is bought or queued.",
    ),
    "slurm": (
        "launch.slurm:slurm_command",
        "Write the sbatch script of a run: srun, one torchrun a node, save and requeue before the time limit.",
    ),
    "doctor": (
        "launch.doctor:doctor_command",
        "Say what is wrong with this environment for a configuration; exit status 1 if something will stop the run.",
    ),
    "report": ("launch.report:report_command", "Draw runs and compare them on one page."),
}
"""Where each is, and what it says of itself in the list. Only the one that is run is imported: torch alone takes seconds."""


_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
"""Of click, or of the copy of click that newer typers carry."""


class _Commands(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] in COMMANDS:
            self.commands[args[0]] = command(args[0])
        return super().resolve_command(ctx, args)


def command(name: str) -> Any:
    """A command as it is run: click's form of a function, or of a group of them."""
    module, attribute = COMMANDS[name][0].split(":")
    found = getattr(importlib.import_module(module), attribute)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    alone.command(name)(found)
    return typer.main.get_command(alone)


app = typer.Typer(
    name="tiglon",
    cls=_Commands,
    help="Pretrain decoder-only language models, from a laptop to many nodes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _name, (_, _line) in COMMANDS.items():
    app.command(_name, help=_line)(lambda: None)


def main() -> None:
    """Run a command. However it ends, it says so in one sentence: see launch/program.py."""
    raise SystemExit(program.run(_invoke))


def _invoke() -> int:
    """The exit status of the command that the program's arguments name.

    Not through typer's own `main`, which ends with boxes, tracebacks and "Aborted!" of its own.
    """
    group = typer.main.get_command(app)
    try:
        with group.make_context("tiglon", sys.argv[1:]) as context:
            group.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    except _UsageError as mistake:
        return _mistyped(mistake)
    return 0


def _mistyped(mistake: Any) -> int:
    """Raises ValueError for a command line that cannot be understood, in one sentence; an empty one is shown the help."""
    if type(mistake).__name__ == "NoArgsIsHelpError":
        mistake.show()
        return 2
    said = " ".join(mistake.format_message().split()).rstrip(".?").replace(". Did you mean", ", did you mean")
    said = said.partition(", unable to parse")[0].replace("Value error, ", "")  # pydantic's, which newer typers ask
    got = _given(getattr(mistake, "param", None))
    if got and got not in said:
        said += f" (got '{got}')"
    path = mistake.ctx.command_path if mistake.ctx else "tiglon"
    raise ValueError(f"{said[:1].lower()}{said[1:]}; see {path} --help") from None


def _given(parameter: Any) -> str:
    """What the command line gives for an option; "" for nothing."""
    for word, following in zip(sys.argv[1:], [*sys.argv[2:], ""]):
        for option in getattr(parameter, "opts", ()):
            if option.startswith("-") and (word == option or word.startswith(f"{option}=")):
                return word.partition("=")[2] or following
    return ""


if __name__ == "__main__":
    main()

"""The command ``ca2st``: its commands, and the one place where errors become exit codes.

Exit codes: 0 done, 1 a fault of ours, 2 user input, 3 damaged data, 4 environment, 5 numeric, 6 retries used up,
130 and 143 interrupted and terminated.
"""

import atexit
import contextlib
import errno
import gc
import inspect
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
import typer.core

from ca2st import __version__
from ca2st.durable import is_environment_error, what_is_needed
from ca2st.errors import CA2STError, EnvironmentFault, UserInputError
from ray_jobs.commands import machine, models, runs, shard, train
from ray_jobs.console import say, show_log, stdout_for_results
from ray_jobs.environment import wait_passively

_INTERRUPTED = 130
_OF_A_NAME = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""What is wrong with a name, not with the machine."""


class _Commands(typer.core.TyperGroup):
    """Says what Ctrl-C leaves; typer alone would end without a word."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # typer's own name for click's context
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted; rerun the same command to go on where it stopped")
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    name="ca2st",
    cls=_Commands,
    help="Holistic video recognition: videos and annotations in, a trained, tracked, resumable model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
for command in (
    machine.demo,
    train.train,
    train.recipes,
    train.submit,
    runs.evaluate,
    runs.significance,
    runs.robustness,
    runs.predict,
    runs.compare,
    runs.explain,
    runs.features,
    machine.doctor,
):
    app.command()(command)
app.add_typer(shard.app, name="shard", help="Turn videos and annotations into verified shards.")
app.add_typer(
    models.weights, name="weights", help="Weights of published checkpoints, and the proof that the model is right."
)
app.add_typer(models.model, name="model", help="Structure, parameters and multiply-adds of a model.")
app.add_typer(
    machine.bench, name="bench", help="How fast model and loader are, each beside a baseline in the same run."
)
app.add_typer(runs.track, name="track", help="MLflow follows the journal of a run.")


class _Command(typer.core.TyperCommand):
    """A command whose help lists its options by panel, in plain text: typer's boxes take longer to import than all."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and each panel of options."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                usual = "Arguments" if param.param_type_name == "argument" else "Options"
                panels.setdefault(getattr(param, "rich_help_panel", None) or usual, []).append(record)
        for name, records in panels.items():
            with formatter.section(name):
                formatter.write_dl(records)


def _make_plain(group: typer.Typer) -> None:
    group.rich_markup_mode = None
    for command in group.registered_commands:
        command.cls = _Command
        command.short_help = (inspect.getdoc(command.callback) or "").partition("\n\n")[0]  # all of it in a list
    for subgroup in group.registered_groups:
        subgroup.short_help = subgroup.help
        if subgroup.typer_instance is not None:
            _make_plain(subgroup.typer_instance)


_make_plain(app)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and end."),
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(program: typer.Typer = app) -> None:
    """Entry point of ``ca2st``: run the command, end with the exit code of what happened."""
    show_log()
    wait_passively()
    atexit.register(gc.freeze)  # or the interpreter's end looks through all of torch's objects: 0.3 s
    is_for_a_program = "--json" in sys.argv and not {"-h", "--help"}.intersection(sys.argv)
    try:
        with stdout_for_results() if is_for_a_program else contextlib.nullcontext():
            program()
    except CA2STError as error:
        _end(error, error.exit_code)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        if error.errno in _OF_A_NAME and _is_given(error.filename, sys.argv[1:]):
            wrong = UserInputError(f"{place}{error.strerror}; check the name that was given")
            _end(wrong, wrong.exit_code)
        if not is_environment_error(error):
            raise
        _end(EnvironmentFault(f"{place}{error.strerror}; {what_is_needed(error)}"), EnvironmentFault.exit_code)
    except KeyboardInterrupt:  # before or after the command itself
        sys.exit(_INTERRUPTED)


def _is_given(filename: object, arguments: Sequence[str]) -> bool:
    """Return whether a name lies below, or is, one that stands on the command line."""
    names = [name for argument in arguments for name in (argument, argument.rpartition("=")[2]) if len(name) > 1]
    return isinstance(filename, str) and any(name.strip("'\"") in filename for name in names)


def _end(error: Exception, exit_code: int) -> NoReturn:
    """Print one line with the notes that were added on the way (rank, file), and end with the exit code."""
    from ray_jobs.redaction import redacted

    notes = "".join(f" [{note}]" for note in getattr(error, "__notes__", ()))
    sys.stderr.write(redacted(f"error: {error}{notes}\n"))
    sys.exit(exit_code)


if __name__ == "__main__":
    main()

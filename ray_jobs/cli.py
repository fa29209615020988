"""The command ``ca2st``: one group of commands, one place where errors become exit codes.

Exit codes: 0 done, 1 a fault of ours, 2 user input, 3 damaged data, 4 environment, 5 numeric, 6 retries used up,
130 and 143 interrupted and terminated.
"""

import contextlib
import sys
from typing import NoReturn

import typer

from ca2st import __version__
from ca2st.durable import is_environment_error, what_is_needed
from ca2st.errors import CA2STError, EnvironmentFault
from ray_jobs.commands import (
    bench,
    compare,
    demo,
    doctor,
    evaluate,
    explain,
    features,
    model,
    predict,
    shard,
    submit,
    track,
    train,
    weights,
)
from ray_jobs.console import show_log, stdout_for_results
from ray_jobs.environment import wait_passively

app = typer.Typer(
    name="ca2st",
    help="Holistic video recognition: videos and annotations in, a trained, tracked, resumable model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.add_typer(shard.app, name="shard", help="Turn videos and annotations into verified shards.")
app.add_typer(
    weights.app, name="weights", help="Weights of published checkpoints, and the proof that the model is right."
)
app.add_typer(model.app, name="model", help="Structure, parameters and multiply-adds of a model.")
app.add_typer(
    bench.app, name="bench", help="How fast model, loader and converter are, each beside a baseline in the same run."
)
app.command("train")(train.train)
app.command("submit")(submit.submit)
app.command("evaluate")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("compare")(compare.compare)
app.command("explain")(explain.explain)
app.command("features")(features.features)
app.command("doctor")(doctor.doctor)
app.add_typer(track.app, name="track", help="MLflow follows the journal of a run.")


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


def main() -> None:
    """Entry point of ``ca2st``: run the command, end with the exit code of what happened."""
    show_log()
    wait_passively()
    is_for_a_program = "--json" in sys.argv and not {"-h", "--help"}.intersection(sys.argv)
    try:
        with stdout_for_results() if is_for_a_program else contextlib.nullcontext():
            app()
    except CA2STError as error:
        _end(error, error.exit_code)
    except OSError as error:
        if not is_environment_error(error):
            raise
        place = f"{error.filename}: " if error.filename else ""
        _end(EnvironmentFault(f"{place}{error.strerror}; {what_is_needed(error)}"), EnvironmentFault.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; rerun the same command to go on where it stopped\n")
        sys.exit(130)


def _end(error: Exception, exit_code: int) -> NoReturn:
    """One line for the person, the notes that were added on the way (rank, file), and the exit code."""
    from ray_jobs.redaction import redacted

    notes = "".join(f" [{note}]" for note in getattr(error, "__notes__", ()))
    sys.stderr.write(redacted(f"error: {error}{notes}\n"))
    sys.exit(exit_code)


if __name__ == "__main__":
    main()

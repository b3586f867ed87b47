"""`ssmc`: the application, and how its errors end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from ssmc import __version__
from ssmc.cli import (
    bench,
    chat,
    doctor,
    export,
    generate,
    inspect,
    passes,
    recipes,
    sensitivity,
    verify,
)
from ssmc.cli import compile as compile_command
from ssmc.cli import eval as eval_command
from ssmc.cli import run as run_command
from ssmc.cli.output import fail
from ssmc.errors import RankError, SsmcError

INTERRUPTED = 130

# Read when torch loads: on a busy machine, threads that spin as they wait steal others' time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read when tqdm loads: other libraries' bars are for terminals, too.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

app = typer.Typer(
    name="ssmc",
    help="Make state-space language models small and fast after training.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("compile")(compile_command.run)
app.command("passes")(passes.run)
app.command("recipes")(recipes.run)
app.command("inspect")(inspect.run)
app.command("sensitivity")(sensitivity.run)
app.command("eval")(eval_command.run)
app.command("export")(export.run)
app.command("generate")(generate.run)
app.command("run")(run_command.run)
app.command("chat")(chat.run)
app.command("verify")(verify.run)
app.command("bench")(bench.run)
app.command("doctor")(doctor.run)


def _version(shown: bool) -> None:
    if shown:
        print(f"ssmc {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command; `--debug` is read by main() itself."""


def main() -> None:
    """Run the command line. One message for an error; a traceback only with --debug.

    Exit codes: 0 done; 1 a pass, parity or verification failed; 2 wrong usage, recipe, input file
    or output folder; 3 model not supported; 4 device missing or out of memory; 130 interrupted.
    """
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"] or ["--help"]
    try:
        code = _run(arguments)
    except Exception as error:
        if debug and not _is_usage(error):
            raise
        try:
            _fail_once(*_explain(error))
        finally:
            if isinstance(error, RankError):
                _leave_at_once(error.exit_code)
    if code == INTERRUPTED:
        fail("interrupted", "nothing half-written is left behind", code)
    sys.exit(code)


def _fail_once(message: str, hint: str | None, code: int) -> NoReturn:
    """End with a message; of the processes that torchrun started, one says it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from ssmc.core.ranks import find_ranks

        if not find_ranks().is_first_to_tell():
            sys.exit(code)
    fail(message, hint, code)


def _leave_at_once(code: int) -> NoReturn:
    """End without taking down the connections, of which one is broken: gloo may abort there."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(arguments: Sequence[str]) -> int:
    try:
        code = app(args=arguments, prog_name="ssmc", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # who reads stdout has left, as in `ssmc passes | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code or 0


def _explain(error: Exception) -> tuple[str, str | None, int]:
    if _out_of_memory(error) or _out_of_memory(error.__cause__):
        return "out of memory", "use fewer --samples, a shorter --length or a smaller --batch", 4
    if isinstance(error, SsmcError):
        return str(error), error.hint, error.exit_code
    if _is_usage(error):
        return _explain_usage(error)
    return f"{type(error).__name__}: {error}", "this is a defect of ssmc; --debug shows where", 1


def _out_of_memory(error: BaseException | None) -> bool:
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)  # so says torch on the CPU


def _is_usage(error: Any) -> bool:
    """Whether the parser of the command line raised it."""
    return hasattr(error, "format_message")


def _explain_usage(error: Any) -> tuple[str, str, int]:
    context = getattr(error, "ctx", None)
    return error.format_message(), f"see '{context.command_path if context else 'ssmc'} --help'", 2

"""`ssmc lm-eval`."""

from __future__ import annotations

import sys

import typer

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def run(context: typer.Context) -> None:
    """lm-eval's own command line, which knows --model ssmc --model_args target=TARGET here."""
    from ssmc.cli.tasks import check_installed

    check_installed()
    from lm_eval.__main__ import cli_evaluate

    import ssmc.cli.harness  # noqa: F401 - registers the model

    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()

"""Errors of commands: one line on standard error, and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from asgd.errors import AsgdError, DivergedError, RunFailedError
from asgd.printable import printable


@contextmanager
def one_line_errors(advice: Callable[[DivergedError], str]) -> Iterator[None]:
    """Turn errors in the block into one line; exit with 1 for a failed run, 2 for invalid input.

    Parameters
    ----------
    advice
        Returns a line of advice for a run that diverged.
    """
    try:
        yield
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "asgd"
        message = error.format_message().rstrip(".")
        joint = "" if message.endswith("?") else ";"
        _fail(f"{message}{joint} `{where} --help` shows its use", 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 1)
    except DivergedError as error:
        _fail(advice(error), 1)
    except RunFailedError as error:
        _fail(str(error), 1)
    except AsgdError as error:
        _fail(str(error), 2)
    except MemoryError as error:
        _fail(f"not enough memory {error}".rstrip(), 2)
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}", 2)


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"asgd: {printable(message)}", err=True)
    sys.exit(status)

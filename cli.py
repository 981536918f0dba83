"""What every command line here does: one sentence for a mistake, and output from one process."""

import difflib
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

# What torchrun tells each process of itself
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on this machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def print0(message: str) -> None:
    """Prints in the first process alone."""
    if RANK == 0:
        tqdm.write(message)


def exit_with_error(message: str):
    """A user's mistake: one sentence, exit code 2."""
    where = f" in process {RANK}" if RANK else ""
    print(f"error{where}: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def user_errors():
    """A ValueError or OSError inside is a user's mistake."""
    try:
        yield
    except (ValueError, OSError) as error:
        exit_with_error(str(error))


class Parser(ArgumentParser):
    """Shows a description as it stands; ends with a sentence for what it cannot parse."""

    def __init__(self, **options):
        form = RawDescriptionHelpFormatter
        super().__init__(formatter_class=form, allow_abbrev=False, **options)

    def error(self, message):
        unknown = message.partition("unrecognized arguments: ")[2].replace("=", " ").split(" ")[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        exit_with_error(f"{message}{hint} (python {Path(self.prog).name} --help lists the options)")

"""The command line: python -m experiments run | report | results | list.

Status 0: done, whatever the verdicts. 1: an error in a study. 2: a mistake in the command or the config, told in one
line. 130 and 143: ended by Ctrl-C or SIGTERM; the same command continues.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from experiments import config, folders, studies
from experiments.errors import InputError
from experiments.interrupt import ending_at_once

# What loads jax or matplotlib is imported where it is needed: a mistyped config should be answered at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the command line says; returns the exit status."""
    try:
        options = _parser().parse_args(arguments)
        options.command(options)
    except InputError as error:
        print(" ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # outside a run, which has its own watch
        print("interrupted: nothing was lost", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains on flushing stdout
    return 0


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)  # half an option may be the wrong one

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; --help shows how")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m experiments", description="Runs studies and shows what they measured.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run the studies of a config",
        description="Runs the studies of a config, shows the verdicts and writes report.html. The same command on the "
        "same code continues where it was interrupted; finished studies are kept.",
    )
    run.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file: backend, and one table per study")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=v",
        dest="overrides",
        help="replace a value of the config; v is TOML, or a string without quotes; may be given several times",
    )
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="results folder: new, empty, or of the same run (results/<config>-<id>)"
    )
    run.set_defaults(command=_run)

    report = commands.add_parser("report", help="make report.html anew", description="Makes report.html from a folder.")
    report.add_argument("folder", type=Path, metavar="DIR", help="the results folder of a run")
    report.set_defaults(command=_report)

    show = commands.add_parser(
        "results",
        help="show or export measurements",
        description="Shows the measurements of a run. The tables are studies, runs, measurements, hypotheses and the "
        "view summary.",
        epilog='example: results DIR --query "SELECT study, verdict, claim FROM hypotheses"',
    )
    show.add_argument("folder", type=Path, metavar="DIR", help="the results folder of a run")
    show.add_argument(
        "--format",
        choices=("table", "csv", "sql"),
        default="table",
        help="table: one row per value or curve; csv: one row per step; sql: statements that make the database anew",
    )
    show.add_argument("--query", metavar="SQL", help="show the answer to one SELECT instead")
    show.set_defaults(command=_results)

    listing = commands.add_parser("list", help="list studies and configs", description="Lists studies and configs.")
    listing.set_defaults(command=_list)
    return parser


def _run(options: argparse.Namespace) -> None:
    with ending_at_once() as farewell:
        settings = config.load(options.config, options.overrides)
        from experiments import runner

        _build_report(runner.run(settings, options.out, farewell))


def _report(options: argparse.Namespace) -> None:
    _build_report(options.folder)


def _build_report(folder: Path) -> None:
    from experiments import report

    with folders.existing(folder) as run:
        sections = report.build(run)
    report.print_hypotheses(sections)
    print(f"report: {folder / report.PAGE}")


def _results(options: argparse.Namespace) -> None:
    from experiments import export

    export.show(options.folder, options.format, options.query)


def _list(options: argparse.Namespace) -> None:
    print("studies")
    for name in studies.names():
        print(f"  {name}: {studies.title(name)}")
    print("configs")
    for path in sorted(Path("configs").glob("*.toml")):
        print(f"  {path}: {_headline(path)}")


def _headline(path: Path) -> str:
    """The first line of a config's header comment."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


if __name__ == "__main__":
    sys.exit(main())

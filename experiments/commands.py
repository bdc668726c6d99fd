"""The options of the command line, and the actions of its commands."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from experiments import config, folders, jobs, launch, studies
from experiments.errors import InputError, UnfinishedError
from experiments.interrupt import OnInterrupt

# Modules that load jax or matplotlib are imported on use: a mistyped config should be answered at once.


def execute(arguments: Sequence[str] | None, on_interrupt: OnInterrupt) -> int:
    """Does what the command line says; returns the exit status."""
    os.environ.pop("MPLBACKEND", None)  # figures here need no backend, and a wrong name would end the import
    unheard: Any = _Unheard(sys.stderr)
    with contextlib.redirect_stderr(unheard):
        try:
            options = _parser().parse_args(_checked(sys.argv[1:] if arguments is None else arguments))
            options.command(options, on_interrupt)
        except (InputError, UnfinishedError) as error:
            line = " ".join(str(error).splitlines())
            print(line if len(line) <= 900 else f"{line[:600]} ... {line[-290:]}", file=sys.stderr)
            return 2 if isinstance(error, InputError) else 1
    return 0


class _Unheard:
    """stderr, but what it does not take (it is full, or closed) is lost without ending the work."""

    def __init__(self, stream: Any):  # a TextIO, or None
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 (until the process ends)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            _discard(self._stream)
        return len(text)


def _discard(stream: Any) -> None:
    """Leads a stream into nothing, or Python would complain as it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _checked(arguments: Sequence[str]) -> Sequence[str]:
    """A name whose bytes are no UTF-8 could be read, and neither stored nor shown; jax takes none as a folder."""
    for text in (*arguments, os.getcwd()):
        try:
            text.encode()
        except UnicodeEncodeError:
            got = os.fsencode(text).decode(errors="backslashreplace")
            raise InputError(
                f'python -m experiments: expected arguments and a folder in UTF-8, got "{got[:60]}"'
            ) from None
    return arguments


def _path(text: str) -> Path:
    """A path as a shell would have it, also after `--out=`, where a shell leaves ~ alone."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected a user who has a folder, got {text}") from None


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
        "same code continues an interrupted run: what is finished, a study or a part of one, is kept.",
    )
    run.add_argument("config", type=_path, metavar="CONFIG", help="a TOML file: backend, and one table per study")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=v",
        dest="overrides",
        help="replace a value of the config; v is TOML, or a string without quotes; may be given several times",
    )
    run.add_argument(
        "--out",
        type=_path,
        metavar="DIR",
        help="results folder: new, empty, or of the same run (results/<config>-<id>)",
    )
    run.add_argument(
        "--launch",
        metavar="WHERE",
        help="measure in jobs, one for each study or part of one: local:N for N processes of this machine at a time, "
        "slurm or slurm:N for Slurm, which reads its options from the environment (SBATCH_PARTITION, ...)",
    )
    run.set_defaults(command=_run)

    report = commands.add_parser(
        "report", help="make report.html again", description="Makes report.html from a folder."
    )
    report.add_argument("folder", type=_path, metavar="DIR", help="the results folder of a run")
    report.set_defaults(command=_report)

    compare = commands.add_parser(
        "compare",
        help="compare two runs of the same studies",
        description="Says how far the values of two runs differ, and whether that is within what each may differ "
        "between devices; which verdicts differ; and how the runs differ. Status 1: a tier or a verdict differs.",
    )
    compare.add_argument("folders", type=_path, nargs=2, metavar="DIR", help="the results folder of a run")
    compare.set_defaults(command=_compare)

    show = commands.add_parser(
        "results",
        help="show or export measurements",
        description="Shows the measurements of a run. The tables are studies, runs, measurements, hypotheses and the "
        "view summary.",
        epilog='example: results DIR --query "SELECT study, verdict, claim FROM hypotheses"',
    )
    show.add_argument("folder", type=_path, metavar="DIR", help="the results folder of a run")
    show.add_argument(
        "--format",
        choices=("table", "csv", "sql"),
        default="table",
        help="table: one row per value or curve; csv: one row per step; sql: statements that make the database again",
    )
    show.add_argument("--query", metavar="SQL", help="show the answer to one SELECT instead")
    show.set_defaults(command=_results)

    listing = commands.add_parser("list", help="list studies and configs", description="Lists studies and configs.")
    listing.set_defaults(command=_list)
    return parser


def _run(options: argparse.Namespace, on_interrupt: OnInterrupt) -> None:
    target = None if options.launch is None else jobs.target(options.launch)
    settings = config.load(options.config, options.overrides)
    if target is None:
        from experiments import runner

        folder = runner.run(settings, options.out, on_interrupt)
    else:
        folder = launch.run(settings, options.out, target, on_interrupt)
    _build_report(folder, on_interrupt)


def _report(options: argparse.Namespace, on_interrupt: OnInterrupt) -> None:
    _build_report(options.folder, on_interrupt)


def _build_report(folder: Path, on_interrupt: OnInterrupt) -> None:
    from experiments import report

    on_interrupt.line = f"interrupted: what is measured is in {folder}; the same command makes the report"
    with folders.existing(folder) as run:
        sections = report.build(run)
    with _printing():
        report.print_hypotheses(sections)
        print(f"report: {folder / report.PAGE}")


def _compare(options: argparse.Namespace, on_interrupt: OnInterrupt) -> None:
    from experiments import compare

    comparison = compare.compared(*options.folders)
    with _printing():
        compare.show(comparison, *options.folders)
    if not comparison.agree:
        raise UnfinishedError(f"{options.folders[0]} and {options.folders[1]} do not agree")


def _results(options: argparse.Namespace, on_interrupt: OnInterrupt) -> None:
    from experiments import export

    with _printing():
        export.show(options.folder, options.format, options.query)


def _list(options: argparse.Namespace, on_interrupt: OnInterrupt) -> None:
    """One unreadable file does not hide the others; what is wrong with it comes last, and is the exit status."""
    problems: list[str] = []
    with _printing():
        print("studies")
        for name in studies.names():
            with _noting(studies.path(name), problems):
                print(f"  {name}: {studies.title(name)}")
        print("configs")
        for path in sorted(Path("configs").glob("*.toml")):
            with _noting(path, problems):
                print(f"  {path}: {config.headline(path.read_text(encoding='utf-8', errors='replace'))}")
    if problems:
        raise InputError("; ".join(problems))


@contextlib.contextmanager
def _noting(path: Path, problems: list[str]) -> Iterator[None]:
    """Notes where a file cannot be read, and why."""
    try:
        yield
    except SyntaxError as error:
        line = f"line {error.lineno}: " if error.lineno else ""
        problems.append(f"{path}: {line}expected Python, got {error.msg}")
    except UnicodeDecodeError as error:
        problems.append(f"{path}: expected UTF-8, got the byte 0x{error.object[error.start]:02x}")
    except OSError as error:
        if error.filename is None:  # no file's: that of stdout
            raise
        problems.append(f"{path}: cannot be read: {error.strerror}")


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    """Around what goes to stdout: that `head` has read enough is no error, and a full disk is one line."""
    if sys.stdout is None:
        raise InputError("stdout: cannot be written: it is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):  # or a name that the terminal cannot show would be an error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise InputError(f"stdout: cannot be written: {error.strerror}") from None

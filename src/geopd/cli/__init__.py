"""The ``geopd`` command: one file per command, nothing heavy imported until a command runs.

Exit codes: 0 done; 1 the work failed in part or a threshold was crossed; 2 unusable arguments or input, with one line
that names the file, tensor or option and the remedy.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer

from geopd.cli.basis import basis
from geopd.cli.cache import cache
from geopd.cli.check import check
from geopd.cli.claims import claims
from geopd.cli.export import export
from geopd.cli.measure import measure
from geopd.cli.merge import merge
from geopd.cli.plan import plan
from geopd.cli.report import report
from geopd.cli.show import show
from geopd.cli.study import study
from geopd.cli.train import train

app = typer.Typer(
    name="geopd",
    help="Geometry of on-policy distillation: where post-training moved a language model's weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (study, plan, measure, merge, show, check, claims, report, export, basis):
    app.command()(_command)
app.add_typer(cache, name="cache")
# its keys are TRL's, which its own parser reads, --help among them
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)


_INTERRUPTED = 130  # what typer makes of Ctrl-C


def main() -> None:
    """Run the command line; unusable input is one line on stderr and exit code 2, never a traceback."""
    try:
        # not standalone: its own errors would be a box of several lines
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        wrong: Any = error  # its subclasses, which know the message and the command, are not public
        command = wrong.ctx.command_path if wrong.ctx else "geopd"
        _complain(f"{wrong.format_message()} (see `{command} --help`)", wrong.exit_code)
    except ValueError as error:
        _complain(error, 2)
    except (RuntimeError, OSError) as error:  # a full disk is an OSError
        _complain(error, 1)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        _complain("stopped; what had finished is kept, the same command goes on from there", 1)
    sys.exit(code or 0)


def _complain(error: Exception | str, code: int) -> NoReturn:
    from geopd.results.printable import printable

    # a parser's message may have lines of its own, and it may quote a file
    print("geopd: " + "\n".join(printable(line) for line in str(error).splitlines()), file=sys.stderr)
    sys.exit(code)

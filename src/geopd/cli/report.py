"""``geopd report``: figures and one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A results folder written by `geopd measure --out`.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file (default: report.html in the folder).")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser afterwards.")] = False,
) -> None:
    """Draw the figures and write one self-contained HTML page that opens offline; needs no torch.

    Decides the paper's claims anew on the way (claims.json), so that page and tables agree.

    Example: geopd report results/ --open
    """
    from geopd.claims import decide_claims
    from geopd.report import write_report

    decide_claims(folder)
    page = write_report(folder, out)
    typer.echo(str(page))
    if open_page:
        typer.launch(page.resolve().as_uri())

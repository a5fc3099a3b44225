"""`kvstrata results`: the kept figures, and the README's table of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from kvstrata.controller.results import (
    Figure,
    Result,
    ResultError,
    markdown_table,
    read_all,
    readable,
    replace_file,
    with_table,
)


def run(options: argparse.Namespace) -> int:
    """Exit status 1 if the README's table is out of date and should only be checked."""
    results = read_all(options.results)
    if options.readme is not None:
        return _readme(options.readme, results, options.check)
    if options.json:
        print(json.dumps([result.as_tree() for result in results], indent=1))
    else:
        print(_text(results))
    return 0


def _text(results: Iterable[Result]) -> str:
    """One line for each figure: missed goals, then met ones, then those without a goal."""
    rank = {False: 0, True: 1, None: 2}
    sign = {False: "missed", True: "met", None: ""}
    figures = [(result, figure) for result in results for figure in result.figures]
    figures.sort(key=lambda pair: rank[pair[1].met])
    if not figures:
        return "no results are kept yet"
    width = max(len(figure.name) for _, figure in figures)
    return "\n".join(
        f"{sign[figure.met]:7} {figure.name:{width}}  {_measured(figure):22} {result.date[:10]}  "
        f"{result.command}".rstrip()
        for result, figure in figures
    )


def _measured(figure: Figure) -> str:
    value = f"{readable(figure.value)} {figure.unit}".rstrip()
    return f"{value} ({figure.goal})" if figure.goal else value


def _readme(path: Path, results: Iterable[Result], check: bool) -> int:
    try:
        text = path.read_text()
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}") from error
    wanted = with_table(text, markdown_table(results))
    if text == wanted:
        return 0
    if check:
        print(
            f"kvstrata results: the table in {path} is out of date: run `kvstrata results --readme {path}`",
            file=sys.stderr,
        )
        return 1
    try:
        replace_file(path, wanted)
    except OSError as error:
        raise ResultError(f"{path} cannot be written: {error.strerror}") from error
    return 0

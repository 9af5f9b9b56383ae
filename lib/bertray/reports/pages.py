"""Pages for people who decide: one HTML file beside the files that it is made of, for each kind of output.

1. recognise  what kind of output a folder is, by a file in it                    KINDS
2. read       `facts(folder, num_texts)` of its module: only files that jobs have written
3. render     `render(facts)`: a template, which escapes all texts                [reports.layout]
4. put        at most a megabyte: as long as it is more, half of the texts go
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import NamedTuple

from bertray.errors import RequestError
from bertray.storage.location import Location
from bertray.storage.outputs import BUNDLE_FILE, PAGE_FILE

_log = logging.getLogger(__name__)

MAX_PAGE_BYTES = 1_000_000


class Kind(NamedTuple):
    """A kind of output."""

    module: str  # of this room
    sign: str  # the file, or folder, that says that a folder is one
    page: str = PAGE_FILE


KINDS = (
    Kind("bundle", BUNDLE_FILE),
    Kind("evaluation", "metrics.json"),
    Kind("audit", "label_quality.json"),
    Kind("run", "plan.json"),
    Kind("index", "runs", "index.html"),
)


def make_page(folder: Location, num_texts: int) -> Location:
    """Write the page of an output, and return its place.

    Args:
        num_texts: how many texts of the data it may show.

    Raises:
        RequestError: the folder is no output that has a page, or a file of it is damaged.
    """
    module, page = import_module(f"bertray.reports.{_kind_of(folder).module}"), page_of(folder)
    while True:
        content = module.render(module.facts(folder, num_texts)).encode()
        if len(content) <= MAX_PAGE_BYTES or not num_texts:
            break
        num_texts //= 2
    if len(content) > MAX_PAGE_BYTES:
        raise RequestError(f"{page} would have {len(content):,} bytes, and may have {MAX_PAGE_BYTES:,}")
    page.put(content)
    return page


def add_page(folder: Location, num_texts: int = 0, place: Location | None = None) -> None:
    """Write the page of an output that a job has just made; what goes wrong is a warning, and no page is left.

    Args:
        place: where the folder will be; None: where it is.
    """
    try:
        page_of(folder).remove(is_file=True)
        page = make_page(folder, num_texts)
        _log.info("page: %s", place / page.name if place else page)
    except Exception as error:  # the work is done, whatever is wrong with its page
        _log.warning("warning: %s has no page: %s: %s", place or folder, type(error).__name__, error)


def page_of(folder: Location) -> Location:
    """The place of an output's page."""
    return folder / _kind_of(folder).page


def _kind_of(folder: Location) -> Kind:
    for kind in KINDS:
        if (folder / kind.sign).exists():
            return kind
    raise RequestError(
        f"{folder} has no page: it holds none of {', '.join(kind.sign for kind in KINDS)}. Give the folder that "
        "bertray train, tune, evaluate, audit or score wrote, or one of its runs/"
    )

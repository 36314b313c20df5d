"""``kore`` in a process for which one loopback address counts as public and names have the addresses it is told.

    python -m benchmarks.augmentation_loopback '{"own": "127.0.0.2", "names": {...}, "search": "http..."}' augment ...

The command line has no switch that allows private addresses, and shall have none: this stands in for the Internet where
there is none. Every other address is judged as ever, so that redirects to 127.0.0.1 or 10.0.0.1 are refused.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from typing import Any

from kore.augmentation.images import serpapi
from kore.cli import main


def install(own: str, names: dict[str, str], search: str) -> None:
    """Make ``own`` public, look names up in ``names`` alone, and put the search of SerpApi at ``search``."""
    download: Any = importlib.import_module("kore.fetch.download")  # the package has a function of that name
    judge = download.is_public
    download.is_public = lambda address: address == own or judge(address)
    download._look_up = lambda host, port: [names.get(host, host)]
    serpapi.API, serpapi.SerpApi = search, functools.partial(serpapi.SerpApi, base_url=search)  # type: ignore[misc]


if __name__ == "__main__":
    install(**json.loads(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))

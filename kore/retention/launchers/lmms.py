"""lmms-eval's own command line, with the model ``kore`` registered whether or not its entry point is installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Run ``lmms_eval ARGUMENTS``. Its exit status says nothing: look for the results file."""
    sys.argv = ["lmms_eval", *arguments]
    from lmms_eval.models import MODEL_REGISTRY_V2

    from kore.retention.lmms_model import manifest

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    from lmms_eval.__main__ import cli_evaluate

    cli_evaluate()

"""Processes for tests that train in them."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def clean_processes() -> ForkServerContext:
    """A context whose processes are forked from one that has imported much and computed nothing.

    A fork of the test process itself cannot run a backward pass where an earlier test has started autograd's threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "peft", "transformers.models.llama.modeling_llama", "kore.adapter"])
    return context

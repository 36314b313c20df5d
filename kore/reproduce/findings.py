"""What the paper's two findings about covariances rest on (section 3.3, Table 7 and Figure 4), measured in a world.

The first: where each layer's weight is rebuilt from all but its smallest components, how much old knowledge is left.
The second: how much alike the covariances of tasks of one dimension are, and of tasks of different ones.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import torch

from kore.reproduce import inputs
from kore.reproduce.prepare import World
from kore.reproduce.world.old import DIMENSIONS

METHODS = ("svd", "asvd", "co-svd")
CUTS = (0.125, 0.25, 0.5, 0.75)
"""Shares of the components that are dropped."""


def rebuilt(weight: torch.Tensor, C: torch.Tensor, method: str, share: float) -> torch.Tensor:
    """W_r = U_k U_kᵀ W0 with the k left vectors that the svd of W0 S keeps, as
    :func:`kore.analysis.reconstruction.discard_errors` has it.

    Args:
        weight: W0 (d_out, d_in).
        C: (d_in, d_in).
        method: "svd", S = 1; "asvd", S = diag(C)^(1/4); "co-svd", S = C.
        share: Of the min(d_out, d_in) components, dropped.

    Returns:
        (d_out, d_in), of the dtype of ``weight``.
    """
    W, C = weight.double(), C.double()
    scaled = {"svd": lambda: W, "asvd": lambda: W * C.diagonal().clamp(min=0).pow(0.25), "co-svd": lambda: W @ C}
    U = torch.linalg.svd(scaled[method](), full_matrices=False).U
    kept = U[:, : max(1, round(U.shape[1] * (1 - share)))]
    return (kept @ (kept.mT @ W)).to(weight.dtype)


def measure(world: World, split: str) -> dict[str, Any]:
    """``reconstruction``: K.R by method and share dropped. ``similarity``: tasks, their matrix (mean over the layers'
    inputs of ⟨C_a, C_b⟩ / (‖C_a‖ ‖C_b‖)), its mean ``within`` a dimension and ``across`` dimensions."""
    return {"reconstruction": reconstruction(world, split), "similarity": similarity(world)}


def reconstruction(world: World, split: str) -> dict[str, dict[str, float]]:
    """K.R of the model with every adapted layer rebuilt; C is the balanced one of all old dimensions."""
    import kore
    from kore.data import load_questions
    from kore.metrics import knowledge_retention
    from kore.models import language_model_linears
    from kore.reproduce.scoring import dimension_scores, task_scores

    cov = inputs.merged(inputs.captured(world), inputs.COVARIANCE, "balanced", (), world.about["sha256"])
    start = inputs.load_start(world.checkpoint)
    questions = load_questions(world.old_questions[split])
    found: dict[str, dict[str, float]] = {}
    for method, share in itertools.product(METHODS, CUTS):
        model = copy.deepcopy(start)
        with torch.no_grad():
            for name in language_model_linears(model):
                layer = model.get_submodule(name)
                layer.weight.copy_(rebuilt(layer.weight, cov[name], method, share))
        result = kore.evaluate(
            model,
            inputs.encoder_of(world),
            questions,
            batch_size=inputs.EVALUATION_BATCH,
            max_new_tokens=inputs.MAX_NEW_TOKENS,
            progress=False,
        )
        kept = knowledge_retention(dimension_scores(task_scores(result.answers)))
        found.setdefault(method, {})[f"{share:g}"] = kept
    return found


def similarity(world: World) -> dict[str, Any]:
    """Covariances of single tasks compared in pairs."""
    import kore
    from kore.analysis.similarity import frobenius_similarity
    from kore.data import prompt_batches

    model, encode = inputs.load_start(world.checkpoint), inputs.encoder_of(world)
    sets, dimension = {}, {}
    for name, tasks in DIMENSIONS.items():
        talks = inputs.conversations(world.old_groups[name])
        for position, task in enumerate(tasks):
            batches = prompt_batches(talks[position :: len(tasks)], encode, inputs.CAPTURE_BATCH)
            sets[task], dimension[task] = kore.capture_covariance(model, batches, progress=False), name
    first = next(iter(sets.values()))
    matrices = [frobenius_similarity([each[group.name] for each in sets.values()]) for group in first.groups]
    mean = np.mean(matrices, axis=0)
    pairs: dict[bool, list[float]] = {True: [], False: []}
    for (i, a), (j, b) in itertools.combinations(enumerate(sets), 2):
        pairs[dimension[a] == dimension[b]].append(float(mean[i, j]))
    return {
        "tasks": list(sets),
        "matrix": mean.tolist(),
        "within": sum(pairs[True]) / len(pairs[True]),
        "across": sum(pairs[False]) / len(pairs[False]),
    }

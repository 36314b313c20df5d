"""Ask a model questions, mark the answers, say how sure the marks are, and compare results.

:func:`evaluate` writes answers as they come, so a killed run goes on where it stopped, with any number of processes.
"""

from kore.evaluation.generation import evaluate
from kore.evaluation.measures import Measures
from kore.evaluation.prompts import ProcessorPrompts, load_prompts
from kore.evaluation.results import Answer, EvalResult, LeftOut, Score, load_result

__all__ = [
    "Answer",
    "EvalResult",
    "LeftOut",
    "Measures",
    "ProcessorPrompts",
    "Score",
    "evaluate",
    "load_prompts",
    "load_result",
]

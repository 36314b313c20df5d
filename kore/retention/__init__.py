"""What a model has kept: the paper's twelve benchmarks by the engines that have them, and an offline suite.

* :mod:`kore.retention.benchmarks` the table: dimensions, tasks, metrics, scales
* :mod:`kore.retention.engines` lmms-eval and VLMEvalKit, each in a process of its own
* :mod:`kore.retention.offline` local sets in one JSON format, which need neither
* :mod:`kore.retention.run` all of it for one model
"""

from kore.retention.benchmarks import BENCHMARKS, DIMENSIONS, Benchmark, Task
from kore.retention.engines.base import Asked, Outcome, Settings
from kore.retention.run import Retention, load_retention, run_retention

__all__ = [
    "BENCHMARKS",
    "DIMENSIONS",
    "Asked",
    "Benchmark",
    "Outcome",
    "Retention",
    "Settings",
    "Task",
    "load_retention",
    "run_retention",
]

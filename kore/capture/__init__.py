"""From a model and batches of old data to the input covariance of every layer.

``run`` has the public calls, ``plan`` says what memory they take and ``windows`` keeps it within a budget. ``engine``
is one pass over the data: ``hooks`` feeds the model, ``selection`` and ``rows`` say which rows count, ``input_groups``
finds the layers that share an input, ``accumulator`` sums each input through a token buffer into a matrix that
``storage`` has placed, ``checkpoint`` makes a killed run go on, and ``kore.distributed`` adds up what
several processes have captured. ``gradients`` does the same with the gradients at the layers' outputs.
"""

from kore.capture.plan import MemoryPlan
from kore.capture.run import capture_covariance, capture_output_gradients, plan_capture

__all__ = ["MemoryPlan", "capture_covariance", "capture_output_gradients", "plan_capture"]

"""From a model and batches of old data to the input covariance of every layer.

``run`` hooks the layers and feeds the model, ``input_groups`` finds the layers that share an input, ``accumulator``
sums each input through a token buffer, ``checkpoint`` makes a killed run go on.
"""

from kore.capture.run import capture_covariance

__all__ = ["capture_covariance"]

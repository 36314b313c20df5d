"""Measures KORE's kernels beside what they replace, on the user's own machine.

``timing`` times contenders in turn, ``memory`` weighs what they keep, ``check`` holds them to float64 first,
``machine`` measures what the hardware can do. ``covariance`` measures one update beside the ``peers``, ``capture``
one pass over a model; ``lora`` adapted linear layers (``lora_layers``) beside the ``lora_peers``, ``step`` training
steps of the models of ``step_peers``. ``show``, ``show_lora`` and ``show_step`` make tables and pictures. ``kore
bench`` and the suites in ``benchmarks/`` are built from these.
"""

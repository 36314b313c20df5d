"""What a model has kept: the paper's twelve benchmarks by the engines that have them, and an offline suite."""

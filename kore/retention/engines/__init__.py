"""The programs that run benchmarks, each in a process of its own."""

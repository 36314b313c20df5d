"""The stages of ``kore run``: configuration, stage keys, the stages themselves and their report."""

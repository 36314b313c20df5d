"""The worlds of the miniature: what a model knows before, what it is to learn, and the questions about both.

A world is a number. It fixes the facts, who is drawn how, and which wordings are for training and which for tests.
"""

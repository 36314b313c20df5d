"""KORE-Augmentation: one piece of knowledge becomes dialogues, recognition, captions and visual questions.

Source: arXiv 2510.19316, section 3.1.
"""

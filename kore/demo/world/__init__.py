"""The demo's small world: OLD knowledge the model has, NEW knowledge to inject, and their train and test splits."""

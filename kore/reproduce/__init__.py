"""The paper's comparison in miniature: small models of the real classes, worlds of knowledge, cells and tables."""

"""What runs inside an engine's process; started as files, with that engine's own interpreter."""

"""Checkpoints that are quantised already: how their tensors become codes of this project's schemes."""

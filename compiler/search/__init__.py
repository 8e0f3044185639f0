"""A search over recipes of one model: proposed, dropped by estimates, measured, and the front of the rest."""

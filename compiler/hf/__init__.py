"""The bridge to transformers: configs, unmodified models, and the three registries that tracing replaces."""

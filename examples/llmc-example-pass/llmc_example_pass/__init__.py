"""A pass for llmc that lives outside of it."""

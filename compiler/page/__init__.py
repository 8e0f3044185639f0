"""Self-contained HTML: one frame and plots as inline SVG, shared by reports and comparisons."""

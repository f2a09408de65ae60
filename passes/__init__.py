"""Graph in, graph out: tracing, channel analysis, and the passes that rewrite a network."""

"""`RandLoraLinear`, merging, and putting it into a model."""

"""The operators as functions of tensors, and their gradients."""

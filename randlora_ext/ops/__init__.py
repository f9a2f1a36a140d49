"""The operators as functions of tensors, their gradients, and the choice of a path."""

"""Layers with adapters: `RandLoraLinear`, what PEFT's layers share with it, and merging."""

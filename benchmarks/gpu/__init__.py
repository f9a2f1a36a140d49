"""The stages of benchmarks/gpu_run.py. Each runs alone, too: `python -m gpu.NAME` in benchmarks/.

stages                  their order and commands
card, rows, report      timing; results on disk; results as tables
ceilings                what the card can do: copy rate, GEMM rates
hadamard_torch          a step on Hadamard bases in plain torch; needs no extension
parity                  bases of every kind against float64 at 4096
layers, kernels, model  a layer by every method; every operator; a whole model
floors, expected        the least work of an operator; the table of docs/cuda.md made of it
small_shapes            what compute-sanitizer watches
"""

"""The stages of benchmarks/gpu_run.py. Each runs alone, too: `python -m gpu.NAME` in benchmarks/.

stages                  their order and commands
card, rows, report      timing; results on disk; results as tables
ceilings                what the card can do: copy rate, GEMM rates
parity                  bases of every kind against float64, of the sizes that are timed
model                   an eager step of a whole model; host and device apart
layers, kernels         a layer by every method; every operator (each_operator)
floors, expected        the least work of an operator; the table of docs/cuda.md made of it
"""

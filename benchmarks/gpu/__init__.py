"""The stages of benchmarks/gpu_run.py, one concept a file; each runs as `python -m gpu.NAME`.

stage           a stage's deadline, and its rows, which reach the disk as they are made
card            the device that is measured: events, cache flush, graphs, memory
ceilings        what the card can do: copy rate, GEMM rate                        [a stage]
build           the extension, for the card at hand                               [a stage]
checks          the tests of tests/gpu                                            [a stage]
sanitizer       compute-sanitizer over small_shapes                               [a stage]
layers          one layer, forward and backward, of the `methods`                 [a stage]
kernels         every operator and its kernels beside their floors                [a stage]
floors          the least work of an operator
kernel_floors   of each of its kernels, for the `work` of a call: factored_floors, delta_floors,
                packing_floors
model           a Llama-3.2-3B-shaped model, tokens/s                             [a stage]
report          the readable tables
"""

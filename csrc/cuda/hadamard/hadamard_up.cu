// y[t, o] = scale row[o] sum over c of H[o, c] v[c] [+ y], with c = j * n + i and
//
//   v[c] = col[c] lam[c] * sum over m of H[j, m] z[m, t, i]
//
// A thread block takes one token, or several if rows are short. Threads mix the rank indices in
// registers and write them to shared memory; the low pass multiplies by lam and col; the last bits
// go from shared memory to y.
//
// Floor: z read, y read and written once: with 16 bits 6 bytes an element, against some 42
// instructions. lam, col and row come from L1 for every token but the first.
#include "../device/launch.h"
#include "../kernels.h"
#include "mix.h"
#include "write.h"

namespace randlora::cuda {
namespace {

template <class S, bool Aligned, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kThreads, 2)
    hadamard_up_kernel(HadamardUp p, RowsOut<S> out, Diagonal<C> diagonal, int log,
                       int64_t of_block) {
  const Rows<C> rows{reinterpret_cast<C*>(shared_memory())};
  const int64_t t0 = blockIdx.x * of_block;
  const int tokens = static_cast<int>(min(of_block, p.T - t0));
  mix<Aligned>(p.sizes, static_cast<const ClassOf<S>*>(p.z), p.T, rows, log, t0, tokens);
  __syncthreads();
  transform_and_write<Aligned>(diagonal, out, rows, log, t0, tokens);
}

}  // namespace

// One launch.
void hadamard_up(const HadamardUp& p, Device& device) {
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    const Plan<S> plan(p.sizes, p.T / device.multiprocessors, device);
    const RowsOut<S> out(p, p.y, p.accumulate ? p.y : nullptr);
    launch(device, "hadamard_up",
           out.aligned && aligned_to_16(p.z) ? hadamard_up_kernel<S, true>
                                             : hadamard_up_kernel<S, false>,
           ceil_div(p.T, plan.rows), plan.threads, plan.shared, p, out, Diagonal<ComputeOf<S>>(p),
           plan.log, plan.rows);
  });
}

}  // namespace randlora::cuda

#include "gemm.h"

#include <algorithm>
#include <atomic>
#include <mutex>

#include "backend.h"

namespace randlora {
namespace {

std::atomic<int64_t> products_made{0};

// addmm_out and baddbmm_out, of one matrix and of a batch.
using GemmFunction = AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle,
                                        AtenTensorHandle, double, double);
struct GemmFunctions {
  GemmFunction one, batch;
};

// tools/load_gate.py reads these names.
const GemmFunctions& gemm_functions(bool cpu) {
  if (cpu) {
    static const GemmFunctions on_cpu{
        torch_function<GemmFunction>("libtorch_cpu.so", "aoti_torch_cpu_addmm_out"),
        torch_function<GemmFunction>("libtorch_cpu.so", "aoti_torch_cpu_baddbmm_out")};
    return on_cpu;
  }
  static const GemmFunctions on_cuda{
      torch_function<GemmFunction>("libtorch_cuda.so", "aoti_torch_cuda_addmm_out"),
      torch_function<GemmFunction>("libtorch_cuda.so", "aoti_torch_cuda_baddbmm_out")};
  return on_cuda;
}

// `multiply` by one call of torch's GEMM or, in 16 bits on the CPU, where torch copies matrices of
// a batch that are not contiguous, by one for each matrix.
void multiply_at_once(const MatrixBatch& out, const MatrixBatch& left, const MatrixBatch& right,
                      double factor, double keep) {
  const bool cpu = out.memory->is_cpu();
  const GemmFunctions& gemm = gemm_functions(cpu);
  const int64_t step = cpu && bytes_of(out.dtype) == 2 ? 1 : out.count;
  const GemmFunction function = step == 1 ? gemm.one : gemm.batch;
  for (int64_t i = 0; i < out.count; i += step) {
    const Tensor to = out.matrices(i, step).tensor();
    const Tensor a = left.matrices(i, step).tensor(), b = right.matrices(i, step).tensor();
    // The summand is the very tensor `out`: torch would copy any other one to it.
    TORCH_ERROR_CODE_CHECK(function(to.get(), to.get(), a.get(), b.get(), keep, factor));
  }
}

// In a parallel region torch's GEMMs use one thread each, but MKL and oneDNN cut a product as for
// all of them, unless they are told otherwise. Both settings are those of the calling thread.
class OneThread {
 public:
  OneThread()
      : mkl_(settings().mkl ? settings().mkl(1) : 0),
        omp_(settings().omp ? settings().omp_now() : 0) {
    if (settings().omp) settings().omp(1);
  }
  ~OneThread() {
    if (settings().mkl) settings().mkl(mkl_);
    if (settings().omp) settings().omp(omp_);
  }

 private:
  struct Settings {  // null where torch has another BLAS, or other threads
    int (*mkl)(int);
    void (*omp)(int);
    int (*omp_now)();
  };
  static Settings find_settings() {
    constexpr const char* library = "libtorch_cpu.so";
    Settings found;
    found.mkl = reinterpret_cast<int (*)(int)>(torch_symbol(library, "MKL_Set_Num_Threads_Local"));
    found.omp = reinterpret_cast<void (*)(int)>(torch_symbol(library, "omp_set_num_threads"));
    found.omp_now = reinterpret_cast<int (*)()>(torch_symbol(library, "omp_get_max_threads"));
    return found;
  }
  static const Settings& settings() {
    static const Settings found = find_settings();
    return found;
  }
  int mkl_, omp_;
};

// How a product is cut for the CPU: into groups of matrices, or each matrix along its longer side.
// By sizes alone, so that results do not depend on the number of threads.
struct Cut {
  int64_t groups, parts, length;
  bool across_rows;  // of the result; otherwise across its columns

  Cut(const MatrixBatch& out, int64_t depth)
      : length(std::max(out.rows, out.cols)), across_rows(out.rows >= out.cols) {
    constexpr int64_t kLeast = int64_t{1} << 21, kMost = 64;  // multiply-adds of a slice; slices
    const int64_t work = out.count * out.rows * out.cols * depth;
    const int64_t slices = std::clamp<int64_t>(work / kLeast, 1, kMost);
    groups = std::min(slices, out.count);
    parts = std::min(slices / groups, steps());
  }
  int64_t steps() const { return (length + kStep - 1) / kStep; }
  // The first row or column of a part.
  int64_t begin(int64_t part) const { return std::min(steps() * part / parts * kStep, length); }
  static constexpr int64_t kStep = 16;
};

}  // namespace

// A tensor from a pointer would make torch ask the driver on which card the pointer is.
Tensor MatrixBatch::tensor() const {
  const int64_t sizes[3] = {count, rows, cols},
                strides[3] = {matrix_stride, row_stride, col_stride};
  const size_t skip = count == 1 ? 1 : 0;
  if (runs_on_cuda(*memory)) {
    AtenTensorHandle view;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
        memory->get(), static_cast<int64_t>(3 - skip), sizes + skip, strides + skip, first, &view));
    return Tensor(view);
  }
  void* data = moved(const_cast<void*>(memory->const_data_ptr()), first, dtype);
  return torch::stable::from_blob(data, {sizes + skip, 3 - skip}, {strides + skip, 3 - skip},
                                  memory->device(), scalar_type(dtype));
}

MatrixBatch contiguous_matrix(const Tensor& memory, DType dtype, int64_t first, int64_t rows,
                              int64_t cols) {
  MatrixBatch m;
  m.memory = &memory;
  m.dtype = dtype;
  m.first = first;
  m.rows = rows;
  m.cols = cols;
  m.row_stride = cols;
  return m;
}

void multiply(const MatrixBatch& out, const MatrixBatch& left, const MatrixBatch& right,
              double factor, double keep) {
  if (runs_on_cuda(*out.memory)) {
    products_made.fetch_add(1, std::memory_order_relaxed);
    return multiply_at_once(out, left, right, factor, keep);
  }
  const Cut cut(out, left.cols);
  std::exception_ptr failed;
  std::mutex lock;
  const auto slice = [&](int64_t group, int64_t part) {
    const int64_t first = out.count * group / cut.groups;
    const int64_t count = out.count * (group + 1) / cut.groups - first;
    const int64_t begin = cut.begin(part), end = cut.begin(part + 1);
    MatrixBatch to = out.matrices(first, count);
    MatrixBatch a = left.matrices(first, count), b = right.matrices(first, count);
    if (cut.across_rows) {
      to = to.part_of_rows(begin, end);
      a = a.part_of_rows(begin, end);
    } else {
      to = to.part_of_cols(begin, end);
      b = b.part_of_cols(begin, end);
    }
    multiply_at_once(to, a, b, factor, keep);
  };
  TorchRuntime runtime;
  const int64_t slices = cut.groups * cut.parts;
  // At least two slots, because one would run outside of a parallel region.
  runtime.each_slot(static_cast<int>(std::max<int64_t>(slices, 2)), [&](int64_t s) {
    if (s >= slices) return;
    const OneThread guard;
    try {
      // Here, because torch keeps its message for the thread that failed.
      explained([&] { slice(s / cut.parts, s % cut.parts); });
    } catch (...) {
      const std::lock_guard<std::mutex> locked(lock);
      failed = std::current_exception();
    }
  });
  if (failed) std::rethrow_exception(failed);
}

int64_t products() { return products_made; }

}  // namespace randlora

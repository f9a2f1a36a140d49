#include "backend.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>

namespace randlora {
namespace {

using OperatorLibrary = torch::stable::detail::StableLibrary;

const CudaKernels* loaded = nullptr;
std::map<Card, std::string> refusals;  // of the cards that were asked
std::mutex refusals_lock;
bool serves_cpu = false;
std::atomic<int64_t> products_made{0};

// CPU builds of torch lack some of these functions. Looking them up at run time lets one binary
// serve CPU and CUDA builds. Their C interface is stable (torch/csrc/inductor/aoti_torch).
using CurrentStream = AOTITorchError (*)(int32_t, void**);
// addmm_out and baddbmm_out.
using ProductOut = AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle,
                                      AtenTensorHandle, double, double);

// Null if `library` is not loaded or lacks it.
void* symbol(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? dlsym(handle, name) : nullptr;
}

template <class F>
F entry(const char* library, const char* name) {
  void* found = symbol(library, name);
  RANDLORA_CHECK(found != nullptr, "this torch has no ", name, " in ", library,
                 ", which the CUDA kernels need; torch >= 2.11 with CUDA has it");
  return reinterpret_cast<F>(found);
}

struct Products {
  ProductOut one, batch;
  Products(const char* library, const std::string& device)
      : one(entry<ProductOut>(library, ("aoti_torch_" + device + "_addmm_out").c_str())),
        batch(entry<ProductOut>(library, ("aoti_torch_" + device + "_baddbmm_out").c_str())) {}
};

const Products& products_of(bool cpu) {
  if (cpu) {
    static const Products on_cpu("libtorch_cpu.so", "cpu");
    return on_cpu;
  }
  static const Products on_cuda("libtorch_cuda.so", "cuda");
  return on_cuda;
}

// `multiply` by one call of torch's GEMM or, in 16 bits on the CPU, where torch copies matrices of
// a batch that are not contiguous, by one for each matrix.
void multiply_at_once(const MatrixBatch& out, const MatrixBatch& left, const MatrixBatch& right,
                      double alpha, double beta) {
  const bool cpu = out.in->is_cpu();
  const Products& products = products_of(cpu);
  const int64_t step = cpu && bytes_of(out.dtype) == 2 ? 1 : out.count;
  for (int64_t i = 0; i < out.count; i += step) {
    const auto matrix = [&](const MatrixBatch& m) { return m.matrices(i, step).tensor(); };
    // The summand is the very tensor `out`: torch would copy any other one to it.
    const Tensor to = matrix(out), a = matrix(left), b = matrix(right);
    TORCH_ERROR_CODE_CHECK((step == 1 ? products.one : products.batch)(to.get(), to.get(), a.get(),
                                                                       b.get(), beta, alpha));
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
  static const Settings& settings() {
    constexpr const char* library = "libtorch_cpu.so";
    static const Settings found{
        reinterpret_cast<int (*)(int)>(symbol(library, "MKL_Set_Num_Threads_Local")),
        reinterpret_cast<void (*)(int)>(symbol(library, "omp_set_num_threads")),
        reinterpret_cast<int (*)()>(symbol(library, "omp_get_max_threads"))};
    return found;
  }
  int mkl_, omp_;
};

// How a product is cut for the CPU: into groups of matrices, or each matrix along its longer side.
// By sizes alone, so that results do not depend on the number of threads.
struct Cut {
  int64_t groups, parts, length;
  bool by_row;

  Cut(const MatrixBatch& out, int64_t depth)
      : length(std::max(out.rows, out.cols)), by_row(out.rows >= out.cols) {
    constexpr int64_t kLeast = int64_t{1} << 21, kMost = 64;  // multiply-adds of a slice; slices
    const int64_t work = out.count * out.rows * out.cols * depth;
    const int64_t slices = std::clamp<int64_t>(work / kLeast, 1, kMost);
    groups = std::min(slices, out.count);
    parts = std::min(slices / groups, steps());
  }
  int64_t steps() const { return (length + kStep - 1) / kStep; }
  std::pair<int64_t, int64_t> lines(int64_t part) const {
    return {steps() * part / parts * kStep, std::min(steps() * (part + 1) / parts * kStep, length)};
  }
  static constexpr int64_t kStep = 16;
};

// The CUDA version that the driver serves, such as 13000; 0 without a driver. Only asks: a process
// that has started CUDA could not fork.
int driver_version() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  void* ask = driver ? dlsym(driver, "cuDriverGetVersion") : nullptr;
  int version = 0;
  return ask && reinterpret_cast<int (*)(int*)>(ask)(&version) == 0 ? version : 0;
}

// A driver serves libraries of its own major version of CUDA and of those before it; any call into
// a newer one would fail.
void check_driver(const CudaKernels& kernels) {
  int major = 0, minor = 0;
  if (std::sscanf(kernels.build, "nvcc %d.%d", &major, &minor) != 2) return;  // not for a card
  const int driver = driver_version();
  RANDLORA_CHECK(driver == 0 || driver / 1000 >= major, "the NVIDIA driver is for CUDA ",
                 driver / 1000, ".", driver % 1000 / 10, ", and the kernels, built by nvcc ", major,
                 ".", minor, ", need a driver for CUDA ", major);
}

// Not yet registered for CUDA tensors.
std::vector<Operator>& waiting() {
  static std::vector<Operator> all;
  return all;
}

void implement(OperatorLibrary& library, const Operator& op) {
  const std::string schema = op.schema;
  library.impl(schema.substr(0, schema.find('(')).c_str(), op.boxed);
}

}  // namespace

void throw_with_reason(const std::exception& error) {
  const std::string said = error.what();
  if (said.find("API call failed") == std::string::npos) throw;
  // torch 2.11 lacks this function.
  void* what = symbol("libtorch_cpu.so", "torch_exception_get_what_without_backtrace");
  const char* reason = what ? reinterpret_cast<const char* (*)()>(what)() : nullptr;
  if (reason && *reason) throw std::runtime_error(std::string("randlora: ") + reason);
  throw std::runtime_error(
      "randlora: torch refused, most likely for lack of memory; its own words are on stderr. " +
      said);
}

Operators::Operators(std::initializer_list<Operator> all) {
  using Kind = OperatorLibrary::Kind;
  static OperatorLibrary schemas(Kind::FRAGMENT, "randlora", nullptr, __FILE__, __LINE__);
  static OperatorLibrary cpu(Kind::IMPL, "randlora", "CPU", __FILE__, __LINE__);
  for (const Operator& op : all) schemas.def(op.schema), implement(cpu, op);
  waiting().insert(waiting().end(), all);
}

// A tensor from a pointer would make torch ask the driver on which card the pointer is.
Tensor MatrixBatch::tensor() const {
  const int64_t sizes[3] = {count, rows, cols}, strides[3] = {next, row, col};
  const size_t skip = count == 1 ? 1 : 0;
  if (runs_on_cuda(*in)) {
    AtenTensorHandle view;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
        in->get(), static_cast<int64_t>(3 - skip), sizes + skip, strides + skip, first, &view));
    return Tensor(view);
  }
  void* data = moved(const_cast<void*>(in->const_data_ptr()), first, dtype);
  return torch::stable::from_blob(data, {sizes + skip, 3 - skip}, {strides + skip, 3 - skip},
                                  in->device(), scalar_type(dtype));
}

void multiply(const MatrixBatch& out, const MatrixBatch& left, const MatrixBatch& right,
              double alpha, double beta) {
  if (runs_on_cuda(*out.in)) {
    products_made.fetch_add(1, std::memory_order_relaxed);
    return multiply_at_once(out, left, right, alpha, beta);
  }
  const Cut cut(out, left.cols);
  std::exception_ptr failed;
  std::mutex lock;
  const auto slice = [&](int64_t group, int64_t part) {
    const int64_t first = out.count * group / cut.groups,
                  count = out.count * (group + 1) / cut.groups - first;
    const auto [begin, end] = cut.lines(part);
    MatrixBatch to = out.matrices(first, count), a = left.matrices(first, count),
                b = right.matrices(first, count);
    if (cut.by_row)
      to = to.part_of_rows(begin, end), a = a.part_of_rows(begin, end);
    else
      to = to.part_of_cols(begin, end), b = b.part_of_cols(begin, end);
    multiply_at_once(to, a, b, alpha, beta);
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

void multiply_whole(const MatrixBatch& out, const MatrixBatch& left, const MatrixBatch& right,
              double alpha, double beta) { multiply_at_once(out, left, right, alpha, beta); }

void load_cuda(const std::string& path, bool serve_cpu_tensors) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  RANDLORA_CHECK(handle, "cannot load ", path, ": ", dlerror());
  const auto table = reinterpret_cast<CudaKernelsFunction>(dlsym(handle, kCudaSymbol));
  RANDLORA_CHECK(table, path, " has no symbol ", kCudaSymbol, "; it is not our CUDA library");
  const CudaKernels* kernels = table();
  RANDLORA_CHECK(kernels->interface == kCudaInterface, path,
                 " was built from other sources than this extension; install again");
  check_driver(*kernels);
  static OperatorLibrary cuda(OperatorLibrary::Kind::IMPL, "randlora", "CUDA", __FILE__, __LINE__);
  for (const Operator& op : waiting()) implement(cuda, op);
  waiting().clear();
  const std::lock_guard<std::mutex> locked(refusals_lock);
  refusals.clear();
  loaded = kernels;
  serves_cpu = serve_cpu_tensors;
}

int64_t products() { return products_made; }

std::string cuda_build() { return loaded ? loaded->build : ""; }

const CudaKernels& cuda_kernels() {
  RANDLORA_CHECK(loaded,
                 "the CUDA kernels are not loaded; randlora_ext.build_info()['cuda'] says "
                 "why");
  return *loaded;
}

bool runs_on_cuda(const Tensor& t) { return !t.is_cpu() || serves_cpu; }

std::string cuda_refusal(Card card) {
  const CudaKernels& kernels = cuda_kernels();
  const std::lock_guard<std::mutex> locked(refusals_lock);
  const auto found = refusals.find(card);
  if (found != refusals.end()) return found->second;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (card) guard.emplace(*card);
  const char* why = kernels.refusal(card.value_or(0));
  return refusals[card] = why ? why : "";
}

Card card_of(const Tensor& t) { return t.is_cpu() ? Card() : Card(t.get_device_index()); }

bool has_kernels(const Tensor& t) { return !runs_on_cuda(t) || cuda_refusal(card_of(t)).empty(); }

bool hadamard_fits(const HadamardSizes& sizes, DType dtype, Card card) {
  struct : Device {
    void* scratch(size_t) override { return nullptr; }
  } facts;
  cuda_kernels().describe(card.value_or(0), facts);
  return cuda_kernels().hadamard_fits(sizes, dtype, facts);
}

TorchDevice::TorchDevice(const Tensor& like) : like_(like) {
  const CudaKernels& kernels = cuda_kernels();
  const int index = card_of(like).value_or(0);
  const std::string refusal = cuda_refusal(card_of(like));
  RANDLORA_CHECK(refusal.empty(), "the CUDA kernels were not built for card ", index, ": ",
                 refusal);
  kernels.describe(index, *this);
  static const bool use_tf32 = [] {
    const char* value = std::getenv("RANDLORA_TF32");
    return value && std::string(value) == "1";
  }();
  tf32 = use_tf32;
  if (!like.is_cpu()) {
    static const auto current_stream =
        entry<CurrentStream>("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
    TORCH_ERROR_CODE_CHECK(current_stream(index, &stream));
    card_.emplace(index);
  }
  kernels.make_current(index);
}

void* TorchDevice::scratch(size_t bytes) {
  held_.push_back(allocate({static_cast<int64_t>(bytes)}, ScalarType::Byte, like_));
  return held_.back().mutable_data_ptr();
}

#define RANDLORA_RUN(name, Operator)              \
  void run(const Tensor& on, const Operator& p) { \
    if (runs_on_cuda(on)) {                       \
      TorchDevice device(on);                     \
      cuda_kernels().name(p, device);             \
    } else {                                      \
      TorchRuntime runtime;                       \
      cpu_kernels().name(p, runtime);             \
    }                                             \
  }
RANDLORA_OPERATORS(RANDLORA_RUN)
#undef RANDLORA_RUN

}  // namespace randlora

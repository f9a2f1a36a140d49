#include "backend.h"

#include <dlfcn.h>

#include <cstdio>
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

using CurrentStream = AOTITorchError (*)(int32_t, void**);
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

void* torch_symbol(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? dlsym(handle, name) : nullptr;
}

void throw_with_reason(const std::exception& error) {
  const std::string said = error.what();
  if (said.find("API call failed") == std::string::npos) throw;
  // torch 2.11 lacks this function.
  void* what = torch_symbol("libtorch_cpu.so", "torch_exception_get_what_without_backtrace");
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
  if (!like.is_cpu()) {
    static const auto current_stream =
        torch_function<CurrentStream>("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
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

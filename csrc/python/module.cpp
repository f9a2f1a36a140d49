// randlora_ext._C: loads the operators, reports how they were built, and exposes the host-side
// specification functions to tests. Everything else goes through torch.ops.randlora.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../core/ternary_spec.h"
#include "../cpu/dispatch.h"
#include "../torch/backend.h"
#include "../torch/gemm.h"

#if defined(__clang__)
#define RANDLORA_COMPILER "clang " __clang_version__
#else
#define RANDLORA_COMPILER "g++ " __VERSION__
#endif

namespace py = pybind11;
using Words4 = std::array<uint32_t, 4>;
using Words2 = std::array<uint32_t, 2>;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of randlora_ext: operators, build information, specification functions.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = RANDLORA_VERSION;
    info["compiler"] = RANDLORA_COMPILER;
    info["spec_version"] = randlora::kSpecVersion;
    info["built_isas"] = randlora::built_isas();
    return info;
  });
  m.def("available_isas", &randlora::available_isas,
        "Kernel sets of this build that this processor can run, best first.");
  m.def(
      "isa", [] { return std::string(randlora::cpu_kernels().isa); },
      "The kernel set in use. Raises RuntimeError where RANDLORA_ISA names one that cannot run.");
  m.def("load_cuda", &randlora::load_cuda, py::arg("path"), py::arg("serve_cpu_tensors") = false,
        "Loads the CUDA kernels. Raises RuntimeError with the reason where that cannot be.");
  m.def("cuda_build", &randlora::cuda_build, "Compiler and architectures; empty: not loaded.");
  m.def("cuda_refusal", &randlora::cuda_refusal, py::arg("card"),
        "Why the loaded CUDA kernels cannot run on this card (None: the CPU); empty: they can.");
  m.def("products", &randlora::products, "How many GEMMs the operators have started on cards.");
  m.def(
      "hadamard_fits",
      [](int64_t D, int64_t d, int64_t r, int64_t n, bool wide, int card) {
        const auto dtype = wide ? randlora::DType::f64 : randlora::DType::f32;
        randlora::HadamardSizes sizes;
        sizes.D = D;
        sizes.d = d;
        sizes.r = r;
        sizes.n = n;
        return randlora::hadamard_fits(sizes, dtype, card);
      },
      py::arg("D"), py::arg("d"), py::arg("r"), py::arg("n"), py::arg("wide"), py::arg("card"),
      "Whether the CUDA kernels serve Hadamard bases of these sizes; elsewhere plain torch does.");
  m.def("philox4x32_10", [](Words4 counter, Words2 key) {
    const auto out =
        randlora::philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return std::make_tuple(out.v[0], out.v[1], out.v[2], out.v[3]);
  });
  m.def("threshold", &randlora::threshold,
        "Integer threshold of a density; 0 where it is outside (0, 1].");
  m.def("element", &randlora::element);
}

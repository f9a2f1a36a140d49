// The factored path, forward and backward, against the CPU kernels, with B in every form.
#include "cpu/dispatch.h"
#include "cuda/kernels.h"
#include "factored.h"
#include "run_tests.h"

using namespace randlora;

namespace {

enum class Form { lists, planes, dense };

struct Case {
  int64_t in, out, r, T;
  double density;
  Form form;
  bool wide = false;
  bool accumulate = false;
  int64_t skip = 0;  // elements that take the alignment of every matrix away
  int64_t chunk_tokens = 1 << 20;
};

// B as planes, or unpacked beside the lists, in "device" memory.
struct FormOfB {
  Poisoned planes;
  Array dense;
  FormOfB(const Factored& f, DType dtype)
      : planes(int64_t(f.B.bits.size()) * 8), dense(dtype, f.B.dense) {
    std::memcpy(planes.get(), f.B.bits.data(), f.B.bits.size() * 8);
  }
  Basis apply(Basis b, Form form, const Factored& f) const {
    if (form == Form::planes) {
      const auto* words = static_cast<const uint64_t*>(planes.get());
      b.b_planes = {words, words + f.B.bits.size() / 2, f.B.planes.words};
      b.b_rows = b.b_cols = {};
    }
    if (form == Form::dense) b.b_dense = dense.get();
    return b;
  }
};

void check(const Case& c, DType dtype, bool tf32 = false) {
  const int64_t D = std::max(c.in, c.out), d = std::min(c.in, c.out), T = c.T;
  const Factored f(D, d, c.r, c.density, c.wide);
  const FormOfB form(f, dtype);
  const Basis basis = form.apply(f.basis, c.form, f);
  const DType compute = compute_of(dtype);
  const bool expand = d == c.in;
  const double scale = 0.7;
  TestDevice device;
  device.tf32 = tf32;
  device.chunk_bytes = c.chunk_tokens * f.K * bytes_of(dtype);
  ThreadRuntime rt(1);

  const Array lam(compute, normal_values(f.K, 1)), gam(compute, normal_values(f.n * d, 2));
  const Array x(dtype, normal_values(T * c.in, 3), c.skip),
      dy(dtype, normal_values(T * c.out, 4), c.skip);
  const auto out = [&](int64_t count, unsigned seed) {
    return c.accumulate ? Array(dtype, normal_values(count, seed), c.skip)
                        : Array(dtype, count, c.skip);
  };
  const Array y = out(T * c.out, 5), want_y = out(T * c.out, 5);
  const Array dx = out(T * c.in, 6), want_dx = out(T * c.in, 6), dx_alone = out(T * c.in, 6);
  const Array dlam(compute, f.K), want_dlam(compute, f.K), dlam_alone(compute, f.K);
  const Array dgam(compute, f.n * d), want_dgam(compute, f.n * d), dgam_alone(compute, f.n * d);

  const auto forward = [&](const Array& to) {
    return Linear{basis, lam.get(), gam.get(), x.get(), to.get(),
                  dtype, T,         scale,     expand,  c.accumulate};
  };
  const auto backward = [&](const Array* dx, const Array* dlam, const Array* dgam) {
    return LinearBackward{basis,
                          lam.get(),
                          gam.get(),
                          x.get(),
                          dy.get(),
                          dx ? dx->get() : nullptr,
                          dtype,
                          T,
                          scale,
                          expand,
                          c.accumulate,
                          dlam ? dlam->get() : nullptr,
                          dgam ? dgam->get() : nullptr};
  };
  cuda::linear(forward(y), device);
  cuda::linear_backward(backward(&dx, &dlam, &dgam), device);
  cuda::linear_backward(backward(&dx_alone, nullptr, nullptr), device);
  cuda::linear_backward(backward(nullptr, &dlam_alone, &dgam_alone), device);
  cpu_kernels().linear(forward(want_y), rt);
  cpu_kernels().linear_backward(backward(&want_dx, &want_dlam, &want_dgam), rt);

  const auto compare = [&](const char* what, const Array& got, const Array& want) {
    // T = 0: nothing to compare but zeros, and outputs that nobody touched.
    const double error = relative_error(got.values(), want.values());
    EXPECT(error <= tolerance(dtype, tf32),
           "%s: %.2e for dtype %d tf32 %d in %ld out %ld r %ld T %ld density %.2f form %d wide %d "
           "accumulate %d skip %ld",
           what, error, int(dtype), tf32, long(c.in), long(c.out), long(c.r), long(T), c.density,
           int(c.form), c.wide, c.accumulate, long(c.skip));
  };
  compare("y", y, want_y);
  compare("dx", dx, want_dx);
  compare("dlam", dlam, want_dlam);
  compare("dgam", dgam, want_dgam);
  EXPECT(dx_alone.raw() == dx.raw() && dlam_alone.raw() == dlam.raw() &&
             dgam_alone.raw() == dgam.raw(),
         "what is not wanted changes what is: dtype %d T %ld", int(dtype), long(T));
}

// Scratch does not grow with the number of chunks.
void bounded_scratch() {
  class Counting : public TestDevice {
   public:
    void* scratch(size_t bytes) override {
      total += bytes;
      return TestDevice::scratch(bytes);
    }
    size_t total = 0;
  };
  const DType dtype = DType::bf16;
  const Factored f(70, 33, 4, 0.3);
  const FormOfB form(f, dtype);
  const auto bytes = [&](Form kind, int64_t T, bool expand) {
    const Basis basis = form.apply(f.basis, kind, f);
    Counting device;
    device.chunk_bytes = 128 * f.K * bytes_of(dtype);
    device.multiprocessors = 50;  // b_planes shares sums between blocks, through scratch
    const Array lam(DType::f32, normal_values(f.K, 1)),
        gam(DType::f32, normal_values(f.n * f.d, 2));
    const Array x(dtype, normal_values(T * (expand ? f.d : f.D), 3)),
        y(dtype, T * (expand ? f.D : f.d));
    cuda::linear({basis, lam.get(), gam.get(), x.get(), y.get(), dtype, T, 1, expand, false},
                 device);
    return device.total;
  };
  for (const Form kind : {Form::lists, Form::planes})
    for (const bool expand : {false, true})
      EXPECT(bytes(kind, 128, expand) == bytes(kind, 500, expand),
             "scratch grows with T: form %d expand %d", int(kind), expand);
}

void tests() {
  const Case cases[] = {
      // in, out, r, T, density, form, wide, accumulate, skip, chunk_tokens
      {1, 1, 1, 1, 1.0, Form::lists},
      {33, 70, 8, 5, 0.05, Form::lists, true},                // expand
      {70, 33, 8, 17, 1.0 / 3, Form::lists, false, true, 1},  // reduce
      {40, 40, 8, 33, 1.0 / 3, Form::lists, false, true},     // square
      {20, 30, 32, 9, 1.0 / 3, Form::lists},                  // r > d
      {30, 20, 5, 0, 1.0 / 3, Form::lists, false, true},      // no tokens
      {130, 65, 7, 1, 0.05, Form::lists},                     // one token
      {65, 130, 7, 130, 1.0, Form::lists, false, false, 3},
      {48, 96, 16, 300, 0.1, Form::lists, false, true, 0, 128},  // chunks, the last of few tokens
      {96, 48, 16, 270, 0.1, Form::lists, true, false, 0, 128},
      {96, 48, 16, 700, 0.1, Form::lists, false, true, 0, 512},  // z of a chunk in parts
      {40, 40, 2, 40, 0.1, Form::dense, false, true},
      {40, 40, 8, 33, 1.0 / 3, Form::dense, false, true},
      {70, 33, 8, 17, 0.05, Form::dense},
      {33, 70, 8, 5, 0.05, Form::dense, false, true},
      {48, 96, 16, 300, 0.1, Form::dense, false, true, 0, 128},
      {33, 70, 8, 17, 1.0 / 3, Form::planes, false, true},
      {70, 33, 8, 5, 1.0, Form::planes},
      {96, 48, 16, 130, 1.0 / 3, Form::planes, false, true, 0, 128},
  };
  for (const Case& c : cases)
    for (const DType dtype : kTypes) {
      check(c, dtype);
      if (dtype == DType::f32) check(c, dtype, true);
    }
  bounded_scratch();
}

}  // namespace

int main() { return run_tests(tests); }

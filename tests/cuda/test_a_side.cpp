// Up, down and gradient of the A side against plain sums in double.
#include "cuda/independent/a_side.h"
#include "layer.h"
#include "test_device.h"

using namespace randlora;

namespace {

struct Case {
  int64_t d, r, T;
  double density;
  int64_t skip = 0;            // elements that take the alignment of every matrix away
  int64_t shared = 227 << 10;  // of a block
  int multiprocessors = 3;
  int64_t chunk_bytes = 64 << 20;
};

struct Side {
  const Case& c;
  const DType dtype, compute = compute_dtype(dtype);
  const int64_t T = c.T;
  Layer L{1, c.d, c.r, c.density};
  TernaryBases basis = L.basis(Form::lists);
  Array lam{compute, L.lam}, gam{compute, L.gam};
  TestDevice device{128, c.shared, c.multiprocessors};

  Side(const Case& c_, DType dtype_) : c(c_), dtype(dtype_) {
    device.chunk_bytes = c.chunk_bytes;
    set_case_of(device, L, basis, dtype, T, false, c.skip);
  }
  cuda::ASideCall call(const Array& z) {
    IndependentLinear layer{};
    layer.basis = basis;
    layer.lam = lam.get();
    layer.gam = gam.get();
    layer.dtype = dtype;
    layer.T = T;
    layer.scale = L.scale;
    layer.up = true;
    cuda::ASideCall made(layer, T, device);
    made.set_operand(z.get(), T);
    return made;
  }

  struct Results {
    Array V, out, dlam, dgam;
  };
  Results run(const Array& z, const Array& U) {
    Results all{Array(dtype, T * L.K, c.skip), Array(dtype, T * L.d, c.skip), Array(compute, L.K),
                Array(compute, L.n * L.d)};
    cuda::ASideCall a = call(z);
    a.up(all.V.get());
    a.down(U.get(), T, all.out.get(), false);
    a.grad(U.get(), all.dlam.get(), all.dgam.get(), false);
    return all;
  }
};

void check(const Case& c, DType dtype) {
  Side s(c, dtype);
  const int64_t T = c.T, d = c.d, K = s.L.K;
  const double bound = tolerance(dtype);
  const Array z(dtype, normal(T * d, 3), c.skip), U(dtype, normal(T * K, 4), c.skip),
      start(dtype, normal(T * d, 5), c.skip);
  const Values zs = z.values(), us = U.values(), scaled = s.L.scaled(), old = start.values();
  const auto got = s.run(z, U);
  compare("V", got.V, product(zs, scaled, T, K, d, true, s.L.scale), bound);
  const Values want = product(us, scaled, T, d, K, false, s.L.scale);
  compare("out", got.out, want, bound);
  s.call(z).down(U.get(), T, start.get(), true);
  compare("out + out", start, sum(old, want), bound);
  // No rounding but of sums: U and z are exact.
  const double exact = tolerance(s.compute);
  const auto [dlam, dgam] = s.L.gradients(product(us, zs, K, d, T, false, s.L.scale, true));
  compare("dlam", got.dlam, dlam, exact);
  compare("dgam", got.dgam, dgam, exact);

  // The same bits with tables that the basis brings along.
  const Lists& a = s.basis.a;
  const Poisoned tables(support_numbers(a.count, c.r, d) * 4);
  s.basis.a_tables = static_cast<const int32_t*>(tables.get());
  cuda::support_tables(a, c.r, d, static_cast<int32_t*>(tables.get()), s.device);
  const auto again = s.run(z, U);
  EXPECT(again.V.raw() == got.V.raw() && again.out.raw() == got.out.raw() &&
             again.dlam.raw() == got.dlam.raw() && again.dgam.raw() == got.dgam.raw(),
         "tables change results,");
}

void few() {
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const int64_t T : {2, 150}) check({70, 3, T, 0.3, 0, 227 << 10, 40}, dtype);
}

void tests() {
  const int64_t small = 99 << 10;  // the least that a supported card has
  const Case cases[] = {
      // d, r, T, density, skip, shared, multiprocessors
      {1, 1, 1, 1.0},                                         // everything is one
      {33, 8, 5, 0.05},                                       // empty rows of A
      {33, 8, 1, 0.05},                                       // one token
      {64, 8, 0, 1.0 / 3},                                    // no tokens
      {64, 8, 17, 1.0 / 3},                                   // n = 8: aligned rows of V
      {64, 8, 17, 1.0 / 3, 1},                                // the same matrices, unaligned
      {30, 64, 9, 1.0 / 3},                                   // r > d, n = 1
      {40, 5, 3, 0.0},                                        // A is zero
      {65, 1, 130, 1.0, 0, small},                            // n = 65: more than a tile of bases
      {200, 6, 33, 0.05},                                     // n = 34
      {150, 2, 40, 1.0 / 3, 3, small},                        // n = 75, odd
      {272, 2, 16, 0.02},                                     // few tokens, n = 136
      {272, 2, 150, 0.3, 0, small, 1},                        // large tiles, ranges of columns
      {200, 1, 40, 1.0, 0, small, 1},                         // more entries than a chunk of a_down
      {200, 1, 20, 1.0, 1, small, 1},                         // the same in its small tile
      {160, 8, 140, 1.0, 0, 227 << 10, 50},                   // many SMs: small tiles, split tokens
      {48, 3, 600, 0.3, 0, 227 << 10, 50},                    // splits of the gradient
      {48, 3, 900, 0.3, 0, 227 << 10, 50, 384 * 48 * 2 * 4},  // and z in parts
  };
  for (const Case& c : cases)
    for (const DType dtype : kTypes) check(c, dtype);
}

}  // namespace

int main() { return run_tests(tests, few); }

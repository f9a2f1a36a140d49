// Hadamard bases (core/hadamard.h): everything around the class products.
//
// A token's row of K numbers stays in the L1 cache from the first load to the last store. Rows of z
// are read in whole vectors, past their ends: z has room for a vector behind its last element.
#pragma once
#include "../core/hadamard.h"
#include "../core/runtime.h"
#include "simd.h"

namespace randlora::RANDLORA_ISA {

// v becomes its Hadamard transform over the 2^Bits vectors.
template <int Bits, class Vector>
RANDLORA_INLINE void butterflies(Vector (&v)[1 << Bits]) {
  unrolled<Bits>([&](auto g) {
    unrolled<(1 << Bits)>([&](auto q) {
      constexpr int a = q, b = a ^ (1 << g);
      if constexpr (a < b) {
        const Vector sum = v[a] + v[b];
        v[b] = v[a] - v[b];
        v[a] = sum;
      }
    });
  });
}

// Lane l gets lane l ^ Apart of v, plus or minus lane l.
template <int Apart, class Vector, int... I>
RANDLORA_INLINE Vector lane_stage(Vector v, std::integer_sequence<int, I...>) {
  using C = std::decay_t<decltype(v[0])>;
  const Vector sign{(I & Apart ? C(-1) : C(1))...};
  return fused(v, sign, shuffle<(I ^ Apart)...>(v, v));
}
template <class Vector, int Apart = 1>
RANDLORA_INLINE Vector transform_lanes(Vector v) {
  constexpr int kLanes = sizeof(Vector) / sizeof(v[0]);
  v = lane_stage<Apart>(v, std::make_integer_sequence<int, kLanes>{});
  if constexpr (2 * Apart < kLanes) return transform_lanes<Vector, 2 * Apart>(v);
  return v;
}

// `stages` of the transform over 2^stages * stride vectors, in place: the vectors that one sum
// meets are `stride` apart at first, twice as far in the next stage, and so on. With `lanes`, the
// stages within each vector come before.
template <class C, int Bits, bool Lanes>
RANDLORA_INLINE void pass(C* v, int64_t count, int64_t stride) {
  using Vector = Vec<C>;
  constexpr int kLanes = sizeof(Vector) / sizeof(C);
  for (int64_t high = 0; high < count; high += stride << Bits)
    for (int64_t at = high; at < high + stride; ++at) {
      Vector m[1 << Bits];
      unrolled<(1 << Bits)>([&](auto q) {
        m[q] = load<Vector>(v + (at + q * stride) * kLanes);
        if constexpr (Lanes) m[q] = transform_lanes(m[q]);
      });
      butterflies<Bits>(m);
      unrolled<(1 << Bits)>([&](auto q) { store(v + (at + q * stride) * kLanes, m[q]); });
    }
}
template <class C, bool Lanes>
__attribute__((noinline)) void transform(C* v, int64_t stages, int64_t stride) {
  constexpr int kBits = kVectorBytes == 64 ? 4 : 3;  // 2^kBits vectors fit in the registers
  const int64_t count = stride << stages;
  if constexpr (Lanes) {
    if (stages < kBits) {
      pass<C, 0, true>(v, count, stride);
    } else {
      pass<C, kBits, true>(v, count, stride);
      stages -= kBits, stride <<= kBits;
    }
  }
  for (; stages >= kBits; stages -= kBits, stride <<= kBits)
    pass<C, kBits, false>(v, count, stride);
  if (stages == 1) pass<C, 1, false>(v, count, stride);
  if (stages == 2) pass<C, 2, false>(v, count, stride);
  if (stages == 3) pass<C, 3, false>(v, count, stride);
}

// Up to `count` lanes.
template <class Vector, class S>
RANDLORA_INLINE void store_some(S* to, Vector v, int64_t count) {
  constexpr int kLanes = sizeof(Vector) / sizeof(v[0]);
  if (count >= kLanes) return store_as(to, v);
  S all[kLanes];
  store_as(all, v);
  for (int64_t l = 0; l < count; ++l) to[l] = all[l];
}
template <class Vector, class S>
RANDLORA_INLINE Vector load_some(const S* from, int64_t count) {
  constexpr int kLanes = sizeof(Vector) / sizeof(ComputeOf<S>);
  if (count >= kLanes) return load_as<Vector>(from);
  S some[kLanes] = {};
  for (int64_t l = 0; l < count; ++l) some[l] = from[l];
  return load_as<Vector>(some);
}

// One thread is faster than two if it has fewer numbers to take than these.
constexpr int64_t kHadamardOneThread = 1 << 15;
RANDLORA_INLINE int threads_for(int64_t numbers, const Runtime& rt) {
  return numbers < kHadamardOneThread ? 1 : rt.threads();
}

// The steps of one token, each from L1 to L1, and the memory that they need: numbers that all
// threads share (`factors` and `row_factors`), and those of one thread (`v` and `mixed`). Before the
// first step come take_memory, set_factors and set_row_factors.
template <class C>
struct HadamardRow {
  using Vector = Vec<C>;
  static constexpr int kLanes = kVectorBytes / int(sizeof(C));

  HadamardSizes sizes;
  int64_t K = sizes.K(), classes = sizes.classes();
  // Rows of H repeat, so a larger power of two is right, too.
  int64_t N = sizes.N() < kLanes ? kLanes : sizes.N();
  int64_t padded = (sizes.n + kLanes - 1) / kLanes * kLanes;  // n in whole vectors
  // The logarithms of R and of N in vectors.
  int64_t mix_bits = __builtin_ctzll(uint64_t(sizes.R())),
          N_bits = __builtin_ctzll(uint64_t(N / kLanes));
  C *factors, *row_factors;  // lam * col_signs (K), scale * row_signs (D)
  C *v, *mixed;              // (N); (R, padded)
  C *more, *shared;          // what take_memory was asked for besides, of a thread and of all

  RANDLORA_HOST_MEMBER explicit HadamardRow(const HadamardSizes& of_layer) : sizes(of_layer) {}

  // Takes scratch memory for so many threads, with `more_numbers` for each besides and
  // `shared_numbers` for all.
  RANDLORA_HOST_MEMBER void take_memory(Runtime& rt, int threads, int64_t more_numbers = 0,
                                        int64_t shared_numbers = 0) {
    threads_ = threads;
    const int64_t v_length = N + kLanes;  // `flatten` writes a vector past K
    const int64_t mixed_length = sizes.R() * padded;
    of_thread_ = v_length + mixed_length + more_numbers;
    const int64_t of_all = K + kLanes + sizes.D + kLanes;
    const int64_t count = of_all + threads * of_thread_ + shared_numbers;
    factors = static_cast<C*>(rt.scratch(size_t(count) * sizeof(C)));
    row_factors = factors + K + kLanes;
    v = factors + of_all;
    mixed = v + v_length;
    more = mixed + mixed_length;
    shared = v + threads * of_thread_;
  }
  RANDLORA_HOST_MEMBER void set_factors(const void* lam_times_col_signs) const {
    __builtin_memcpy(factors, lam_times_col_signs, size_t(K) * sizeof(C));
    store(factors + K, Vector{});
  }
  RANDLORA_HOST_MEMBER void set_factors(const void* lam, const float* col_signs) const {
    set_factors(lam);
    for (int64_t c = 0; c < K; ++c) factors[c] *= C(col_signs[c]);
  }
  RANDLORA_HOST_MEMBER void set_row_factors(const float* row_signs, double scale) const {
    for (int64_t o = 0; o < sizes.D; ++o) row_factors[o] = C(scale) * C(row_signs[o]);
    store(row_factors + sizes.D, Vector{});
  }
  // fn(row with its own memory, begin, end) over shares of [0, count), one for each thread.
  template <class F>
  RANDLORA_HOST_MEMBER void split(Runtime& rt, int64_t count, const F& fn) const {
    const int64_t shares = count < threads_ ? count : threads_;
    if (shares == 0) return;
    rt.each_slot(int(shares), [&](int64_t share) {
      HadamardRow own = *this;
      own.v += share * of_thread_;
      own.mixed += share * of_thread_;
      own.more += share * of_thread_;
      fn(own, count * share / shares, count * (share + 1) / shares);
    });
  }

  // mixed[j, i] = the sum over m of H[j, m] z[m, i]; the rows of z are `next` apart.
  template <class Z>
  RANDLORA_HOST_MEMBER void mix(const Z* z, int64_t next) const {
    for (int64_t m = 0; m < sizes.R(); ++m)
      for (int64_t i = 0; i < padded; i += kLanes)
        store(mixed + m * padded + i, m < classes ? load_as<Vector>(z + m * next + i) : Vector{});
    transform<C, false>(mixed, mix_bits, padded / kLanes);
  }
  // v = factors mixed. In order, because a row's last vector reaches into the next row.
  RANDLORA_HOST_MEMBER void flatten() const {
    for (int64_t j = 0; j < sizes.r; ++j)
      for (int64_t i = 0; i < sizes.n; i += kLanes)
        store(v + j * sizes.n + i,
              load<Vector>(mixed + j * padded + i) * load<Vector>(factors + j * sizes.n + i));
    for (int64_t c = K; c < N; ++c) v[c] = 0;
  }
  // w[m, i] = the sum over j of H[m, j] factors[c] v[c], c = j * n + i.
  template <class Z>
  RANDLORA_HOST_MEMBER void unmix(Z* w, int64_t next) const {
    for (int64_t j = 0; j < sizes.R(); ++j)
      for (int64_t i = 0; i < padded; i += kLanes) {
        const int64_t c = j * sizes.n + i;
        store(mixed + j * padded + i,
              j < sizes.r ? load<Vector>(v + c) * load<Vector>(factors + c) : Vector{});
      }
    transform<C, false>(mixed, mix_bits, padded / kLanes);
    for (int64_t m = 0; m < classes; ++m)
      for (int64_t i = 0; i < sizes.n; i += kLanes)
        store_some(w + m * next + i, load<Vector>(mixed + m * padded + i), sizes.n - i);
  }

  // mixed[j] = H[j, m], if it is not there already.
  RANDLORA_HOST_MEMBER void set_class(int64_t m, int64_t* held) const {
    if (*held != m)
      for (int64_t j = 0; j < sizes.r; ++j) mixed[j] = hadamard_minus(j, m) ? C(-1) : C(1);
    *held = m;
  }

  // v = its transform; row o of the layer is at place(o).
  RANDLORA_HOST_MEMBER void up() const { transform<C, true>(v, N_bits, 1); }
  RANDLORA_HOST_MEMBER int64_t place(int64_t o) const { return o & (N - 1); }
  // v = the transform of row_factors * y.
  template <class S>
  RANDLORA_HOST_MEMBER void down(const S* y) const {
    for (int64_t c = 0; c < N; c += kLanes) {
      Vector sum{};
      for (int64_t o = c; o < sizes.D; o += N)
        sum = fused(load_some<Vector>(y + o, sizes.D - o), load<Vector>(row_factors + o), sum);
      store(v + c, sum);
    }
    transform<C, true>(v, N_bits, 1);
  }

 private:
  int threads_;
  int64_t of_thread_;
};

template <class S>
void hadamard_up_as(const HadamardUp& p, Runtime& rt) {
  using Row = HadamardRow<ComputeOf<S>>;
  using Vector = typename Row::Vector;
  Row all(p.sizes);
  all.take_memory(rt, threads_for(p.T * all.N, rt));
  all.set_factors(p.factors);
  all.set_row_factors(p.row_signs, p.scale);
  const int64_t n = p.sizes.n, D = p.sizes.D;
  all.split(rt, p.T, [&](const Row& row, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      row.mix(static_cast<const ClassOf<S>*>(p.z) + t * n, p.T * n);
      row.flatten();
      row.up();
      S* y = static_cast<S*>(p.y) + t * D;
      for (int64_t o = 0; o < D; o += Row::kLanes) {
        const Vector sum = load<Vector>(row.v + row.place(o)),
                     scale = load<Vector>(row.row_factors + o);
        store_some(y + o,
                   p.accumulate ? fused(sum, scale, load_some<Vector>(y + o, D - o)) : sum * scale,
                   D - o);
      }
    }
  });
}

template <class S>
void hadamard_down_as(const HadamardDown& p, Runtime& rt) {
  using C = ComputeOf<S>;
  using Z = ClassOf<S>;
  using Row = HadamardRow<C>;
  using Vector = typename Row::Vector;
  Row all(p.sizes);
  const int64_t n = p.sizes.n, r = p.sizes.r, D = p.sizes.D, sums = r * all.padded;
  all.take_memory(rt, threads_for(p.T * all.N, rt), sums);
  all.set_factors(p.factors);
  all.set_row_factors(p.row_signs, 1.0);
  // A slot's tokens are summed in order by one thread, so the sums do not depend on the threads.
  all.split(rt, p.slots, [&](const Row& row, int64_t begin, int64_t end) {
    C* sum = row.more;
    for (int64_t slot = begin; slot < end; ++slot) {
      __builtin_memset(sum, 0, size_t(sums) * sizeof(C));
      for (int64_t t = slot * p.T / p.slots; t < (slot + 1) * p.T / p.slots; ++t) {
        row.down(static_cast<const S*>(p.y) + t * D);
        row.unmix(static_cast<Z*>(p.w) + t * n, p.T * n);
        if (!p.z) continue;
        row.mix(static_cast<const Z*>(p.z) + t * n, p.T * n);
        for (int64_t j = 0; j < r; ++j)
          for (int64_t i = 0; i < n; i += Row::kLanes) {
            const int64_t at = j * row.padded + i;
            store(sum + at, fused(load<Vector>(row.mixed + at), load<Vector>(row.v + j * n + i),
                                  load<Vector>(sum + at)));
          }
      }
      if (!p.z) continue;
      C* to = static_cast<C*>(p.sums) + slot * r * n;
      for (int64_t j = 0; j < r; ++j)
        __builtin_memcpy(to + j * n, sum + j * row.padded, size_t(n) * sizeof(C));
    }
  });
}

template <class S>
void hadamard_add_as(const HadamardAdd& p, Runtime& rt) {
  using C = ComputeOf<S>;
  using Vector = Vec<C>;
  constexpr int kLanes = kVectorBytes / int(sizeof(C));
  const int64_t n = p.sizes.n, d = p.sizes.d, classes = p.sizes.classes();
  rt.split(threads_for(p.T * d, rt), p.T, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t m = 0; m < classes; ++m) {
        const ClassOf<S>* from = static_cast<const ClassOf<S>*>(p.from) + (m * p.T + t) * n;
        S* y = static_cast<S*>(p.y) + t * d + m * n;
        const int64_t count = d - m * n < n ? d - m * n : n;
        for (int64_t k = 0; k < count; k += kLanes) {
          const Vector sum = C(p.scale) * load_some<Vector>(from + k, count - k);
          store_some(y + k, p.accumulate ? sum + load_some<Vector>(y + k, count - k) : sum,
                     count - k);
        }
      }
  });
}

template <class C>
void add_slots(const HadamardSlotSums& p, Runtime& rt) {
  const int64_t K = p.sizes.K();
  const C *sums = static_cast<const C*>(p.sums), scale = C(p.scale);
  C* dlam = static_cast<C*>(p.dlam);
  rt.split(threads_for(p.sizes.n * p.sizes.d, rt), K, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) dlam[c] = 0;
    for (int64_t slot = 0; slot < p.slots; ++slot)
      for (int64_t c = begin; c < end; ++c) dlam[c] += sums[slot * K + c];
    for (int64_t c = begin; c < end; ++c) dlam[c] *= scale * C(p.col_signs[c]);
  });
}

template <class S>
void hadamard_diagonal_gradients_as(const HadamardDiagonalGradients& p, Runtime& rt) {
  using C = ComputeOf<S>;
  const int64_t n = p.sizes.n, d = p.sizes.d, classes = p.sizes.classes();
  const ClassOf<S>* class_gradient = static_cast<const ClassOf<S>*>(p.class_gradient);
  const C scale = C(p.scale);
  C* dgam = static_cast<C*>(p.dgam);
  rt.split(threads_for(n * d, rt), n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t m = 0; m < classes; ++m) {
        const int64_t first = m * n, count = d - first < n ? d - first : n;
        const ClassOf<S>* from = class_gradient + (m * n + i) * n;
        C* to = dgam + i * d + first;
        for (int64_t k = 0; k < count; ++k)
          to[k] = scale * C(p.a_signs[first + k]) * C(widen(from[k]));
      }
  });
  add_slots<C>(p, rt);
}

// Columns of a tile, a few vectors. The wider it is, the more of a page of W is read at once; it
// should stay in the L2 cache. `rows` is their length.
template <class C>
RANDLORA_INLINE int64_t tile_width(bool reduce, int64_t rows) {
  constexpr int kLanes = kVectorBytes / int(sizeof(C));
  const int64_t kB = rows * int64_t(sizeof(C)) >> 10;
  if (reduce || kB > 16) return kLanes;
  return kB > 8 ? 2 * kLanes : 4 * kLanes;
}

template <class S>
void weight_of_expert(const HadamardWeight& p, Runtime& rt) {
  using C = ComputeOf<S>;
  using Row = HadamardRow<C>;
  using Vector = typename Row::Vector;
  constexpr int kLanes = Row::kLanes;
  Row all(p.sizes);
  const int64_t n = p.sizes.n, D = p.sizes.D, d = p.sizes.d;
  // A tile holds columns k of M as its rows, which are not a power of two apart.
  const int64_t of_gamma = n + kLanes, step = all.N + 2 * kLanes,
                width = tile_width<C>(p.reduce, all.N);
  all.take_memory(rt, rt.threads(), width * (of_gamma + step));
  all.set_factors(p.lam, p.col_signs);
  all.set_row_factors(p.row_signs, p.scale);
  const C* gam = static_cast<const C*>(p.gam);
  const S* base = static_cast<const S*>(p.weight);
  S* out = static_cast<S*>(p.out);
  const auto put = [&](int64_t e, Vector delta, int64_t count) {
    store_some(out + e, base ? load_some<Vector>(base + e, count) + delta : delta, count);
  };
  all.split(rt, (d + width - 1) / width, [&](const Row& row, int64_t begin, int64_t end) {
    C *gamma = row.more, *tile = gamma + width * of_gamma;
    int64_t m = -1;
    for (int64_t k0 = begin * width; k0 < end * width; k0 += width) {
      const int64_t columns = d - k0 < width ? d - k0 : width;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < columns; ++k)
          gamma[k * of_gamma + i] = gam[i * d + k0 + k] * C(p.a_signs[k0 + k]);
      for (int64_t k = 0; k < columns; ++k) {
        row.set_class((k0 + k) / n, &m);
        for (int64_t j = 0; j < p.sizes.r; ++j)  // in order, as flatten
          for (int64_t i = 0; i < n; i += kLanes) {
            const Vector g = load<Vector>(gamma + k * of_gamma + i) * row.mixed[j];
            store(row.v + j * n + i, g * load<Vector>(row.factors + j * n + i));
          }
        for (int64_t c = row.K; c < row.N; ++c) row.v[c] = 0;
        row.up();
        if (p.reduce) {
          for (int64_t o = 0; o < D; o += kLanes)
            put((k0 + k) * D + o,
                load<Vector>(row.v + row.place(o)) * load<Vector>(row.row_factors + o), D - o);
        } else {
          __builtin_memcpy(tile + k * step, row.v, size_t(row.N) * sizeof(C));
        }
      }
      for (int64_t o = 0; o < D && !p.reduce; o += kLanes)
        for (int64_t k = 0; k < columns; k += kLanes) {
          Vector t[kLanes];
          unrolled<kLanes>(
              [&](auto q) { t[q] = load<Vector>(tile + (k + q) * step + row.place(o)); });
          transpose<kLanes>(t);
          C rows[kLanes * kLanes];
          unrolled<kLanes>([&](auto q) { store(rows + q * kLanes, t[q]); });
          for (int64_t q = 0; q < kLanes && o + q < D; ++q)
            put((o + q) * d + k0 + k, row.row_factors[o + q] * load<Vector>(rows + q * kLanes),
                columns - k);
        }
    }
  });
}

template <class S>
void weight_backward_of_expert(const HadamardWeightBackward& p, Runtime& rt) {
  using C = ComputeOf<S>;
  using Row = HadamardRow<C>;
  using Vector = typename Row::Vector;
  constexpr int kLanes = Row::kLanes;
  Row all(p.sizes);
  const int64_t n = p.sizes.n, r = p.sizes.r, D = p.sizes.D, d = p.sizes.d;
  // As in weight_of_expert; here a tile's rows are columns of grad. A slot has the columns from
  // slot * d / slots to (slot + 1) * d / slots.
  const int64_t of_gamma = n + kLanes, step = p.reduce ? 0 : D + 2 * kLanes,
                numbers = r * all.padded, width = tile_width<C>(p.reduce, D),
                slots = d < 1024 ? (d + 63) / 64 : 16;
  all.take_memory(rt, threads_for(d * all.N, rt), numbers + width * (of_gamma + step),
                  slots * r * n);
  all.set_factors(p.lam, p.col_signs);
  all.set_row_factors(p.row_signs, p.scale);
  C* sums = all.shared;
  const C* gam = static_cast<const C*>(p.gam);
  const S* grad = static_cast<const S*>(p.weight);
  C* dgam = static_cast<C*>(p.dgam);
  all.split(rt, slots, [&](const Row& row, int64_t begin, int64_t end) {
    C *sum = row.more, *gamma = sum + numbers, *tile = gamma + width * of_gamma;
    int64_t m = -1;
    for (int64_t slot = begin; slot < end; ++slot) {
      __builtin_memset(sum, 0, size_t(numbers) * sizeof(C));
      const int64_t last = (slot + 1) * d / slots;
      for (int64_t k0 = slot * d / slots; k0 < last; k0 += width) {
        const int64_t columns = last - k0 < width ? last - k0 : width;
        for (int64_t i = 0; i < n; ++i)
          for (int64_t k = 0; k < columns; ++k)
            gamma[k * of_gamma + i] = gam[i * d + k0 + k] * C(p.a_signs[k0 + k]);
        for (int64_t o = 0; o < D && !p.reduce; o += kLanes)
          for (int64_t k = 0; k < columns; k += kLanes) {
            Vector t[kLanes];
            unrolled<kLanes>([&](auto q) {
              t[q] = o + q < D ? load_some<Vector>(grad + (o + q) * d + k0 + k, columns - k)
                               : Vector{};
            });
            transpose<kLanes>(t);
            unrolled<kLanes>([&](auto q) { store(tile + (k + q) * step + o, t[q]); });
          }
        for (int64_t k = 0; k < columns; ++k) {
          if (p.reduce)
            row.down(grad + (k0 + k) * D);
          else
            row.down(tile + k * step);
          row.set_class((k0 + k) / n, &m);
          for (int64_t i = 0; i < n; i += kLanes) {
            C* at = gamma + k * of_gamma + i;
            const Vector g = load<Vector>(at);
            Vector w{};
            for (int64_t j = 0; j < r; ++j) {
              const Vector u = load<Vector>(row.v + j * n + i) * row.mixed[j];
              w = fused(u, load<Vector>(row.factors + j * n + i), w);
              C* to = sum + j * row.padded + i;
              store(to, fused(u, g, load<Vector>(to)));
            }
            store(at, w);
          }
        }
        for (int64_t i = 0; i < n; ++i)
          for (int64_t k = 0; k < columns; ++k)
            dgam[i * d + k0 + k] = gamma[k * of_gamma + i] * C(p.a_signs[k0 + k]);
      }
      C* to = sums + slot * r * n;
      for (int64_t j = 0; j < r; ++j)
        __builtin_memcpy(to + j * n, sum + j * row.padded, size_t(n) * sizeof(C));
    }
  });
  // `scale` is in the rows already.
  HadamardSlotSums of_slots{};
  of_slots.sizes = p.sizes;
  of_slots.sums = sums;
  of_slots.slots = slots;
  of_slots.col_signs = p.col_signs;
  of_slots.dlam = p.dlam;
  of_slots.dtype = p.dtype;
  of_slots.scale = 1.0;
  add_slots<C>(of_slots, rt);
}

template <class S>
void hadamard_weight_as(const HadamardWeight& p, Runtime& rt) {
  for (int64_t e = 0; e < p.experts; ++e) weight_of_expert<S>(p.expert(e), rt);
}
template <class S>
void hadamard_weight_backward_as(const HadamardWeightBackward& p, Runtime& rt) {
  for (int64_t e = 0; e < p.experts; ++e) weight_backward_of_expert<S>(p.expert(e), rt);
}

template <class S>
void hadamard_signed_diagonals_as(const HadamardSignedDiagonals& p, Runtime& rt) {
  using C = ComputeOf<S>;
  const C *gam = static_cast<const C*>(p.gam), *lam = static_cast<const C*>(p.lam);
  C* factors = static_cast<C*>(p.factors);
  for (int64_t c = 0; c < p.sizes.K(); ++c) factors[c] = lam[c] * C(p.col_signs[c]);
  ClassOf<S>* out = static_cast<ClassOf<S>*>(p.signed_gam);
  const int64_t n = p.sizes.n, d = p.sizes.d;
  rt.split(threads_for(n * d, rt), n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t k = 0; k < d; ++k) narrow(gam[i * d + k] * C(p.a_signs[k]), out + i * d + k);
  });
}

RANDLORA_BY_DTYPE(hadamard_up, HadamardUp)
RANDLORA_BY_DTYPE(hadamard_down, HadamardDown)
RANDLORA_BY_DTYPE(hadamard_add, HadamardAdd)
RANDLORA_BY_DTYPE(hadamard_weight, HadamardWeight)
RANDLORA_BY_DTYPE(hadamard_weight_backward, HadamardWeightBackward)
RANDLORA_BY_DTYPE(hadamard_signed_diagonals, HadamardSignedDiagonals)
RANDLORA_BY_DTYPE(hadamard_diagonal_gradients, HadamardDiagonalGradients)

}  // namespace randlora::RANDLORA_ISA

// Hadamard bases (core/hadamard.h): everything around the class products.
//
// A token's row of K numbers stays in the L1 cache from the first load to the last store. Rows of z
// are read in whole vectors, past their ends: z has room for a vector behind its last element.
#pragma once
#include "../core/hadamard.h"
#include "../core/runtime.h"
#include "simd.h"

namespace randlora::RANDLORA_ISA {

// v becomes its Hadamard transform over the 2^G vectors.
template <int G, class V>
RANDLORA_INLINE void butterflies(V (&v)[1 << G]) {
  unrolled<G>([&](auto g) {
    unrolled<(1 << G)>([&](auto q) {
      constexpr int a = q, b = a ^ (1 << g);
      if constexpr (a < b) {
        const V sum = v[a] + v[b];
        v[b] = v[a] - v[b];
        v[a] = sum;
      }
    });
  });
}

// Lane l gets lane l ^ S of v, plus or minus lane l.
template <int S, class V, int... I>
RANDLORA_INLINE V lane_stage(V v, std::integer_sequence<int, I...>) {
  using C = std::decay_t<decltype(v[0])>;
  const V sign{(I & S ? C(-1) : C(1))...};
  return fused(v, sign, shuffle<(I ^ S)...>(v, v));
}
template <class V, int S = 1>
RANDLORA_INLINE V transform_lanes(V v) {
  constexpr int L = sizeof(V) / sizeof(v[0]);
  v = lane_stage<S>(v, std::make_integer_sequence<int, L>{});
  if constexpr (2 * S < L) return transform_lanes<V, 2 * S>(v);
  return v;
}

// `stages` of the transform over 2^stages * stride vectors, in place: the vectors that one sum
// meets are `stride` apart at first, twice as far in the next stage, and so on. With `lanes`, the
// stages within each vector come before.
template <class C, int G, bool lanes>
RANDLORA_INLINE void pass(C* v, int64_t count, int64_t stride) {
  using V = Vec<C>;
  constexpr int L = sizeof(V) / sizeof(C);
  for (int64_t high = 0; high < count; high += stride << G)
    for (int64_t at = high; at < high + stride; ++at) {
      V m[1 << G];
      unrolled<(1 << G)>([&](auto q) {
        m[q] = load<V>(v + (at + q * stride) * L);
        if constexpr (lanes) m[q] = transform_lanes(m[q]);
      });
      butterflies<G>(m);
      unrolled<(1 << G)>([&](auto q) { store(v + (at + q * stride) * L, m[q]); });
    }
}
template <class C, bool lanes>
__attribute__((noinline)) void transform(C* v, int64_t stages, int64_t stride) {
  constexpr int G = kVectorBytes == 64 ? 4 : 3;  // 2^G vectors fit in the registers
  const int64_t count = stride << stages;
  if constexpr (lanes) {
    if (stages < G) {
      pass<C, 0, true>(v, count, stride);
    } else {
      pass<C, G, true>(v, count, stride);
      stages -= G, stride <<= G;
    }
  }
  for (; stages >= G; stages -= G, stride <<= G) pass<C, G, false>(v, count, stride);
  if (stages == 1) pass<C, 1, false>(v, count, stride);
  if (stages == 2) pass<C, 2, false>(v, count, stride);
  if (stages == 3) pass<C, 3, false>(v, count, stride);
}

// Up to `count` lanes.
template <class V, class S>
RANDLORA_INLINE void store_some(S* to, V v, int64_t count) {
  constexpr int L = sizeof(V) / sizeof(v[0]);
  if (count >= L) return store_as(to, v);
  S all[L];
  store_as(all, v);
  for (int64_t l = 0; l < count; ++l) to[l] = all[l];
}
template <class V, class S>
RANDLORA_INLINE V load_some(const S* from, int64_t count) {
  constexpr int L = sizeof(V) / sizeof(ComputeOf<S>);
  if (count >= L) return load_as<V>(from);
  S some[L] = {};
  for (int64_t l = 0; l < count; ++l) some[l] = from[l];
  return load_as<V>(some);
}

// The steps of one token, each from L1 to L1, and the memory that they need: numbers that all
// threads share (`lam` and `row`), and those of one thread (`v` and `mixed`).
template <class C>
struct HadamardRow {
  using V = Vec<C>;
  static constexpr int L = kVectorBytes / int(sizeof(C));

  HadamardSizes s;
  int64_t K = s.K(), classes = s.classes();
  int64_t N = s.N() < L ? L : s.N();  // rows of H repeat, so a larger power of two is right, too
  int64_t padded = (s.n + L - 1) / L * L;  // n in whole vectors
  // The logarithms of R and of N in vectors.
  int64_t mix_bits = __builtin_ctzll(uint64_t(s.R())), N_bits = __builtin_ctzll(uint64_t(N / L));
  C *lam, *row;  // lam * col (K), scale * row (D)
  C *v, *mixed;  // (N); (R, padded)

  RANDLORA_HOST_MEMBER explicit HadamardRow(const HadamardSizes& sizes) : s(sizes) {}

  // Takes scratch memory for all threads, with `more` numbers for each and `shared` at the end,
  // which it returns. `lam_of` has the signs of the columns already where `col` is null.
  RANDLORA_HOST_MEMBER C* prepare(Runtime& rt, const void* lam_of, const float* col,
                                  const float* row_of, double scale, int64_t more = 0,
                                  int64_t shared = 0) {
    const int64_t v_length = N + L;  // `flatten` writes a vector past K
    of_thread_ = v_length + s.R() * padded + more;
    const int64_t count = K + s.D + 2 * L + rt.width() * of_thread_;
    lam = static_cast<C*>(rt.scratch(size_t(count + shared) * sizeof(C)));
    row = lam + K + L;
    v = row + s.D + L;
    mixed = v + v_length;
    __builtin_memcpy(lam, lam_of, size_t(K) * sizeof(C));
    for (int64_t c = 0; c < K && col; ++c) lam[c] *= C(col[c]);
    for (int64_t o = 0; o < s.D; ++o) row[o] = C(scale) * C(row_of[o]);
    for (int64_t l = 0; l < L; ++l) lam[K + l] = row[s.D + l] = 0;
    return lam + count;
  }
  // fn(row with its own memory, begin, end) over shares of [0, count), one for each thread.
  template <class F>
  RANDLORA_HOST_MEMBER void split(Runtime& rt, int64_t count, const F& fn) const {
    const int64_t threads = count < rt.width() ? count : rt.width();
    if (threads == 0) return;
    rt.each_slot(int(threads), [&](int64_t thread) {
      HadamardRow own = *this;
      own.v += thread * of_thread_;
      own.mixed += thread * of_thread_;
      fn(own, count * thread / threads, count * (thread + 1) / threads);
    });
  }
  RANDLORA_HOST_MEMBER C* more() const { return mixed + s.R() * padded; }

  // mixed[j, i] = the sum over m of H[j, m] z[m, i]; the rows of z are `next` apart.
  template <class Z>
  RANDLORA_HOST_MEMBER void mix(const Z* z, int64_t next) const {
    for (int64_t m = 0; m < s.R(); ++m)
      for (int64_t i = 0; i < padded; i += L)
        store(mixed + m * padded + i, m < classes ? load_as<V>(z + m * next + i) : V{});
    transform<C, false>(mixed, mix_bits, padded / L);
  }
  // v[c] = lam mixed. In order, because a row's last vector reaches into the next row.
  RANDLORA_HOST_MEMBER void flatten() const {
    for (int64_t j = 0; j < s.r; ++j)
      for (int64_t i = 0; i < s.n; i += L)
        store(v + j * s.n + i, load<V>(mixed + j * padded + i) * load<V>(lam + j * s.n + i));
    for (int64_t c = K; c < N; ++c) v[c] = 0;
  }
  // w[m, i] = the sum over j of H[m, j] lam v[j * n + i].
  template <class Z>
  RANDLORA_HOST_MEMBER void unmix(Z* w, int64_t next) const {
    for (int64_t j = 0; j < s.R(); ++j)
      for (int64_t i = 0; i < padded; i += L) {
        const int64_t c = j * s.n + i;
        store(mixed + j * padded + i, j < s.r ? load<V>(v + c) * load<V>(lam + c) : V{});
      }
    transform<C, false>(mixed, mix_bits, padded / L);
    for (int64_t m = 0; m < classes; ++m)
      for (int64_t i = 0; i < s.n; i += L)
        store_some(w + m * next + i, load<V>(mixed + m * padded + i), s.n - i);
  }

  // mixed[j] = H[j, m], if it is not there already.
  RANDLORA_HOST_MEMBER void set_class(int64_t m, int64_t* held) const {
    if (*held != m)
      for (int64_t j = 0; j < s.r; ++j) mixed[j] = hadamard_minus(j, m) ? C(-1) : C(1);
    *held = m;
  }

  // v = its transform; row o of the layer is at place(o).
  RANDLORA_HOST_MEMBER void up() const { transform<C, true>(v, N_bits, 1); }
  RANDLORA_HOST_MEMBER int64_t place(int64_t o) const { return o & (N - 1); }
  // v = the transform of row * y.
  template <class S>
  RANDLORA_HOST_MEMBER void down(const S* y) const {
    for (int64_t c = 0; c < N; c += L) {
      V sum{};
      for (int64_t o = c; o < s.D; o += N)
        sum = fused(load_some<V>(y + o, s.D - o), load<V>(row + o), sum);
      store(v + c, sum);
    }
    transform<C, true>(v, N_bits, 1);
  }

 private:
  int64_t of_thread_;
};

// Below this many numbers one thread is faster than two.
constexpr int64_t kHadamardOneThread = 1 << 15;

template <class S>
void hadamard_up_as(const HadamardUp& p, Runtime& rt) {
  using Row = HadamardRow<ComputeOf<S>>;
  using V = typename Row::V;
  Row all(p.sizes);
  rt.set_single(p.T * all.N < kHadamardOneThread);
  all.prepare(rt, p.factors, nullptr, p.row, p.scale);
  const int64_t n = p.sizes.n, D = p.sizes.D;
  all.split(rt, p.T, [&](const Row& row, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      row.mix(static_cast<const ClassOf<S>*>(p.z) + t * n, p.T * n);
      row.flatten();
      row.up();
      S* y = static_cast<S*>(p.y) + t * D;
      for (int64_t o = 0; o < D; o += Row::L) {
        const V sum = load<V>(row.v + row.place(o)), scale = load<V>(row.row + o);
        store_some(y + o,
                   p.accumulate ? fused(sum, scale, load_some<V>(y + o, D - o)) : sum * scale,
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
  using V = typename Row::V;
  Row all(p.sizes);
  rt.set_single(p.T * all.N < kHadamardOneThread);
  const int64_t n = p.sizes.n, r = p.sizes.r, D = p.sizes.D, sums = r * all.padded;
  all.prepare(rt, p.factors, nullptr, p.row, 1.0, sums);
  // A slot's tokens are summed in order by one thread, so the sums do not depend on the threads.
  all.split(rt, p.slots, [&](const Row& row, int64_t begin, int64_t end) {
    C* sum = row.more();
    for (int64_t slot = begin; slot < end; ++slot) {
      __builtin_memset(sum, 0, size_t(sums) * sizeof(C));
      for (int64_t t = slot * p.T / p.slots; t < (slot + 1) * p.T / p.slots; ++t) {
        row.down(static_cast<const S*>(p.y) + t * D);
        row.unmix(static_cast<Z*>(p.w) + t * n, p.T * n);
        if (!p.z) continue;
        row.mix(static_cast<const Z*>(p.z) + t * n, p.T * n);
        for (int64_t j = 0; j < r; ++j)
          for (int64_t i = 0; i < n; i += Row::L) {
            const int64_t at = j * row.padded + i;
            store(sum + at,
                  fused(load<V>(row.mixed + at), load<V>(row.v + j * n + i), load<V>(sum + at)));
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
void hadamard_signed_as(const HadamardSigned& p, Runtime& rt) {
  using C = ComputeOf<S>;
  const int64_t d = p.sizes.d;
  rt.set_single(p.T * d < kHadamardOneThread);
  rt.split(p.T, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const S* x = static_cast<const S*>(p.x) + t * d;
      ClassOf<S>* out = static_cast<ClassOf<S>*>(p.out) + t * d;
      for (int64_t k = 0; k < d; ++k) narrow(C(widen(x[k])) * C(p.s[k]), out + k);
    }
  });
}

template <class S>
void hadamard_add_as(const HadamardAdd& p, Runtime& rt) {
  using C = ComputeOf<S>;
  using V = Vec<C>;
  constexpr int L = kVectorBytes / int(sizeof(C));
  const int64_t n = p.sizes.n, d = p.sizes.d, classes = p.sizes.classes();
  rt.set_single(p.T * d < kHadamardOneThread);
  C* signs = static_cast<C*>(rt.scratch(size_t(d + L) * sizeof(C)));  // a vector may reach past d
  for (int64_t k = 0; k < d; ++k) signs[k] = C(p.scale) * C(p.s[k]);
  for (int64_t l = 0; l < L; ++l) signs[d + l] = 0;
  rt.split(p.T, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t m = 0; m < classes; ++m) {
        const ClassOf<S>* from = static_cast<const ClassOf<S>*>(p.from) + (m * p.T + t) * n;
        S* y = static_cast<S*>(p.y) + t * d + m * n;
        const int64_t count = d - m * n < n ? d - m * n : n;
        for (int64_t k = 0; k < count; k += L) {
          const V sum = load_some<V>(from + k, count - k), sign = load<V>(signs + m * n + k);
          store_some(y + k,
                     p.accumulate ? fused(sum, sign, load_some<V>(y + k, count - k)) : sum * sign,
                     count - k);
        }
      }
  });
}

template <class S>
void hadamard_diagonals_as(const HadamardDiagonals& p, Runtime& rt) {
  using C = ComputeOf<S>;
  const int64_t n = p.sizes.n, d = p.sizes.d, K = p.sizes.K(), classes = p.sizes.classes();
  const ClassOf<S>* P = static_cast<const ClassOf<S>*>(p.P);
  const C *sums = static_cast<const C*>(p.sums), scale = C(p.scale);
  C *dlam = static_cast<C*>(p.dlam), *dgam = static_cast<C*>(p.dgam);
  rt.set_single(n * d < kHadamardOneThread);
  rt.split(P ? n : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t m = 0; m < classes; ++m) {
        const int64_t first = m * n, count = d - first < n ? d - first : n;
        const ClassOf<S>* from = P + (first + i) * n;
        C* to = dgam + i * d + first;
        for (int64_t k = 0; k < count; ++k) to[k] = scale * C(widen(from[k]));
        for (int64_t k = 0; p.s && k < count; ++k) to[k] *= C(p.s[first + k]);
      }
  });
  rt.split(K, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) dlam[c] = 0;
    for (int64_t slot = 0; slot < p.slots; ++slot)
      for (int64_t c = begin; c < end; ++c) dlam[c] += sums[slot * K + c];
    for (int64_t c = begin; c < end; ++c) dlam[c] *= scale * C(p.col[c]);
  });
}

// Columns of a tile, a few vectors. The wider it is, the more of a page of W is read at once; it
// should stay in the L2 cache. `rows` is their length.
template <class C>
RANDLORA_INLINE int64_t tile_width(bool transposed, int64_t rows) {
  constexpr int L = kVectorBytes / int(sizeof(C));
  const int64_t kB = rows * int64_t(sizeof(C)) >> 10;
  return transposed || kB > 16 ? L : kB > 8 ? 2 * L : 4 * L;
}

template <class S>
void weight_of_expert(const HadamardWeight& p, Runtime& rt) {
  using C = ComputeOf<S>;
  using Row = HadamardRow<C>;
  using V = typename Row::V;
  constexpr int L = Row::L;
  Row all(p.sizes);
  const int64_t n = p.sizes.n, D = p.sizes.D, d = p.sizes.d;
  // A tile holds columns k of M as its rows, which are not a power of two apart.
  const int64_t of_gamma = n + L, step = all.N + 2 * L, width = tile_width<C>(p.transposed, all.N);
  all.prepare(rt, p.lam, p.col, p.row, p.scale, width * (of_gamma + step));
  const C* gam = static_cast<const C*>(p.gam);
  const S* base = static_cast<const S*>(p.weight);
  S* out = static_cast<S*>(p.out);
  const auto put = [&](int64_t e, V delta, int64_t count) {
    store_some(out + e, base ? load_some<V>(base + e, count) + delta : delta, count);
  };
  all.split(rt, (d + width - 1) / width, [&](const Row& row, int64_t begin, int64_t end) {
    C *gamma = row.more(), *tile = gamma + width * of_gamma;
    int64_t m = -1;
    for (int64_t k0 = begin * width; k0 < end * width; k0 += width) {
      const int64_t columns = d - k0 < width ? d - k0 : width;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < columns; ++k)
          gamma[k * of_gamma + i] = gam[i * d + k0 + k] * C(p.s[k0 + k]);
      for (int64_t k = 0; k < columns; ++k) {
        row.set_class((k0 + k) / n, &m);
        for (int64_t j = 0; j < p.sizes.r; ++j)  // in order, as flatten
          for (int64_t i = 0; i < n; i += L) {
            const V g = load<V>(gamma + k * of_gamma + i) * row.mixed[j];
            store(row.v + j * n + i, g * load<V>(row.lam + j * n + i));
          }
        for (int64_t c = row.K; c < row.N; ++c) row.v[c] = 0;
        row.up();
        if (p.transposed) {
          for (int64_t o = 0; o < D; o += L)
            put((k0 + k) * D + o, load<V>(row.v + row.place(o)) * load<V>(row.row + o), D - o);
        } else {
          __builtin_memcpy(tile + k * step, row.v, size_t(row.N) * sizeof(C));
        }
      }
      for (int64_t o = 0; o < D && !p.transposed; o += L)
        for (int64_t k = 0; k < columns; k += L) {
          V t[L];
          unrolled<L>([&](auto q) { t[q] = load<V>(tile + (k + q) * step + row.place(o)); });
          transpose<L>(t);
          C rows[L * L];
          unrolled<L>([&](auto q) { store(rows + q * L, t[q]); });
          for (int64_t q = 0; q < L && o + q < D; ++q)
            put((o + q) * d + k0 + k, row.row[o + q] * load<V>(rows + q * L), columns - k);
        }
    }
  });
}

template <class S>
void weight_backward_of_expert(const HadamardWeightBackward& p, Runtime& rt) {
  using C = ComputeOf<S>;
  using Row = HadamardRow<C>;
  using V = typename Row::V;
  constexpr int L = Row::L;
  Row all(p.sizes);
  const int64_t n = p.sizes.n, r = p.sizes.r, D = p.sizes.D, d = p.sizes.d;
  // As in weight_of_expert; here a tile's rows are columns of grad. A slot has the columns from
  // slot * d / slots to (slot + 1) * d / slots.
  const int64_t of_gamma = n + L, step = p.transposed ? 0 : D + 2 * L, numbers = r * all.padded,
                width = tile_width<C>(p.transposed, D), slots = d < 1024 ? (d + 63) / 64 : 16;
  rt.set_single(d * all.N < kHadamardOneThread);
  C* sums = all.prepare(rt, p.lam, p.col, p.row, p.scale, numbers + width * (of_gamma + step),
                        slots * r * n);
  const C* gam = static_cast<const C*>(p.gam);
  const S* grad = static_cast<const S*>(p.weight);
  C* dgam = static_cast<C*>(p.dgam);
  all.split(rt, slots, [&](const Row& row, int64_t begin, int64_t end) {
    C *sum = row.more(), *gamma = sum + numbers, *tile = gamma + width * of_gamma;
    int64_t m = -1;
    for (int64_t slot = begin; slot < end; ++slot) {
      __builtin_memset(sum, 0, size_t(numbers) * sizeof(C));
      const int64_t last = (slot + 1) * d / slots;
      for (int64_t k0 = slot * d / slots; k0 < last; k0 += width) {
        const int64_t columns = last - k0 < width ? last - k0 : width;
        for (int64_t i = 0; i < n; ++i)
          for (int64_t k = 0; k < columns; ++k)
            gamma[k * of_gamma + i] = gam[i * d + k0 + k] * C(p.s[k0 + k]);
        for (int64_t o = 0; o < D && !p.transposed; o += L)
          for (int64_t k = 0; k < columns; k += L) {
            V t[L];
            unrolled<L>([&](auto q) {
              t[q] = o + q < D ? load_some<V>(grad + (o + q) * d + k0 + k, columns - k) : V{};
            });
            transpose<L>(t);
            unrolled<L>([&](auto q) { store(tile + (k + q) * step + o, t[q]); });
          }
        for (int64_t k = 0; k < columns; ++k) {
          p.transposed ? row.down(grad + (k0 + k) * D) : row.down(tile + k * step);
          row.set_class((k0 + k) / n, &m);
          for (int64_t i = 0; i < n; i += L) {
            C* at = gamma + k * of_gamma + i;
            const V g = load<V>(at);
            V w{};
            for (int64_t j = 0; j < r; ++j) {
              const V u = load<V>(row.v + j * n + i) * row.mixed[j];
              w = fused(u, load<V>(row.lam + j * n + i), w);
              C* to = sum + j * row.padded + i;
              store(to, fused(u, g, load<V>(to)));
            }
            store(at, w);
          }
        }
        for (int64_t i = 0; i < n; ++i)
          for (int64_t k = 0; k < columns; ++k)
            dgam[i * d + k0 + k] = gamma[k * of_gamma + i] * C(p.s[k0 + k]);
      }
      C* to = sums + slot * r * n;
      for (int64_t j = 0; j < r; ++j)
        __builtin_memcpy(to + j * n, sum + j * row.padded, size_t(n) * sizeof(C));
    }
  });
  // `scale` is in the rows already.
  hadamard_diagonals_as<S>(
      {p.sizes, nullptr, sums, slots, p.s, p.col, p.dlam, nullptr, p.dtype, 1.0}, rt);
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
void hadamard_gamma_as(const HadamardGamma& p, Runtime& rt) {
  using C = ComputeOf<S>;
  const C *gam = static_cast<const C*>(p.gam), *lam = static_cast<const C*>(p.lam);
  C* factors = static_cast<C*>(p.factors);
  for (int64_t c = 0; c < p.sizes.K(); ++c) factors[c] = lam[c] * C(p.col[c]);
  ClassOf<S>* out = static_cast<ClassOf<S>*>(p.out);
  const int64_t n = p.sizes.n, d = p.sizes.d;
  rt.set_single(n * d < kHadamardOneThread);
  rt.split(out ? n : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t k = 0; k < d; ++k) narrow(gam[i * d + k] * C(p.s[k]), out + i * d + k);
  });
}

RANDLORA_BY_DTYPE(hadamard_up, HadamardUp)
RANDLORA_BY_DTYPE(hadamard_down, HadamardDown)
RANDLORA_BY_DTYPE(hadamard_signed, HadamardSigned)
RANDLORA_BY_DTYPE(hadamard_add, HadamardAdd)
RANDLORA_BY_DTYPE(hadamard_weight, HadamardWeight)
RANDLORA_BY_DTYPE(hadamard_weight_backward, HadamardWeightBackward)
RANDLORA_BY_DTYPE(hadamard_gamma, HadamardGamma)
RANDLORA_BY_DTYPE(hadamard_diagonals, HadamardDiagonals)

}  // namespace randlora::RANDLORA_ISA

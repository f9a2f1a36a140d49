// dW = scale * B @ A' and its adjoint. Neither A' nor a dense B is formed; the work is density^2
// of a GEMM's.
//
// For a rank index j the n rows of A' share the support S_j, so we store them compactly:
//   value[j][i][p] = A[j, k] lam[j, i] gam[i, k],  k = S_j[p]
// To make row o of dW, we add for each j the compact rows i with B[o, (j, i)] != 0, with their
// signs, and scatter the sum once to the positions S_j. The adjoint works alike: it gathers the
// gradient at S_j, adds it to the compact rows Z[j][i], and contracts Z into dlam and dgam at the
// end.
#pragma once
#include "../core/stochastic.h"
#include "rows_by_rank.h"
#include "token_block.h"

namespace randlora::RANDLORA_ISA {

// The offsets of each rank index's compact rows, which are padded to whole vectors.
template <class C>
struct Compact {
  static constexpr int L = kVectorBytes / int(sizeof(C));
  const Basis& b;
  explicit Compact(const Basis& basis) : b(basis) {}

  int64_t first(int64_t j) const { return b.a.plus(j); }
  int64_t support(int64_t j) const { return b.a.end(j) - first(j); }
  int64_t stride(int64_t j) const { return (support(j) + L - 1) / L * L; }
  // Leaves room for L - 1 elements of padding for each rank index before j, in closed form.
  int64_t start(int64_t j) const { return (first(j) + (j + 1) * (L - 1)) / L * L * b.n; }
  int64_t size() const { return start(b.r); }
  int64_t widest() const {
    int64_t most = 0;
    for (int64_t j = 0; j < b.r; ++j) most = stride(j) > most ? stride(j) : most;
    return most;
  }
  C sign(int64_t j, int64_t p) const { return first(j) + p < b.a.minus(j) ? C(1) : C(-1); }
};

template <class C>
void compact_values(const Compact<C>& at, const C* lam, const C* gam, C* value, Runtime& rt) {
  const Basis& b = at.b;
  rt.split(b.r, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      for (int64_t i = 0; i < b.n; ++i) {
        C* row = value + at.start(j) + i * at.stride(j);
        const C l = lam[j * b.n + i];
        for (int64_t p = 0; p < at.support(j); ++p)
          row[p] = at.sign(j, p) * l * gam[i * b.d + b.a.at(at.first(j) + p)];
        for (int64_t p = at.support(j); p < at.stride(j); ++p) row[p] = C(0);
      }
  });
}

// sum[0 .. stride) = signed sum of compact rows, four vectors in registers at a time.
template <class C, class Index>
RANDLORA_INLINE void sum_compact(const C* rows, int64_t stride, const Index* plus, int64_t n_plus,
                                 const Index* minus, int64_t n_minus, int64_t origin, C* sum) {
  using V = Vec<C>;
  constexpr int L = Compact<C>::L;
  const auto columns = [&](auto vectors, int64_t p) {
    V acc[vectors] = {};
    for (int64_t e = 0; e < n_plus; ++e) {
      const C* row = rows + (plus[e] - origin) * stride + p;
      for (int v = 0; v < vectors; ++v) acc[v] += load<V>(row + v * L);
    }
    for (int64_t e = 0; e < n_minus; ++e) {
      const C* row = rows + (minus[e] - origin) * stride + p;
      for (int v = 0; v < vectors; ++v) acc[v] -= load<V>(row + v * L);
    }
    for (int v = 0; v < vectors; ++v) store(sum + p + v * L, acc[v]);
  };
  int64_t p = 0;
  for (; p + 4 * L <= stride; p += 4 * L) columns(std::integral_constant<int, 4>{}, p);
  for (; p < stride; p += L) columns(std::integral_constant<int, 1>{}, p);
}

template <class S>
void delta_weight_as(const DeltaWeight& p, Runtime& rt) {
  using C = ComputeOf<S>;
  using B = Block<C, kVectorBytes, 1>;  // L rows of dW at a time; the transposed store needs L = TB
  constexpr int Rows = B::TB;
  const Basis& b = p.basis;
  const Compact<C> at(b);
  const int64_t blocks = (b.D + Rows - 1) / Rows;
  const int slots = int(blocks < rt.threads() ? blocks : rt.threads());

  struct Slot {
    C *rows, *turned, *sum;
    RowsByRank<Rows> walk;
    Slot(const Compact<C>& at, Arena& arena)
        : rows(arena.array<C>(Rows * at.b.d)),
          turned(arena.array<C>(at.b.d * Rows)),
          sum(arena.array<C>(at.widest())),
          walk(at.b, arena) {}
  };
  Arena shared, per_slot;
  shared.array<C>(at.size());
  Slot(at, per_slot);
  char* memory = static_cast<char*>(rt.scratch(shared.used() + slots * per_slot.used()));
  C* value = Arena(memory).array<C>(at.size());
  compact_values(at, static_cast<const C*>(p.lam), static_cast<const C*>(p.gam), value, rt);

  const S* base = static_cast<const S*>(p.base);
  S* out = static_cast<S*>(p.out);
  const C scale = C(p.scale);
  const auto finish = [&](C sum, int64_t to, RoundingWords& draw) {
    const C scaled = scale * sum, x = base ? C(widen(base[to])) + scaled : scaled;
    if constexpr (sizeof(S) == 2)
      if (p.stochastic) {
        out[to] = round_stochastic(x, draw(uint64_t(to)), S{});
        return;
      }
    narrow(x, out + to);
  };
  rt.each_slot(slots, [&](int slot) {
    Arena own(memory + shared.used() + slot * per_slot.used());
    Slot s(at, own);
    RoundingWords draw(p.rounding_seed);
    for (int64_t block = slot; block < blocks; block += slots) {
      const int64_t o = block * Rows;
      const int rows = int(b.D - o < Rows ? b.D - o : Rows);
      __builtin_memset(s.rows, 0, size_t(Rows * b.d) * sizeof(C));
      s.walk.start(o, rows, 0);
      for (int64_t j = 0; j < b.r; ++j) {
        const int64_t first = at.first(j), support = at.support(j), stride = at.stride(j);
        const C* compact = value + at.start(j);
        for (int q = 0; q < rows; ++q)
          s.walk.visit(
              q, j, [&](auto* plus, int64_t n_plus, auto* minus, int64_t n_minus, int64_t origin) {
                if (n_plus + n_minus == 0) return;
                sum_compact(compact, stride, plus, n_plus, minus, n_minus, origin, s.sum);
                C* row = s.rows + q * b.d;
                for (int64_t e = 0; e < support; ++e) row[b.a.at(first + e)] += s.sum[e];
              });
      }
      if (p.transposed) {
        load_block_from<B>(s.rows, b.d, rows, b.d, s.turned);
        for (int64_t k = 0; k < b.d; ++k)
          for (int q = 0; q < rows; ++q) finish(s.turned[k * Rows + q], k * b.D + o + q, draw);
      } else {
        for (int64_t e = 0; e < rows * b.d; ++e) finish(s.rows[e], o * b.d + e, draw);
      }
    }
  });
}

RANDLORA_BY_DTYPE(delta_weight, DeltaWeight)

template <class S>
void delta_weight_backward_as(const DeltaWeightBackward& p, Runtime& rt) {
  using C = ComputeOf<S>;
  using V = Vec<C>;
  constexpr int L = Compact<C>::L, Rows = L;
  const Basis& b = p.basis;
  const Compact<C> at(b);
  const int slots = int(b.r < rt.threads() ? b.r : rt.threads());

  struct Slot {
    C* grad;  // (Rows, stride of the rank index)
    RowsByRank<Rows> walk;
    Slot(const Compact<C>& at, Arena& arena)
        : grad(arena.array<C>(Rows * at.widest())), walk(at.b, arena) {}
  };
  Arena shared, per_slot;
  shared.array<C>(at.size());
  Slot(at, per_slot);
  char* memory = static_cast<char*>(rt.scratch(shared.used() + slots * per_slot.used()));
  C* Z = Arena(memory).array<C>(at.size());
  const S* G = static_cast<const S*>(p.grad);

  // A slot owns rank indices and adds rows of B in order: the same sums for any thread count.
  rt.each_slot(slots, [&](int slot) {
    const int64_t j0 = b.r * slot / slots, j1 = b.r * (slot + 1) / slots;
    Arena own(memory + shared.used() + slot * per_slot.used());
    Slot s(at, own);
    for (int64_t j = j0; j < j1; ++j)
      __builtin_memset(Z + at.start(j), 0, size_t(b.n * at.stride(j)) * sizeof(C));
    for (int64_t o = 0; o < b.D; o += Rows) {
      const int rows = int(b.D - o < Rows ? b.D - o : Rows);
      s.walk.start(o, rows, j0);
      for (int64_t j = j0; j < j1; ++j) {
        const int64_t first = at.first(j), support = at.support(j), stride = at.stride(j);
        for (int64_t e = 0; e < stride; ++e) {
          const int64_t k = e < support ? b.a.at(first + e) : -1;
          for (int q = 0; q < rows; ++q)
            s.grad[q * stride + e] =
                k < 0 ? C(0) : C(widen(G[p.transposed ? k * b.D + o + q : (o + q) * b.d + k]));
        }
        C* compact = Z + at.start(j);
        for (int q = 0; q < rows; ++q)
          s.walk.visit(
              q, j, [&](auto* plus, int64_t n_plus, auto* minus, int64_t n_minus, int64_t origin) {
                const C* g = s.grad + q * stride;
                for (int64_t e = 0; e < n_plus; ++e)
                  for (int64_t x = 0; x < stride; x += L) {
                    C* to = compact + (plus[e] - origin) * stride + x;
                    store(to, load<V>(to) + load<V>(g + x));
                  }
                for (int64_t e = 0; e < n_minus; ++e)
                  for (int64_t x = 0; x < stride; x += L) {
                    C* to = compact + (minus[e] - origin) * stride + x;
                    store(to, load<V>(to) - load<V>(g + x));
                  }
              });
      }
    }
  });

  const C scale = C(p.scale), *lam = static_cast<const C*>(p.lam),
          *gam = static_cast<const C*>(p.gam);
  C *dlam = static_cast<C*>(p.dlam), *dgam = static_cast<C*>(p.dgam);
  rt.split(b.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      __builtin_memset(dgam + i * b.d, 0, size_t(b.d) * sizeof(C));
      for (int64_t j = 0; j < b.r; ++j) {
        const C *row = Z + at.start(j) + i * at.stride(j), l = lam[j * b.n + i] * scale;
        C sum = 0;
        for (int64_t e = 0; e < at.support(j); ++e) {
          const int64_t k = i * b.d + b.a.at(at.first(j) + e);
          const C z = at.sign(j, e) * row[e];
          sum += z * gam[k];
          dgam[k] += z * l;
        }
        dlam[j * b.n + i] = sum * scale;
      }
    }
  });
}

RANDLORA_BY_DTYPE(delta_weight_backward, DeltaWeightBackward)

}  // namespace randlora::RANDLORA_ISA

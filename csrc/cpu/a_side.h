// The A side of the factored path. All n bases share A, so for a rank index j they have the same
// support S_j = {k : A[j, k] != 0}, and every product is a small dense product of gathered rows.
// Operands are token blocks: z is (d, TB), v and u are (K, TB).
//
// gT is gamma transposed, (d, ldg) with ldg >= n and zero padding: the gammas of all bases for one
// support position k are adjacent.
#pragma once
#include "../core/operators.h"
#include "token_block.h"

namespace randlora::RANDLORA_ISA {

// Rows of a register tile. With NV = 2 a tile holds 2 * kTile accumulators: half of AVX-512's 32
// registers, half of AVX2's 16.
constexpr int kTile = kVectorBytes == 64 ? 8 : 4;

// Calls fn(integral_constant<rows>, first) over [first, count) in tiles of kTile, then kTile / 2,
// ... and 1.
template <int Rows = kTile, class F>
RANDLORA_INLINE void tiles(int64_t first, int64_t count, const F& fn) {
  for (; first + Rows <= count; first += Rows) fn(std::integral_constant<int, Rows>{}, first);
  if constexpr (Rows > 1) tiles<Rows / 2>(first, count, fn);
}

// v[j * n + i] = lam[j, i] * sum_{k in S_j} A[j, k] gamma[i, k] z[k]
template <class B>
void a_up(const Basis& b, const typename B::C* lam, const typename B::C* gT, int64_t ldg,
          const typename B::C* z, typename B::C* v) {
  using C = typename B::C;
  using V = typename B::V;
  b.a.typed([&](const auto& a) RANDLORA_INLINED {
    for (int64_t j = 0; j < b.r; ++j) {
      const int64_t plus = a.plus(j), minus = a.minus(j), end = a.end(j);
      tiles(0, b.n, [&](auto rows, int64_t i) RANDLORA_INLINED {
        V acc[rows][B::NV] = {};
        const auto add = [&](int64_t first, int64_t last) RANDLORA_INLINED {
          for (int64_t p = first; p < last; ++p) {
            const C *g = gT + a.index[p] * ldg + i, *zk = z + int64_t(a.index[p]) * B::TB;
            unrolled<rows>([&](auto m) RANDLORA_INLINED {
              for (int q = 0; q < B::NV; ++q)
                acc[m][q] = add_product(acc[m][q], g[m], load<V>(zk + q * B::L));
            });
          }
        };
        const auto negate = [&] {
          unrolled<rows>([&](auto m) RANDLORA_INLINED {
            for (int q = 0; q < B::NV; ++q) acc[m][q] = -acc[m][q];
          });
        };
        // Negates the sums between the runs: negating every gamma instead takes a fifth longer.
        add(plus, minus);
        negate();
        add(minus, end);
        negate();
        const int64_t c = j * b.n + i;
        unrolled<rows>([&](auto m) RANDLORA_INLINED {
          for (int q = 0; q < B::NV; ++q)
            store(v + (c + m) * B::TB + q * B::L, acc[m][q] * lam[c + m]);
        });
      });
    }
  });
}

// z[k] += sum_i A[j, k] gamma[i, k] lam[i] u[i] for one rank index j. u is (n, TB), lam row j of
// lambda, and `scaled` (n, TB) scratch.
template <class B>
void a_down(const Basis& b, int64_t j, const typename B::C* lam, const typename B::C* gT,
            int64_t ldg, const typename B::C* u, typename B::C* scaled, typename B::C* z) {
  using C = typename B::C;
  using V = typename B::V;
  const AnyLists& a = b.a;
  const int64_t n = b.n;
  for (int64_t i = 0; i < n; ++i)
    for (int q = 0; q < B::NV; ++q)
      store(scaled + i * B::TB + q * B::L, load<V>(u + i * B::TB + q * B::L) * lam[i]);
  const int64_t minus = a.minus(j);
  tiles(a.plus(j), a.end(j), [&](auto rows, int64_t p) RANDLORA_INLINED {
    V acc[rows][B::NV] = {};
    const C* g[rows];
    unrolled<rows>([&](auto m) RANDLORA_INLINED { g[m] = gT + a.at(p + m) * ldg; });
    for (int64_t i = 0; i < n; ++i) {
      unrolled<rows>([&](auto m) RANDLORA_INLINED {
        for (int q = 0; q < B::NV; ++q)
          acc[m][q] = add_product(acc[m][q], g[m][i], load<V>(scaled + i * B::TB + q * B::L));
      });
    }
    unrolled<rows>([&](auto m) RANDLORA_INLINED {
      const C sign = p + m < minus ? C(1) : C(-1);
      for (int q = 0; q < B::NV; ++q) {
        C* to = z + a.at(p + m) * B::TB + q * B::L;
        store(to, load<V>(to) + sign * acc[m][q]);
      }
    });
  });
}

// ut[t][i] = u[i][t] for the n rows of one rank index; ut is (TB, ldg), zero-padded in i.
template <class B>
void transpose_bases(const typename B::C* u, int64_t n, int64_t ldg, typename B::C* ut) {
  using V = typename B::V;
  for (int64_t i = 0; i < ldg; i += B::L)
    for (int q = 0; q < B::NV; ++q) {
      V m[B::L];
      unrolled<B::L>([&](auto l) RANDLORA_INLINED {
        m[l] = i + l < n ? load<V>(u + (i + l) * B::TB + q * B::L) : V{};
      });
      transpose<B::L>(m);
      unrolled<B::L>([&](auto l) RANDLORA_INLINED { store(ut + (q * B::L + l) * ldg + i, m[l]); });
    }
}

// P[p][i] (+)= sum_t z[k][t] * ut[t][i] for the entries p of one rank index j, at position k. If
// `fresh`, sets P instead of adding to it. Each token adds a rank-one update; a vector holds
// consecutive bases i. Prefetches z a tile ahead, because much of it lies in the caches of other
// threads. Sums the tokens of a block before adding to P, so rounding errors grow with
// sqrt(TB + T / TB), not sqrt(T). P (entries, ldg) has all rank indices; ut (TB, ldg) is for j
// alone.
template <class B>
void a_grad(const Basis& b, int64_t j, int64_t ldg, int64_t tokens, const typename B::C* z,
            const typename B::C* ut, typename B::C* P, bool fresh) {
  using C = typename B::C;
  using V = Vec<C>;
  constexpr int L = kVectorBytes / int(sizeof(C));
  const AnyLists& a = b.a;
  const int64_t end = a.end(j);
  const auto columns = [&](auto vectors, int64_t i) RANDLORA_INLINED {
    tiles(a.plus(j), end, [&](auto rows, int64_t p) RANDLORA_INLINED {
      V acc[rows][vectors] = {};
      const C* zk[rows];
      unrolled<rows>([&](auto m) RANDLORA_INLINED { zk[m] = z + a.at(p + m) * B::TB; });
      for (int64_t next = p + rows; next < p + rows + kTile && next < end; ++next)
        for (int x = 0; x < B::TB; x += 64 / int(sizeof(C)))
          __builtin_prefetch(z + a.at(next) * B::TB + x);
      for (int64_t t = 0; t < tokens; ++t)
        unrolled<rows>([&](auto m) RANDLORA_INLINED {
          for (int q = 0; q < vectors; ++q)
            acc[m][q] = add_product(acc[m][q], zk[m][t], load<V>(ut + t * ldg + i + q * L));
        });
      unrolled<rows>([&](auto m) RANDLORA_INLINED {
        for (int q = 0; q < vectors; ++q) {
          C* to = P + (p + m) * ldg + i + q * L;
          store(to, fresh ? acc[m][q] : load<V>(to) + acc[m][q]);
        }
      });
    });
  };
  int64_t i = 0;
  for (; i + 2 * L <= ldg; i += 2 * L) columns(std::integral_constant<int, 2>{}, i);
  if (i < ldg) columns(std::integral_constant<int, 1>{}, i);
}

}  // namespace randlora::RANDLORA_ISA

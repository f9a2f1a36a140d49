// The A side of independent bases. All n copies of row j of A (rank index j) have the same
// support S_j = {k : A[j, k] != 0}, and every product is a small dense product of gathered rows.
// Operands are token blocks: z is (d, tokens), v and u are (K, tokens).
//
// gT is gamma transposed, (d, ldg) with ldg >= n and zero padding: the gammas of all copies for one
// support position k are adjacent.
#pragma once
#include "../core/operators.h"
#include "token_block.h"

namespace randlora::RANDLORA_ISA {

// Rows of a register tile. With kVectors = 2 a tile holds 2 * kTile accumulators: half of AVX-512's
// 32 registers, half of AVX2's 16.
constexpr int kTile = kVectorBytes == 64 ? 8 : 4;

// Calls fn(integral_constant<rows>, first) over [first, count) in tiles of kTile, then kTile / 2,
// ... and 1.
template <int Rows = kTile, class F>
RANDLORA_INLINE void tiles(int64_t first, int64_t count, const F& fn) {
  for (; first + Rows <= count; first += Rows) fn(std::integral_constant<int, Rows>{}, first);
  if constexpr (Rows > 1) tiles<Rows / 2>(first, count, fn);
}

// v[j * n + i] = lam[j, i] * sum_{k in S_j} A[j, k] gamma[i, k] z[k]
template <class Block>
void a_up(const TernaryBases& b, const typename Block::C* lam, const typename Block::C* gT,
          int64_t ldg, const typename Block::C* z, typename Block::C* v) {
  using C = typename Block::C;
  using Vector = typename Block::Vector;
  const Lists a = b.a;
  for (int64_t j = 0; j < b.r; ++j) {
    const int64_t plus = a.plus(j), minus = a.minus(j), end = a.end(j);
    tiles(0, b.n, [&](auto rows, int64_t i) RANDLORA_INLINED {
      Vector acc[rows][Block::kVectors] = {};
      const auto add = [&](int64_t first, int64_t last) RANDLORA_INLINED {
        for (int64_t p = first; p < last; ++p) {
          const C *g = gT + a.index[p] * ldg + i, *zk = z + int64_t(a.index[p]) * Block::kTokens;
          unrolled<rows>([&](auto m) RANDLORA_INLINED {
            for (int q = 0; q < Block::kVectors; ++q)
              acc[m][q] = add_product(acc[m][q], g[m], load<Vector>(zk + q * Block::kLanes));
          });
        }
      };
      const auto negate = [&] {
        unrolled<rows>([&](auto m) RANDLORA_INLINED {
          for (int q = 0; q < Block::kVectors; ++q) acc[m][q] = -acc[m][q];
        });
      };
      // Negates the sums between the runs: negating every gamma instead takes a fifth longer.
      add(plus, minus);
      negate();
      add(minus, end);
      negate();
      const int64_t c = j * b.n + i;
      unrolled<rows>([&](auto m) RANDLORA_INLINED {
        for (int q = 0; q < Block::kVectors; ++q)
          store(v + (c + m) * Block::kTokens + q * Block::kLanes, acc[m][q] * lam[c + m]);
      });
    });
  }
}

// z[k] += sum_i A[j, k] gamma[i, k] lam[i] u[i] for one rank index j. u is (n, tokens), lam row j
// of lambda, and `scaled` (n, tokens) scratch.
template <class Block>
void a_down(const TernaryBases& b, int64_t j, const typename Block::C* lam,
            const typename Block::C* gT, int64_t ldg, const typename Block::C* u,
            typename Block::C* scaled, typename Block::C* z) {
  using C = typename Block::C;
  using Vector = typename Block::Vector;
  const Lists a = b.a;
  const int64_t n = b.n;
  for (int64_t i = 0; i < n; ++i)
    for (int q = 0; q < Block::kVectors; ++q)
      store(scaled + i * Block::kTokens + q * Block::kLanes,
            load<Vector>(u + i * Block::kTokens + q * Block::kLanes) * lam[i]);
  const int64_t minus = a.minus(j);
  tiles(a.plus(j), a.end(j), [&](auto rows, int64_t p) RANDLORA_INLINED {
    Vector acc[rows][Block::kVectors] = {};
    const C* g[rows];
    unrolled<rows>([&](auto m) RANDLORA_INLINED { g[m] = gT + a.index[p + m] * ldg; });
    for (int64_t i = 0; i < n; ++i) {
      unrolled<rows>([&](auto m) RANDLORA_INLINED {
        for (int q = 0; q < Block::kVectors; ++q)
          acc[m][q] = add_product(acc[m][q], g[m][i],
                                  load<Vector>(scaled + i * Block::kTokens + q * Block::kLanes));
      });
    }
    unrolled<rows>([&](auto m) RANDLORA_INLINED {
      const C sign = p + m < minus ? C(1) : C(-1);
      for (int q = 0; q < Block::kVectors; ++q) {
        C* to = z + a.index[p + m] * Block::kTokens + q * Block::kLanes;
        store(to, load<Vector>(to) + sign * acc[m][q]);
      }
    });
  });
}

// ut[t][i] = u[i][t] for the n rows of one rank index; ut is (tokens, ldg), zero-padded in i.
template <class Block>
void transpose_copies(const typename Block::C* u, int64_t n, int64_t ldg, typename Block::C* ut) {
  using Vector = typename Block::Vector;
  for (int64_t i = 0; i < ldg; i += Block::kLanes)
    for (int q = 0; q < Block::kVectors; ++q) {
      Vector m[Block::kLanes];
      unrolled<Block::kLanes>([&](auto l) RANDLORA_INLINED {
        m[l] =
            i + l < n ? load<Vector>(u + (i + l) * Block::kTokens + q * Block::kLanes) : Vector{};
      });
      transpose<Block::kLanes>(m);
      unrolled<Block::kLanes>(
          [&](auto l) RANDLORA_INLINED { store(ut + (q * Block::kLanes + l) * ldg + i, m[l]); });
    }
}

// P[p][i] (+)= sum_t z[k][t] * ut[t][i] for the entries p of one rank index j, at position k. If
// `fresh`, sets P instead of adding to it. Each token adds a rank-one update; a vector holds
// consecutive copies i. Prefetches z a tile ahead, because much of it lies in the caches of other
// threads. Sums the tokens of a block before adding to P, so rounding errors grow with
// sqrt(kTokens + T / kTokens), not sqrt(T). P (entries, ldg) has all rank indices; ut (tokens, ldg)
// is for j alone.
template <class Block>
void a_grad(const TernaryBases& b, int64_t j, int64_t ldg, int64_t tokens,
            const typename Block::C* z, const typename Block::C* ut, typename Block::C* P,
            bool fresh) {
  using C = typename Block::C;
  using Vector = Vec<C>;
  constexpr int kLanes = kVectorBytes / int(sizeof(C));
  const Lists a = b.a;
  const int64_t end = a.end(j);
  const auto columns = [&](auto vectors, int64_t i) RANDLORA_INLINED {
    tiles(a.plus(j), end, [&](auto rows, int64_t p) RANDLORA_INLINED {
      Vector acc[rows][vectors] = {};
      const C* zk[rows];
      unrolled<rows>([&](auto m) RANDLORA_INLINED { zk[m] = z + a.index[p + m] * Block::kTokens; });
      for (int64_t next = p + rows; next < p + rows + kTile && next < end; ++next)
        for (int x = 0; x < Block::kTokens; x += 64 / int(sizeof(C)))
          __builtin_prefetch(z + a.index[next] * Block::kTokens + x);
      for (int64_t t = 0; t < tokens; ++t)
        unrolled<rows>([&](auto m) RANDLORA_INLINED {
          for (int q = 0; q < vectors; ++q)
            acc[m][q] =
                add_product(acc[m][q], zk[m][t], load<Vector>(ut + t * ldg + i + q * kLanes));
        });
      unrolled<rows>([&](auto m) RANDLORA_INLINED {
        for (int q = 0; q < vectors; ++q) {
          C* to = P + (p + m) * ldg + i + q * kLanes;
          store(to, fresh ? acc[m][q] : load<Vector>(to) + acc[m][q]);
        }
      });
    });
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= ldg; i += 2 * kLanes) columns(std::integral_constant<int, 2>{}, i);
  if (i < ldg) columns(std::integral_constant<int, 1>{}, i);
}

}  // namespace randlora::RANDLORA_ISA

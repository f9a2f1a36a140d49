// The factored path, forward and backward (equations in docs/math.md):
//
//   expand (d == in)                              reduce (d == out)
//     forward   V = x A'^T,  y += s V B^T           U = x B,   y += s U A'
//     backward  U = dy B                            V = dy A'^T,  dx += s V B^T
//               dx += s U A'                        U = x B
//               P_j = U_j^T x[:, S_j]               P_j = U_j^T dy[:, S_j]
//     dlam[j, i] = s sum_k A gam P    dgam[i, k] = s sum_j A lam P
//
// V, U and P live in scratch for a bounded number of tokens at a time; nothing is kept in between.
#pragma once
#include "a_side.h"
#include "b_side.h"

namespace randlora {
namespace RANDLORA_ISA {

// Lines of B per tile of output: 64, so that planes are decoded by whole words.
constexpr int kLines = 64;

// gamma as the A side reads it: (d, ldg), the bases of one support position side by side.
template <class C>
struct Gamma {
  static int64_t stride(int64_t n) {
    constexpr int64_t lanes = kVectorBytes / int(sizeof(C));
    return (n + lanes - 1) / lanes * lanes;
  }
  static void transpose_into(const Basis& b, const void* gam, C* gT, Runtime& rt) {
    const int64_t ldg = stride(b.n), n = b.n, d = b.d;
    const C* g = static_cast<const C*>(gam);
    rt.split(d, 64, [&](int64_t begin, int64_t end) {
      for (int64_t k0 = begin; k0 < end; k0 += 16) {  // 16 columns: one cache line of every row
        const int64_t k1 = k0 + 16 < end ? k0 + 16 : end;
        for (int64_t i = 0; i < n; ++i)
          for (int64_t k = k0; k < k1; ++k) gT[k * ldg + i] = g[i * d + k];
        for (int64_t k = k0; k < k1; ++k)
          for (int64_t i = n; i < ldg; ++i) gT[k * ldg + i] = C(0);
      }
    });
  }
};

template <class B>
void run_a_up(const Basis& b, const void* lam, const typename B::C* gT, const typename B::C* z,
              typename B::C* v) {
  const auto* l = static_cast<const typename B::C*>(lam);
  const int64_t ldg = Gamma<typename B::C>::stride(b.n);
  b.wide ? a_up<B>(b.a.as<uint32_t>(), b.r, b.n, l, gT, ldg, z, v)
         : a_up<B>(b.a.as<uint16_t>(), b.r, b.n, l, gT, ldg, z, v);
}

template <class B>
void run_a_down(const Basis& b, const void* lam, const typename B::C* gT, const typename B::C* u,
                typename B::C* scaled, typename B::C* z) {
  const auto* l = static_cast<const typename B::C*>(lam);
  const int64_t ldg = Gamma<typename B::C>::stride(b.n);
  __builtin_memset(z, 0, size_t(b.d) * B::TB * sizeof(*z));
  b.wide ? a_down<B>(b.a.as<uint32_t>(), b.r, b.n, l, gT, ldg, u, scaled, z)
         : a_down<B>(b.a.as<uint16_t>(), b.r, b.n, l, gT, ldg, u, scaled, z);
}

// What one slot needs to push a token block through both sides.
template <class B>
struct Slot {
  using C = typename B::C;
  C *small, *large, *mid, *scaled;  // (d, TB), (D, TB), (K, TB), (n, TB)
  C* lines;                         // (kLines, TB)
  DecodedChunk* chunk;

  Slot(const Basis& b, Arena& arena)
      : small(arena.take<C>(b.d * B::TB)),
        large(arena.take<C>(b.D * B::TB)),
        mid(arena.take<C>(b.K() * B::TB)),
        scaled(arena.take<C>(b.n * B::TB)),
        lines(arena.take<C>(kLines * B::TB)),
        chunk(arena.take<DecodedChunk>(b.has_planes() ? 1 : 0)) {}
};

// out (T, D) (+)= scale * v B^T for one block, 64 features at a time.
template <class B>
void emit_up(const Basis& b, Slot<B>& s, double scale, bool accumulate, int64_t tokens, void* out,
             DType dtype, int64_t t) {
  for (int64_t o = 0; o < b.D; o += kLines) {
    const int64_t lines = b.D - o < kLines ? b.D - o : kLines;
    b_up<B>(b, o, o + lines, s.mid, s.lines, s.chunk);
    store_block<B>(s.lines, typename B::C(scale), accumulate, tokens, lines, out, dtype, t, b.D, o);
  }
}

template <class B>
void linear_blocks(const Linear& p, Runtime& rt) {
  using C = typename B::C;
  const Basis& b = p.basis;
  const int64_t blocks = (p.T + B::TB - 1) / B::TB;
  const int slots = int(blocks < rt.threads() ? blocks : rt.threads());
  const auto layout = [&](Arena& arena) { return arena.take<C>(b.d * Gamma<C>::stride(b.n)); };
  Arena measure;
  layout(measure);
  const size_t shared = measure.used();
  Arena per_slot;
  Slot<B>(b, per_slot);
  char* memory = static_cast<char*>(rt.scratch(shared + slots * per_slot.used()));
  Arena arena(memory);
  C* gT = layout(arena);
  Gamma<C>::transpose_into(b, p.gam, gT, rt);

  rt.each_slot(slots, [&](int slot) {
    Arena own(memory + shared + slot * per_slot.used());
    Slot<B> s(b, own);
    for (int64_t block = slot; block < blocks; block += slots) {
      const int64_t t = block * B::TB, tokens = p.T - t < B::TB ? p.T - t : B::TB;
      if (p.expand) {
        load_block<B>(p.x, p.dtype, t, b.d, tokens, s.small);
        run_a_up<B>(b, p.lam, gT, s.small, s.mid);
        emit_up<B>(b, s, p.scale, p.accumulate, tokens, p.y, p.dtype, t);
      } else {
        load_block<B>(p.x, p.dtype, t, b.D, tokens, s.large);
        b_down<B>(b, 0, b.K(), s.large, s.mid, s.chunk);
        run_a_down<B>(b, p.lam, gT, s.mid, s.scaled, s.small);
        store_block<B>(s.small, C(p.scale), p.accumulate, tokens, b.d, p.y, p.dtype, t, b.d, 0);
      }
    }
  });
}

inline void linear(const Linear& p, Runtime& rt) {
  if (p.dtype == DType::f64)
    with_block<double>(p.T, rt.threads(), [&](auto b) { linear_blocks<decltype(b)>(p, rt); });
  else
    with_block<float>(p.T, rt.threads(), [&](auto b) { linear_blocks<decltype(b)>(p, rt); });
}

}  // namespace RANDLORA_ISA
}  // namespace randlora

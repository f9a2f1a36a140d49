// Instructions of a whole warp: its lanes wait for each other; the last to arrive computes for all.
#include "ptx_on_cpu.h"

namespace randlora {

namespace {

using cuda_on_cpu::collective;
using cuda_on_cpu::require;
using cuda_on_cpu::Site;

struct MmaOperand {
  float c[4];
  uint32_t a[4], b[2];
};

struct Bf16 {
  CUDA_ON_CPU_UNSEEN static float element(uint32_t reg, int i) {
    return float_of_bits(i ? reg & 0xffff0000u : reg << 16);
  }
};
struct F16 {
  CUDA_ON_CPU_UNSEEN static float element(uint32_t reg, int i) {
    const uint16_t bits = static_cast<uint16_t>(reg >> (16 * i));
    _Float16 h;
    __builtin_memcpy(&h, &bits, 2);
    return static_cast<float>(h);
  }
};

// C (16, 8) += A (16, 16) B (16, 8).
template <class E>
CUDA_ON_CPU_UNSEEN void multiply(void* const* lane, unsigned) {
  float A[16][16], B[16][8], C[16][8];
  for (int l = 0; l < 32; ++l) {
    const MmaOperand& o = *static_cast<const MmaOperand*>(lane[l]);
    const int g = l / 4, q = l % 4;
    for (int i = 0; i < 2; ++i) {
      for (int h = 0; h < 4; ++h) A[g + h % 2 * 8][2 * q + i + h / 2 * 8] = E::element(o.a[h], i);
      for (int h = 0; h < 2; ++h) B[2 * q + i + h * 8][g] = E::element(o.b[h], i);
    }
    for (int e = 0; e < 4; ++e) C[g + e / 2 * 8][2 * q + e % 2] = o.c[e];
  }
  for (int m = 0; m < 16; ++m)
    for (int i = 0; i < 16; ++i)
      for (int n = 0; n < 8; ++n) C[m][n] += A[m][i] * B[i][n];
  for (int l = 0; l < 32; ++l) {
    MmaOperand& o = *static_cast<MmaOperand*>(lane[l]);
    for (int e = 0; e < 4; ++e) o.c[e] = C[l / 4 + e / 2 * 8][2 * (l % 4) + e % 2];
  }
}

template <class E>
void multiply_in_warp(Site site, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperand o;
  memcpy(o.c, c, sizeof(c)), memcpy(o.a, a, sizeof(a)), memcpy(o.b, b, sizeof(b));
  collective(site, 0xffffffffu, &o, multiply<E>);
  memcpy(c, o.c, sizeof(c));
}

// Every lane reads the row at its address; the exchange distributes the elements.
struct Row {
  uint16_t row[8];
  uint32_t r[4];
};
template <bool Trans>
CUDA_ON_CPU_UNSEEN void exchange(void* const* lane, unsigned) {
  for (int l = 0; l < 32; ++l)
    for (int m = 0; m < 4; ++m) {
      uint32_t element[2];
      for (int i = 0; i < 2; ++i) {
        const int g = l / 4, at = l % 4 * 2 + i, row = Trans ? at : g, col = Trans ? g : at;
        element[i] = static_cast<const Row*>(lane[m * 8 + row])->row[col];
      }
      static_cast<Row*>(lane[l])->r[m] = element[0] | element[1] << 16;
    }
}
void require_aligned(const Site& site, const void* p, unsigned bytes = 16) {
  require(reinterpret_cast<uintptr_t>(p) % bytes == 0, site,
          bytes == 8 ? "the address is not 8-byte aligned" : "the address is not 16-byte aligned");
}
void require_shared(const Site& site, const void* p, unsigned bytes = 16) {
  const auto* at = static_cast<const unsigned char*>(p);
  const unsigned char *from = cuda_on_cpu::shared(), *to = from + cuda_on_cpu::shared_bytes();
  require_aligned(site, p, bytes);
  require(at >= from && at + bytes <= to, site, "the address is not in the block's shared memory");
}
template <bool Trans>
void ldmatrix(Site site, uint32_t (&r)[4], const void* shared_row) {
  require_shared(site, shared_row);
  Row o;
  memcpy(o.row, shared_row, 16);
  collective(site, 0xffffffffu, &o, exchange<Trans>);
  memcpy(r, o.r, sizeof(r));
}

}  // namespace

#define SITE const char *file, int line
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16, SITE) {
  multiply_in_warp<Bf16>({"mma bf16", file, line}, c, a, b);
}
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16, SITE) {
  multiply_in_warp<F16>({"mma f16", file, line}, c, a, b);
}

void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, SITE) {
  ldmatrix<false>({"ldmatrix", file, line}, r, shared_row);
}
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, SITE) {
  ldmatrix<true>({"ldmatrix trans", file, line}, r, shared_row);
}

void store16(void* global, uint32_t a, uint32_t b, uint32_t c, uint32_t d, SITE) {
  require_aligned({"store16", file, line}, global);
  const uint32_t words[4] = {a, b, c, d};
  memcpy(global, words, 16);
}
void store8(float* shared, float a, float b, SITE) {
  require_shared({"store8", file, line}, shared, 8);
  shared[0] = a, shared[1] = b;
}

void cp_async16(void* shared, const void* global, int bytes, SITE) {
  const Site site{"cp.async", file, line};
  require_shared(site, shared);
  require_aligned(site, global);
  require(bytes >= 0 && bytes <= 16, site, "between 0 and 16 bytes");
  uint64_t data[2] = {0, 0};
  if (bytes > 0) memcpy(data, global, static_cast<size_t>(bytes));
  memset(shared, 0xff, 16);
  require(cuda_on_cpu::push_copy(shared, data), site, "too many copies under way");
}

}  // namespace randlora

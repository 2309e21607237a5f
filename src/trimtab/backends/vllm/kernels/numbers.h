// Numbers: the dtypes that values are rounded to, and sums in one fixed order.

#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

inline uint32_t bits(float v) { uint32_t u; std::memcpy(&u, &v, 4); return u; }
inline float real(uint32_t u) { float v; std::memcpy(&v, &u, 4); return v; }
constexpr uint32_t SIGN = 0x80000000u, INF = 0x7f800000u, NAN_BITS = 0x7fc00000u;

// A dtype T: load gives the value of stored bits, round the nearest value of T, store the bits of a value of T; summed
// rounds the sum of two values of T, whose NaN may keep its payload. carries: what quick makes of a number that rounds to
// infinity, or of a NaN, is seen in its sum with another number.
struct F32 {
  using type = float;
  static constexpr float max = 0x1.fffffep127f, below_max = 0x1.fffffcp127f;
  static constexpr bool carries = true;
  static constexpr uint32_t over = INF;  // bits of the smallest number that rounds to infinity
  static float round(float v) { return v; }
  static float quick(float v) { return v; }
  static float summed(float v) { return v; }
  static float load(float v) { return v; }
  static float store(float v) { return v; }
};

struct BF16 {
  using type = uint16_t;
  static constexpr float max = 0x1.fep127f, below_max = 0x1.fcp127f;
  static constexpr bool carries = true;
  static constexpr uint32_t over = 0x7f7f8000u;
  static float round(float v) {
    const uint32_t u = bits(v);
    return (u & ~SIGN) > INF ? real((u & SIGN) | NAN_BITS) : quick(v);
  }
  static float quick(float v) {  // of numbers only
    const uint32_t u = bits(v);
    return real((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
  }
  static float summed(float v) { return quick(v); }  // infinity stays, and the lower half of such a NaN is zero
  static float load(uint16_t v) { return real(uint32_t(v) << 16); }
  static uint16_t store(float v) { return uint16_t(bits(v) >> 16); }
};

struct F16 {
  using type = uint16_t;
  static constexpr float max = 0x1.ffcp15f, below_max = 0x1.ff8p15f;
  static constexpr bool carries = false;
  static constexpr uint32_t over = 0x477ff000u;
  static constexpr uint32_t NORMAL = 0x38800000u;  // 2^-14; below it numbers are multiples of 2^-24, the ulp of [0.5, 1)
  static float round(float v) {
    const uint32_t u = bits(v), a = u & ~SIGN;
    const uint32_t special = a > INF ? NAN_BITS : INF;
    return a >= over ? real(special | (u & SIGN)) : quick(v);
  }
  static float quick(float v) {  // of numbers that do not round to infinity
    const uint32_t u = bits(v), a = u & ~SIGN;
    const uint32_t small = bits((real(a) + 0.5f) - 0.5f);
    return real((a < NORMAL ? small : ((a + 0xfffu + ((a >> 13) & 1u)) & ~0x1fffu)) | (u & SIGN));
  }
  static float summed(float v) { return round(v); }
  static float load(uint16_t v) {
    const uint32_t a = v & 0x7fffu, e = a >> 10;
    const uint32_t small = bits(real(0x3f000000u | a) - 0.5f);
    const uint32_t normal = (a << 13) + (e == 31u ? 0x70000000u : 0x38000000u);
    return real((e == 0u ? small : normal) | (uint32_t(v & 0x8000u) << 16));
  }
  static uint16_t store(float v) {
    const uint32_t u = bits(v), a = u & ~SIGN;
    const uint32_t small = bits(real(a) + 0.5f) & 0x7ffu;
    const uint32_t normal = (a >> 13) - (112u << 10);
    const uint32_t wide = a > INF ? 0x7e00u : 0x7c00u;
    return uint16_t((a >= INF ? wide : a < NORMAL ? small : normal) | ((u & SIGN) >> 16));
  }
};

template <class Fn>
inline void with_dtype(int code, const Fn& fn) {
  if (code == 0) fn(F32{});
  else if (code == 1) fn(BF16{});
  else fn(F16{});
}

inline bool finite(float v) { return (bits(v) & ~SIGN) < INF; }

// t[0..N) += t[N..2N), down to one number; N constant, so that all of it stays in registers.
template <int64_t N>
inline float fold(const float* __restrict t) {
  if constexpr (N == 0) {
    return t[0];
  } else {
    float half[N];
    for (int64_t i = 0; i < N; ++i) half[i] = t[i] + t[i + N];
    return fold<N / 2>(half);
  }
}

constexpr int64_t LANES = 16;

// Sum of t[0..h-1] by halves; inlined, it leaves too few registers to its callers.
[[gnu::noinline]] float halved(int64_t h, float* __restrict t) {
  if (h % LANES == 0) {  // whole vectors
    while (h > 4 * LANES && h % (2 * LANES) == 0) {
      h /= 2;
      const float* __restrict upper = t + h;
      for (int64_t i = 0; i < h; ++i) t[i] += upper[i];
    }
    if (h == 4 * LANES) return fold<2 * LANES>(t);
    if (h == 2 * LANES) return fold<LANES>(t);
    if (h == LANES) return fold<LANES / 2>(t);
  }
  for (int64_t m = h; m > 1; m = h) {
    h = (m + 1) / 2;
    const float* __restrict upper = t + h;
    for (int64_t i = 0; i < m - h; ++i) t[i] += upper[i];
  }
  return t[0];
}

// Sum of term(0..n-1) by halves; `t` is room for n / 2 + 1 floats.
template <class Term>
inline float sum(int64_t n, float* __restrict t, const Term& term) {
  const int64_t h = (n + 1) / 2;
  if (n % (2 * LANES) == 0) {
    for (int64_t i = 0; i < h; ++i) t[i] = term(i) + term(i + h);
  } else {
    for (int64_t i = 0; i < n - h; ++i) t[i] = term(i) + term(i + h);
    if (n - h < h) t[h - 1] = term(h - 1);
  }
  return halved(h, t);
}

// Several such sums in one walk; `t` has room for each of them, one after another.
template <class... Term>
inline std::array<float, sizeof...(Term)> sums(int64_t n, float* __restrict t, const Term&... term) {
  const int64_t h = (n + 1) / 2;
#pragma GCC ivdep  // the rooms do not overlap: without it such loops are not vectorised
  for (int64_t i = 0; i < n - h; ++i) {
    int64_t at = i;
    ((t[at] = term(i) + term(i + h), at += h), ...);
  }
  int64_t at = h - 1;
  if (n - h < h) ((t[at] = term(h - 1), at += h), ...);
  std::array<float, sizeof...(Term)> found;
  for (float& one : found) { one = halved(h, t); t += h; }
  return found;
}

inline float dot(const float* __restrict a, const float* __restrict b, int64_t n, float* t) {
  return sum(n, t, [=](int64_t i) { return a[i] * b[i]; });
}

inline float norm(const float* a, int64_t n, float* t) { return std::sqrt(dot(a, a, n, t)); }

// One number for several: itself, or the norm.
inline float size(const float* v, int64_t n) {
  if (n == 1) return v[0];
  float total = v[0] * v[0];
  for (int64_t i = 1; i < n; ++i) total += v[i] * v[i];
  return std::sqrt(total);
}

}  // namespace

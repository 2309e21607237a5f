// Rows of bfloat16 whose width is whole vectors, as steer.cpp works on others and to the same bit. A permutation of words
// widens or narrows in one instruction where compilers take three, and little code is what a row that comes once in a
// pass finds in no cache.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "numbers.h"

namespace {
namespace wide {

#ifdef __AVX512BW__
constexpr bool HERE = true;
#else
constexpr bool HERE = false;  // such permutations take longer than the shifts they replace
#endif

constexpr int64_t WHOLE = 64;  // numbers; widths are multiples of it

constexpr bool takes(int64_t width) { return HERE && width % WHOLE == 0; }

using Words = uint16_t __attribute__((vector_size(64)));
using Bits = uint32_t __attribute__((vector_size(64)));
using Reals = float __attribute__((vector_size(64)));

template <class V>
inline V load(const void* from) { V v; std::memcpy(&v, from, sizeof v); return v; }

template <class V>
inline void store(void* to, V v) { std::memcpy(to, &v, sizeof v); }

struct Pair { Reals low, high; };  // 32 numbers

template <size_t... I>
inline Words choose(Words a, Words b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, I...);
#else  // GCC before 12
  return __builtin_shuffle(a, b, Words{I...});
#endif
}

template <size_t... I>
inline Pair widened(Words all, std::index_sequence<I...>) {
  const Words none{};
  return {Reals(choose<(I % 2 ? 32 + I / 2 : I)...>(none, all)), Reals(choose<(I % 2 ? 48 + I / 2 : I)...>(none, all))};
}
inline Pair widen(const uint16_t* from) { return widened(load<Words>(from), std::make_index_sequence<32>()); }

template <size_t... I>
inline Words upper(Bits low, Bits high, std::index_sequence<I...>) {
  return choose<(2 * I + 1)...>(Words(low), Words(high));
}
inline void narrow(uint16_t* to, Bits low, Bits high) { store(to, upper(low, high, std::make_index_sequence<32>())); }

inline Bits nearest(Reals v) {  // its upper words are those of BF16::quick
  const Bits u = Bits(v);
  return u + 0x7fffu - Bits((u & 0x10000u) != 0);
}

inline Bits magnitude(Reals v) { return Bits(v) & ~SIGN; }
inline Bits larger(Bits a, Bits b) { return a > b ? a : b; }

// The dot of u with the sum of r (null: none), x and v; `t` is room for w / 2 numbers.
[[gnu::noinline]] float dot(const uint16_t* r, const uint16_t* x, const float* v, const float* u, int64_t w, float* t) {
  const int64_t h = w / 2;
  const auto terms = [&](int64_t i) {
    Pair state = widen(x + i);
    if (r) {
      const Pair stream = widen(r + i);
      state = {stream.low + state.low, stream.high + state.high};
    }
    return Pair{(state.low + load<Reals>(v + i)) * load<Reals>(u + i),
                (state.high + load<Reals>(v + i + 16)) * load<Reals>(u + i + 16)};
  };
  for (int64_t i = 0; i < h; i += 32) {
    const Pair a = terms(i), b = terms(i + h);
    store(t + i, a.low + b.low);
    store(t + i + 16, a.high + b.high);
  }
  return halved(h, t);
}

// x := round(x + change) where change = v + weight u is not zero, and then r := round(r + x) with `follow`; what they were
// is kept. Returns whether the range was left.
template <bool follow>
[[gnu::noinline]] bool write(uint16_t* x, uint16_t* r, const float* v, const float* u, float weight, int64_t w, uint16_t* old,
                             uint16_t* before) {
  Bits largest{};
  const auto changed = [&](Reals was, int64_t i) {
    const Reals change = load<Reals>(v + i) + weight * load<Reals>(u + i), sum = was + change;
    if (!r) largest = larger(largest, magnitude(sum));
    return change == 0 ? was : Reals(nearest(sum) & 0xffff0000u);
  };
  const auto moved = [&](Reals stream, Reals y) {
    const Reals h = stream + y;
    largest = larger(largest, magnitude(h));
    return nearest(h);
  };
  for (int64_t i = 0; i < w; i += 32) {
    const Pair was = widen(x + i);
    std::memcpy(old + i, x + i, 64);
    const Reals low = changed(was.low, i), high = changed(was.high, i + 16);
    narrow(x + i, Bits(low), Bits(high));
    if (!r) continue;
    const Pair stream = widen(r + i);
    if constexpr (follow) std::memcpy(before + i, r + i, 64);
    const Bits first = moved(stream.low, low), second = moved(stream.high, high);
    if constexpr (follow) narrow(r + i, first, second);
  }
  uint32_t most = 0;
  for (int k = 0; k < 16; ++k) most = most < largest[k] ? largest[k] : most;
  return most >= BF16::over;
}

// r := round(r + x).
inline void add(uint16_t* r, const uint16_t* x, int64_t w) {
  for (int64_t i = 0; i < w; i += 32) {
    const Pair stream = widen(r + i), more = widen(x + i);
    narrow(r + i, nearest(stream.low + more.low), nearest(stream.high + more.high));
  }
}

}  // namespace wide
}  // namespace

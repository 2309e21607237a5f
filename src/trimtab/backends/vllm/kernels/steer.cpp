// Applies the steering programs of a site to the rows of a step, in place: each row has the program of its binding.
//
// Every number is a float that holds a value rounded to the dtype the rounding law names (trimtab/steering/_arithmetic.py):
// one float operation on 16-bit values, rounded once, is the correctly rounded 16-bit operation. A dot is a sum of float
// products by halves (t[i] += t[i + h]): one fixed order per width, whatever the number of rows and threads, and the same
// order as in _form.py, so that both agree to the bit. Compile without contraction of multiplications and additions.

#ifdef TRIMTAB_PYTHON
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#endif
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "numbers.h"
#include "wide.h"

namespace {

// The layout is described in bank.py.
enum Kind : int32_t { NONE, STATIC, NORM, LINEAR, BOUNDS };
struct Meta { int32_t kind, key, count, math, state, sweeps, clamps, unused; };
struct Param { float factor, inverse, ratio, unused; };
constexpr int64_t MOST = 64;  // directions of one op
constexpr int64_t WORK = 1 << 16;  // elements per thread worth a thread

// What a slot holds: its ops, and of op j the directions from j * each * width on.
struct Slot {
  const Meta* meta;
  const Param* param;
  const float* bounds;
  const char* directions;
};

struct Bank {
  Slot empty;  // slot 0; the others lie `record` bytes from one another
  int64_t record, counted;  // counted: counters of a binding
  int32_t* counts;
  const int32_t *binding, *slot_of;
  const float* gain;
  int64_t ops, each, width, keys;
  bool narrow;
  std::optional<at::Tensor> residual, dose;
  std::vector<at::Tensor> kept;

  Slot slot(int64_t number) const {
    const auto there = [by = number * record](auto* one) {
      return reinterpret_cast<decltype(one)>(reinterpret_cast<const char*>(one) + by);
    };
    return {there(empty.meta), there(empty.param), there(empty.bounds), there(empty.directions)};
  }
};

constexpr int64_t BLOCK = 4;  // most rows that are looked at together: what one waits for, another one does meanwhile
constexpr int64_t NEAR = 2048;  // elements of such rows, so that they stay in the nearest cache
inline int64_t together(int64_t width) { return std::clamp<int64_t>(NEAR / width, 1, BLOCK); }
constexpr int64_t LINE = 64, ASKED = 4 * LINE;  // bytes: of a cache line, and of those that are asked for together
constexpr int64_t MOST_FETCHED = 2048;  // bytes of a slot, and of a row of the stream, that are asked for before their turn

struct Scratch {
  std::vector<float> held;
  std::array<int64_t, 2> fitted{};
  std::vector<int32_t> rows;
  bool alone;  // no other thread works on this tensor
  float *old, *stream, *state, *seen, *total, *change, *none, *t, *first, *u;
  void fit(int64_t width, int64_t each) {
    if (fitted == std::array{width, each}) return;
    fitted = {width, each};
    const int64_t w = (width + 31) / 16 * 16;
    held.resize(w * (10 + 2 * each * BLOCK) + LANES);
    const auto past = reinterpret_cast<uintptr_t>(held.data()) % (LANES * sizeof(float));
    float* p = held.data() + (past ? LANES - past / sizeof(float) : 0);  // vectors lie in one cache line each
    for (float** one : {&old, &stream, &state, &seen, &total, &change, &none, &t}) { *one = p; p += w; }
    u = p + 2 * w;  // several sums at once need more of t
    first = u + w * each * BLOCK;
    std::fill(none, none + width, 0.0f);
  }
};
thread_local Scratch scratch;

struct Effect { const float* c = nullptr; float before = 0, adjustment = 0; bool clamped = false; };

// The directions of op j as floats, one after another.
inline const float* directions(const Bank& b, const Slot& slot, int64_t j, float* u) {
  const int64_t start = j * b.each * b.width, n = slot.meta[j].count * b.width;
  if (!b.narrow) return reinterpret_cast<const float*>(slot.directions) + start;
  const uint16_t* from = reinterpret_cast<const uint16_t*>(slot.directions) + start;
  for (int64_t i = 0; i < n; ++i) u[i] = BF16::load(from[i]);
  return u;
}

// weights_k u_k summed in float, rounded once.
template <class M>
inline void combine(const float* weights, const float* u, int64_t count, int64_t w, float* __restrict c) {
  const float first = weights[0];
  const float* __restrict u0 = u;
  if (count == 1) {
    for (int64_t i = 0; i < w; ++i) c[i] = M::round(first * u0[i]);
    return;
  }
  for (int64_t i = 0; i < w; ++i) c[i] = first * u0[i];
  for (int64_t k = 1; k < count; ++k) {
    const float weight = weights[k];
    const float* __restrict uk = u + k * w;
    for (int64_t i = 0; i < w; ++i) c[i] = c[i] + weight * uk[i];
  }
  for (int64_t i = 0; i < w; ++i) c[i] = M::round(c[i]);
}

inline bool limited(const Param& a) { return a.ratio < std::numeric_limits<float>::infinity(); }

// Without branches: a processor that guesses wrong has worked on the next rows in vain. A NaN stays.
inline float clamp(float v, float low, float high) {
  const float raised = low > v ? low : v;
  return high < raised ? high : raised;
}

// lambda of Hildreth's sweeps (trimtab/steering/subspace.py), and the adjustment of each projection.
template <class M>
inline void hildreth(const Meta& m, const float* table, int64_t stride, const float* p, float* held, float* moved) {
  const int64_t k = m.count;
  for (int64_t i = 0; i < k; ++i) held[i] = 0;
  for (int32_t sweep = 0; sweep < m.sweeps; ++sweep)
    for (int64_t i = 0; i < k; ++i) {
      const float *row = table + i * stride, *gram = row + 2;
      float q = 0;
      for (int64_t j = 0; j < k; ++j) q += j == i ? 0.0f : held[j] * gram[j];
      q = M::round(q + p[i]);
      held[i] = M::round(clamp(q, row[0], row[1]) - q);
    }
  for (int64_t i = 0; i < k; ++i) {
    const float* gram = table + i * stride + 2;
    float total = held[0] * gram[0];
    for (int64_t j = 1; j < k; ++j) total = total + held[j] * gram[j];
    moved[i] = M::round(M::round(p[i] + M::round(total)) - p[i]);
  }
}

// The correction of one op on one row, in `room` or where it lies already: as its kernel and _chain._shape in
// trimtab/steering.
template <class M>
Effect correct(const Bank& b, const Slot& slot, int64_t j, const float* u, const float* seen, float gain,
               float* __restrict room, float* t) {
  const Meta& m = slot.meta[j];
  const Param& a = slot.param[j];
  const int64_t w = b.width;
  Effect effect;
  effect.c = room;
  if (m.kind == STATIC) {
    effect.c = u;
  } else if (m.kind == NORM) {
    const float amount = M::round(M::round(norm(seen, w, t)) * a.factor);
    combine<M>(&amount, u, 1, w, room);
  } else {
    float p[MOST], weights[MOST], adjusted[MOST];
    const int64_t stride = b.each + 2;
    const float* table = slot.bounds + j * b.each * stride;
    for (int64_t k = 0; k < m.count; ++k) p[k] = M::round(dot(seen, u + k * w, w, t));
    if (m.kind == LINEAR) {
      for (int64_t k = 0; k < m.count; ++k) {
        const float* row = table + k * stride;
        weights[k] = adjusted[k] = M::round(clamp(M::round(p[k] * a.factor), row[0], row[1]) - p[k]);
      }
    } else {
      hildreth<M>(m, table, stride, p, weights, adjusted);
    }
    for (int64_t k = 0; k < m.count; ++k) effect.clamped |= m.clamps && weights[k] != 0;
    effect.before = size(p, m.count);
    effect.adjustment = size(adjusted, m.count);
    combine<M>(weights, u, m.count, w, room);
  }
  const auto times = [&](float by) {
    const float* c = effect.c;
    for (int64_t i = 0; i < w; ++i) room[i] = M::round(c[i] * by);
    effect.c = room;
  };
  if (limited(a)) {
    const float length = M::round(norm(effect.c, w, t));
    const float bound = M::round(M::round(norm(seen, w, t)) * a.ratio);
    if (length > bound) times(M::round(bound / length));
  }
  if (const float g = M::round(gain); g != 1) times(g);
  return effect;
}

// Projections of the state on the directions of an op, as one number.
inline float along(const Meta& m, const Param& a, const float* u, const float* state, int64_t w, float* t) {
  float p[MOST];
  for (int64_t k = 0; k < m.count; ++k) p[k] = dot(state, u + k * w, w, t) * a.inverse;
  return size(p, m.count);
}

// The full dose of an op at a row; doses.py names the columns.
inline void put(float* out, float before, float after, float delta, bool clamped, float ratio) {
  out[0] = before, out[1] = after, out[2] = delta, out[3] = clamped, out[4] = std::isnan(ratio) ? 0.0f : ratio;
}

// Elements that the correction took out of the range go back to its edge. Returns whether there was one.
template <class T>
bool mend(typename T::type* x, const typename T::type* r, const typename T::type* old, const float* total, int64_t w) {
  bool made = false;
  for (int64_t i = 0; i < w; ++i) {
    const float was = T::load(old[i]), stream = r ? T::load(r[i]) : 0.0f;
    x[i] = old[i];
    if (total[i] == 0 || !finite(was) || (r && !finite(T::round(stream + was)))) continue;
    float y = T::round(was + total[i]);
    if (!finite(y)) {
      made = true;
      if (std::isnan(y)) continue;
      y = std::copysign(T::max, y);
    }
    if (const float h = T::round(stream + y); r && !finite(h)) {
      made = true;
      y = T::round(clamp(std::copysign(T::below_max, h) - stream, -T::max, T::max));
    }
    x[i] = T::store(y);
  }
  return made;
}

// x := round(x + total) where total is not zero, total(i) the sum of the corrections; and then r := round(r + x) with
// `follow`; what they were is kept. Returns whether the range was left.
template <class T, bool follow, class Total, class V = typename T::type>
[[gnu::noinline]] bool write(V* __restrict x, std::conditional_t<follow, V, const V>* __restrict r, int64_t w,
                             V* __restrict old, V* __restrict before, const Total& total) {
  uint32_t largest = 0;  // of what must not round to infinity
  std::memcpy(old, x, w * sizeof(V));
  if constexpr (follow) std::memcpy(before, r, w * sizeof(V));
  const auto one = [&](int64_t i) {
    const float was = T::load(x[i]), change = total(i), sum = was + change;
    const float y = change == 0 ? was : T::quick(sum);
    if (!r || !T::carries) largest = std::max(largest, bits(sum) & ~SIGN);
    x[i] = T::store(y);
    return y;
  };
  if (r)
    for (int64_t i = 0; i < w; ++i) {
      const float h = T::load(r[i]) + one(i);
      largest = std::max(largest, bits(h) & ~SIGN);
      if constexpr (follow) r[i] = T::store(T::summed(h));
    }
  else
    for (int64_t i = 0; i < w; ++i) one(i);
  return largest >= T::over;
}

// A row that left the range, from what it was. Returns whether an element became non-finite.
template <class T, bool follow, class Total, class V = typename T::type>
[[gnu::noinline]] bool mended(V* x, std::conditional_t<follow, V, const V>* r, int64_t w, Scratch& s, const Total& total) {
  const V *old = reinterpret_cast<V*>(s.old), *before = follow ? reinterpret_cast<V*>(s.stream) : r;
  for (int64_t i = 0; i < w; ++i) s.seen[i] = total(i);
  const bool made = mend<T>(x, before, old, s.seen, w);
  if constexpr (follow)
    for (int64_t i = 0; i < w; ++i) r[i] = T::store(T::summed(T::load(before[i]) + T::load(x[i])));
  return made;
}

template <class T, bool follow, class Total, class V = typename T::type>
inline bool finish(V* x, std::conditional_t<follow, V, const V>* r, int64_t w, Scratch& s, const Total& total) {
  V *old = reinterpret_cast<V*>(s.old), *before = reinterpret_cast<V*>(s.stream);
  return write<T, follow>(x, r, w, old, before, total) && mended<T, follow>(x, r, w, s, total);
}

// Whether an op, or one after it, looks at the state.
inline bool looks(const Meta* meta, const Param& a, int64_t left) {
  return meta->kind != STATIC || limited(a) || (left > 1 && meta[1].kind != NONE);
}

// Whether the correction of an op is its vector, bit by bit.
inline bool added_as_it_is(const Meta& m, const Param& a, float gain) {
  bool whole = false;
  with_dtype(m.math, [&](auto math) { whole = decltype(math)::round(gain) == 1; });
  return m.kind == STATIC && !limited(a) && whole;
}

// Rows of one request may lie in parts of several threads; alone, a thread need not lock the bus for it.
inline void count(int32_t* at, bool alone, int32_t more = 1) {
  if (alone) *at += more;
  else if (more) __atomic_fetch_add(at, more, __ATOMIC_RELAXED);
}

// One op of `act`: its direction (none: no such op), its parameters and where its full dose goes.
struct Done { const float* u = nullptr; const Param* param = nullptr; float* dose = nullptr; };

// The full doses of a vector that is added to `state`, a function of the element, and of a projection that is moved then.
template <class State>
[[gnu::noinline]] void measure(const State& state, int64_t w, const Done& added, const Done& moved, float weight,
                               bool clamped, float* t) {
  const float *v = added.u, *u = moved.u;
  if (v) {
    const auto [before, after, seen, own] =
        sums(w, t, [=](int64_t i) { return state(i) * v[i]; }, [=](int64_t i) { return (state(i) + v[i]) * v[i]; },
             [=](int64_t i) { return state(i) * state(i); }, [=](int64_t i) { return v[i] * v[i]; });
    const float inverse = added.param->inverse;
    put(added.dose, before * inverse, after * inverse, 0, false, std::sqrt(own) / std::sqrt(seen));
  }
  const auto move = [&](const auto& from) {
    const auto [before, after, seen, own] =
        sums(w, t, [=](int64_t i) { return from(i) * u[i]; }, [=](int64_t i) { return (from(i) + weight * u[i]) * u[i]; },
             [=](int64_t i) { return from(i) * from(i); }, [=](int64_t i) { return weight * u[i] * (weight * u[i]); });
    put(moved.dose, before, after * moved.param->inverse, weight, clamped, std::sqrt(own) / std::sqrt(seen));
  };
  if (u && v) move([=](int64_t i) { return state(i) + v[i]; });
  else if (u) move(state);
}

// What most programs do at a row, all of it in float32: a vector is added as it is, or one projection is moved, or first
// the one and then the other. Nothing is kept between the ops; every number is that of the loop in steer_row.
struct Simple {
  const float *v, *u;  // the vector that is added, and the direction that is then added `weight` times
  float weight;
  int32_t* counts;
  int64_t vector, moved;  // ops; -1: none
  bool clamped;
};

enum Form { NOTHING, SIMPLE, OTHER };

// The projection of a row, with a vector added, on a direction.
template <class T>
float projected(const typename T::type* r, const typename T::type* x, const float* v, const float* u, int64_t w, float* t) {
  if constexpr (std::is_same_v<T, BF16>)
    if (wide::takes(w)) return wide::dot(r, x, v, u, w, t);
  return r ? sum(w, t, [=](int64_t i) { return (T::load(r[i]) + T::load(x[i]) + v[i]) * u[i]; })
           : sum(w, t, [=](int64_t i) { return (T::load(x[i]) + v[i]) * u[i]; });
}

// Look at the program of a row: `one` is what it does where it is a simple one. `at`: its place among the rows that are
// looked at together.
template <class T>
Form look(const Bank& b, int64_t row, const typename T::type* x, const typename T::type* r, Scratch& s, int64_t at,
          Simple& one) {
  const int32_t owner = b.binding[row], number = b.slot_of[owner];
  const Slot slot = b.slot(number);
  const Meta* meta = slot.meta;
  const Param* param = slot.param;
  if (number == 0 || meta->kind == NONE) return NOTHING;
  const float* gain = b.gain + row * b.keys;
  int64_t vector = -1, moved = -1;
  for (int64_t j = 0; j < b.ops && meta[j].kind != NONE; ++j) {
    const float g = gain[meta[j].key];
    if (std::isnan(g)) continue;
    if (g != 1 || meta[j].math != 0 || meta[j].state != 0 || limited(param[j]) || moved >= 0) return OTHER;
    if (meta[j].kind == STATIC && vector < 0) vector = j;
    else if (meta[j].kind == LINEAR && meta[j].count == 1) moved = j;
    else return OTHER;
  }
  if (vector < 0 && moved < 0) return NOTHING;
  const int64_t w = b.width;
  const float* v = vector < 0 ? s.none : directions(b, slot, vector, s.first + at * w);
  const float* u = moved < 0 ? v : directions(b, slot, moved, s.u + at * w);
  one = {v, u, 0, b.counts + owner * b.counted, vector, moved, false};
  if (moved < 0) return SIMPLE;
  const float* bounds = slot.bounds + moved * b.each * (b.each + 2);
  const float p = projected<T>(r, x, v, u, w, s.t);
  one.weight = clamp(p * param[moved].factor, bounds[0], bounds[1]) - p;
  one.clamped = meta[moved].clamps && one.weight != 0;
  return SIMPLE;
}

// Write a row and, with `follow`, the stream. Returns whether an element became non-finite.
template <class T, bool follow, class V = typename T::type>
bool move(V* x, V* r, int64_t w, Scratch& s, const Simple& one) {
  const auto total = [v = one.v, u = one.u, weight = one.weight](int64_t i) { return v[i] + weight * u[i]; };
  if constexpr (std::is_same_v<T, BF16>)
    if (wide::takes(w)) {
      V *old = reinterpret_cast<V*>(s.old), *before = reinterpret_cast<V*>(s.stream);
      return wide::write<follow>(x, r, one.v, one.u, one.weight, w, old, before) && mended<T, follow>(x, r, w, s, total);
    }
  return finish<T, follow>(x, r, w, s, total);
}

// Do it, and bring r up to date with `follow`; returns whether that was done.
template <class T>
bool act(const Bank& b, int64_t row, const Simple& one, typename T::type* x, typename T::type* r, bool follow, float* dose,
         Scratch& s) {
  const int64_t w = b.width;
  const float *v = one.v, *u = one.u, weight = one.weight;
  if (one.vector >= 0) count(one.counts + one.vector * 3, s.alone);
  if (one.moved >= 0) {
    count(one.counts + one.moved * 3, s.alone);
    count(one.counts + one.moved * 3 + 1, s.alone, one.clamped);
  }
  if (dose) {
    const Param* param = b.slot(b.slot_of[b.binding[row]]).param;
    const auto done = [&](int64_t j, const float* of) { return j < 0 ? Done{} : Done{of, param + j, dose + j * 5}; };
    const Done first = done(one.vector, v), second = done(one.moved, u);
    if (r) measure([=](int64_t i) { return T::load(r[i]) + T::load(x[i]); }, w, first, second, weight, one.clamped, s.t);
    else measure([=](int64_t i) { return T::load(x[i]); }, w, first, second, weight, one.clamped, s.t);
  }
  const bool made = r && follow ? move<T, true>(x, r, w, s, one) : move<T, false>(x, r, w, s, one);
  if (made)
    for (const int64_t j : {one.vector, one.moved})
      if (j >= 0) count(one.counts + j * 3 + 2, s.alone);
  return r && follow;
}

template <class T>
[[gnu::noinline]] void steer_row(const Bank& b, int64_t row, typename T::type* x, const typename T::type* r, float* dose,
                                 Scratch& s) {
  const int64_t w = b.width;
  const int32_t owner = b.binding[row];
  const Slot slot = b.slot(b.slot_of[owner]);
  const Meta* meta = slot.meta;
  const Param* param = slot.param;
  const float* gain = b.gain + row * b.keys;
  int32_t* counts = b.counts + owner * b.counted;
  const float *total = nullptr, *last = nullptr;  // float32 corrections: the sum of the last two is made in `finish`
  for (int64_t j = 0; j < b.ops && meta[j].kind != NONE; ++j) {
    const Meta& m = meta[j];
    const float g = gain[m.key];
    if (std::isnan(g)) continue;
    const float* u = directions(b, slot, j, total ? s.u : s.first);
    const bool more = j + 1 < b.ops && meta[j + 1].kind != NONE;
    if (!total && !dose && added_as_it_is(m, param[j], g)) {
      if (more)
        with_dtype(m.state, [&](auto state) {
          using S = decltype(state);
          if (r) for (int64_t i = 0; i < w; ++i) s.state[i] = S::round(S::round(T::load(r[i]) + T::load(x[i])) + u[i]);
          else for (int64_t i = 0; i < w; ++i) s.state[i] = S::round(S::round(T::load(x[i])) + u[i]);
        });
      count(counts + j * 3, s.alone);
      total = u;
      continue;
    }
    if (!total && (dose || looks(&m, param[j], b.ops - j)))
      with_dtype(m.state, [&](auto state) {
        using S = decltype(state);
        if (r) for (int64_t i = 0; i < w; ++i) s.state[i] = S::round(T::load(r[i]) + T::load(x[i]));
        else for (int64_t i = 0; i < w; ++i) s.state[i] = S::round(T::load(x[i]));
      });
    const float* seen = s.state;
    Effect effect;
    with_dtype(m.math, [&](auto math) {
      using M = decltype(math);
      if (m.math != m.state) {
        for (int64_t i = 0; i < w; ++i) s.seen[i] = M::round(s.state[i]);
        seen = s.seen;
      }
      effect = correct<M>(b, slot, j, u, seen, g, total ? s.change : s.total, s.t);
    });
    count(counts + j * 3, s.alone);
    if (effect.clamped) count(counts + j * 3 + 1, s.alone);
    float* out = dose ? dose + j * 5 : nullptr;
    float before = effect.before, ratio = 0;
    if (out) {
      if (m.kind == STATIC || m.kind == NORM) before = along(m, param[j], u, s.state, w, s.t);
      ratio = norm(effect.c, w, s.t) / norm(s.state, w, s.t);
    }
    with_dtype(m.state, [&](auto state) {
      using S = decltype(state);
      if (more || out) for (int64_t i = 0; i < w; ++i) s.state[i] = S::round(s.state[i] + effect.c[i]);
      if (total && !more && std::is_same_v<S, F32>) last = effect.c;
      else if (total) for (int64_t i = 0; i < w; ++i) s.total[i] = S::round(total[i] + effect.c[i]);
    });
    if (out) put(out, before, along(m, param[j], u, s.state, w, s.t), effect.adjustment, effect.clamped, ratio);
    if (!total) total = effect.c;
    else if (!last) total = s.total;
  }
  if (!total) return;
  const bool made = last ? finish<T, false>(x, r, w, s, [=](int64_t i) { return total[i] + last[i]; })
                         : finish<T, false>(x, r, w, s, [=](int64_t i) { return total[i]; });
  if (made)
    for (int64_t j = 0; j < b.ops && meta[j].kind != NONE; ++j)
      if (!std::isnan(gain[meta[j].key])) count(counts + j * 3 + 2, s.alone);
}

void check_rows(const at::Tensor& t, int64_t width, const char* what) {
  TORCH_CHECK(t.dim() == 2 && t.size(1) == width && (width == 1 || t.stride(1) == 1), what, ": shape ", t.sizes(),
              " and strides ", t.strides(), " were given; rows of width ", width, " were expected");
}

enum After : int64_t { LEAVE, SET, ADD };  // what becomes of tracked rows of the stream: r, x, r + x

// What is done to the rows of a tensor: a branch that came before is added to the stream, banks act in order, and the
// stream is brought up to date.
struct Work {
  const Bank* banks;
  size_t count;
  const int32_t *binding, *slot_of;  // slot_of: only rows with a steering; null: all tracked rows
  const at::Tensor *before, *stream;
  After after;
  int64_t from, to;  // columns of the banks; to < 0: all
};

template <class V>
struct View {
  V* base = nullptr;
  int64_t stride = 0;
  explicit View(const at::Tensor* t) {
    if (t) base = static_cast<V*>(t->data_ptr()), stride = t->stride(0);
  }
  V* operator[](int64_t row) const { return base ? base + row * stride : nullptr; }
};

// Ask for memory, `size` bytes of it or a little more: in loops of single lines a row takes some 10 ns longer.
template <int written>
inline void ask(const void* start, int64_t size) {
  const char* from = static_cast<const char*>(start);
  for (const char* end = from + size; from < end; from += ASKED)
    for (int64_t at = 0; at < ASKED; at += LINE) __builtin_prefetch(from + at, written, 3);
  asm volatile("");  // without it GCC sees nothing that this function does, and leaves out its calls
}

// Ask for a half of what the slot of row[k] holds, before its turn: between passes it has left the cache. A processor
// waits for few lines at a time; asked for more, it holds up the rows that could be worked on meanwhile. Rows of one
// request have the same slot.
inline void fetch(const Bank& b, const int32_t* row, int64_t k, bool second) {
  const int64_t owner = b.binding[row[k]];
  if (k > 0 && owner == b.binding[row[k - 1]]) return;
  const int64_t end = std::min(b.record, MOST_FETCHED), middle = (end / 2 + ASKED - 1) / ASKED * ASKED;
  const char* slot = reinterpret_cast<const char*>(b.slot(b.slot_of[owner]).meta);
  if (second) return ask<0>(slot + middle, end - middle);
  ask<0>(slot, middle);
  __builtin_prefetch(b.counts + owner * b.counted, 1, 3);
}

template <class T>
inline void add(typename T::type* __restrict r, const typename T::type* __restrict x, int64_t w) {
  if constexpr (std::is_same_v<T, BF16>)
    if (wide::takes(w)) return wide::add(r, x, w);
  for (int64_t i = 0; i < w; ++i) r[i] = T::store(T::summed(T::load(r[i]) + T::load(x[i])));
}

// Rows [begin, end) of `rows`; alone: no other thread works on this tensor. `s` is the scratch of this thread.
template <class T>
[[gnu::noinline]] void work(const Work& job, const at::Tensor& x, const int32_t* rows, int64_t begin, int64_t end,
                            bool alone, Scratch& s) {
  using V = typename T::type;
  const View<V> xs(&x), rs(job.stream), before(job.before);
  const int64_t w = x.size(1);
  s.alone = alone;
  if (job.count) s.fit(job.banks->width, job.banks->each);
  const int64_t block = together(w);
  for (int64_t first = begin; first < end; first += block) {
    const int64_t size = std::min(block, end - first);
    const int32_t* row = rows + first;
    if (job.before)
      for (int64_t k = 0; k < size; ++k) add<T>(rs[row[k]], before[row[k]], w);
    std::array<bool, BLOCK> followed{};
    for (size_t n = 0; n < job.count; ++n) {
      const Bank& b = job.banks[n];
      const View<V> stream(b.residual ? &*b.residual : nullptr);
      const bool follow = job.after == ADD && n + 1 == job.count && b.residual;
      std::array<Simple, BLOCK> simple;
      std::array<Form, BLOCK> form;
      const int64_t next = n == 0 ? std::min(size, end - first - block) : 0;
      for (int64_t k = 0; k < size; ++k) {
        if (k < next) {
          fetch(b, row, block + k, false);
          if (const V* r = stream[row[block + k]]) ask<1>(r, std::min<int64_t>(w * sizeof(V), MOST_FETCHED));
        }
        form[k] = look<T>(b, row[k], xs[row[k]] + job.from, stream[row[k]], s, k, simple[k]);
      }
      const auto dose = [&](int64_t i) {
        return b.dose ? b.dose->template mutable_data_ptr<float>() + i * b.ops * 5 : nullptr;
      };
      for (int64_t k = 0; k < size; ++k) {
        if (k < next) fetch(b, row, block + k, true);
        if (const int64_t i = row[k]; form[k] == SIMPLE)
          followed[k] = act<T>(b, i, simple[k], xs[i] + job.from, stream[i], follow, dose(i), s);
      }
      for (int64_t k = 0; k < size; ++k)  // they take the rooms of those
        if (const int64_t i = row[k]; form[k] == OTHER) steer_row<T>(b, i, xs[i] + job.from, stream[i], dose(i), s);
    }
    for (int64_t k = 0; k < size; ++k) {
      if (job.after == ADD && !followed[k]) add<T>(rs[row[k]], xs[row[k]], w);
      else if (job.after == SET) std::memcpy(rs[row[k]], xs[row[k]], w * sizeof(V));
    }
  }
}

template <class T>
void work(const Work& job, const at::Tensor& x, const std::vector<int32_t>& rows) {
  const int64_t count = static_cast<int64_t>(rows.size()), w = x.size(1);
  const bool alone = count * w < 2 * WORK || at::get_num_threads() == 1;
  const auto run = [&](int64_t begin, int64_t end) { work<T>(job, x, rows.data(), begin, end, alone, scratch); };
  if (alone) run(0, count);
  else at::parallel_for(0, count, std::max<int64_t>(1, WORK / w), run);
}

void work(const Work& job, const at::Tensor& x, int64_t n) {
  n = std::min(n, x.size(0));
  std::vector<int32_t>& rows = scratch.rows;
  rows.resize(n);
  int32_t* last = rows.data();
  for (int64_t i = 0; i < n; ++i)
    if (const int32_t owner = job.binding[i]; owner != 0 && (!job.slot_of || job.slot_of[owner] != 0)) *last++ = i;
  rows.resize(last - rows.data());
  if (rows.empty()) return;
  if (job.count) {
    const int64_t first = std::min<int64_t>(together(x.size(1)), rows.size());
    for (int64_t k = 0; k < first; ++k)
      for (const bool second : {false, true}) fetch(*job.banks, rows.data(), k, second);
  }
  check_rows(x, x.size(1), "x");
  for (size_t k = 0; k < job.count; ++k) {
    const Bank& b = job.banks[k];
    TORCH_CHECK((job.to < 0 ? x.size(1) : job.to - job.from) == b.width && job.to <= x.size(1), "x: ", x.size(1),
                " columns were given; ", b.width, " were expected");
    for (const auto* other : {&b.residual, &b.dose})
      TORCH_CHECK(!*other || (*other)->size(0) >= n, "a buffer of ", (*other)->size(0), " rows was given for ", n, " rows");
    TORCH_CHECK(!b.residual || b.residual->scalar_type() == x.scalar_type(), "x is ", x.scalar_type(),
                " and the residual is ", b.residual->scalar_type());
  }
  for (const at::Tensor* other : {job.before, job.after == LEAVE ? nullptr : job.stream}) {
    if (!other) continue;
    check_rows(*other, x.size(1), other == job.before ? "before" : "residual");
    TORCH_CHECK(other->scalar_type() == x.scalar_type() && other->size(0) >= n, other->size(0), " rows of ",
                other->scalar_type(), " were given for ", n, " rows of ", x.scalar_type());
  }
  if (x.scalar_type() == at::kFloat) work<F32>(job, x, rows);
  else if (x.scalar_type() == at::kBFloat16) work<BF16>(job, x, rows);
  else if (x.scalar_type() == at::kHalf) work<F16>(job, x, rows);
  else TORCH_CHECK(false, "x: dtype ", x.scalar_type(), " cannot be steered");
}

void apply_(const at::Tensor& x, int64_t handle, int64_t n) {
  const Bank* b = reinterpret_cast<const Bank*>(handle);
  check_rows(x, b->width, "x");
  work({b, 1, b->binding, b->slot_of, nullptr, nullptr, LEAVE, 0, -1}, x, n);
}

void update_(const at::Tensor& r, const at::Tensor& x, const at::Tensor& binding, int64_t n, bool add) {
  work({nullptr, 0, binding.const_data_ptr<int32_t>(), nullptr, nullptr, &r, add ? ADD : SET, 0, -1}, x, n);
}

// Buffers: the five tables of a bank, then binding, slot_of and gain.
int64_t bind(const std::vector<at::Tensor>& given, const std::optional<at::Tensor>& residual,
             const std::optional<at::Tensor>& dose) {
  TORCH_CHECK(given.size() == 8 && given[2].size(2) <= MOST, "bank: 8 tensors and at most ", MOST, " directions");
  const auto apart = [&](int64_t k) { return given[k].stride(0) * given[k].element_size(); };
  for (int64_t k = 0; k < 8; ++k) {
    const bool whole = k > 4 ? given[k].is_contiguous() : given[k].select(0, 0).is_contiguous();
    TORCH_CHECK(given[k].device().is_cpu() && whole && (k > 3 || apart(k) == apart(0)), "bank: tensor ", k,
                " has strides ", given[k].strides());
  }
  TORCH_CHECK(!dose || (dose->is_contiguous() && dose->dim() == 3 && dose->size(1) == given[0].size(1) &&
                        dose->size(2) == 5),
              "dose: [rows, ", given[0].size(1), ", 5] was expected");
  if (residual) check_rows(*residual, given[2].size(3), "residual");
  auto* b = new Bank;
  b->kept = given;
  b->residual = residual;
  b->dose = dose;
  b->empty = {reinterpret_cast<const Meta*>(given[0].const_data_ptr<int32_t>()),
              reinterpret_cast<const Param*>(given[1].const_data_ptr<float>()), given[3].const_data_ptr<float>(),
              static_cast<const char*>(given[2].const_data_ptr())};
  b->record = apart(0);
  b->counted = given[4].stride(0);
  b->counts = given[4].mutable_data_ptr<int32_t>();
  b->binding = given[5].const_data_ptr<int32_t>();
  b->slot_of = given[6].const_data_ptr<int32_t>();
  b->gain = given[7].const_data_ptr<float>();
  b->ops = given[0].size(1);
  b->each = given[2].size(2);
  b->width = given[2].size(3);
  b->keys = given[7].size(1);
  b->narrow = given[2].scalar_type() == at::kBFloat16;
  return reinterpret_cast<int64_t>(b);
}

void release(int64_t handle) { delete reinterpret_cast<Bank*>(handle); }

// What a tap does with its tensor (live.py): the banks of its sites in order, then the stream.
struct Tap {
  int64_t* step;  // see Step.control in step.py
  int64_t* own;  // calls; whether this pass needs Python: rows to record, ops outside the banks
  const int32_t* binding;
  int64_t number, from, to;
  After after;
  std::optional<at::Tensor> stream;
  std::vector<Bank> banks, dosed;  // the same banks, without and with buffers for full doses
  std::vector<at::Tensor> kept;
};
std::unordered_map<std::string, std::shared_ptr<const Tap>> taps;
std::mutex taps_lock;

void enroll(std::string name, const std::vector<int64_t>& banks, const std::vector<at::Tensor>& tables,
            const std::optional<at::Tensor>& stream, const std::vector<int64_t>& place) {
  TORCH_CHECK(tables.size() == 3 && tables[0].numel() == 8, "tap: step [8], own and binding");
  TORCH_CHECK(place.size() == 4 && (stream || place[3] == LEAVE), "tap: number, first column, end, and after");
  auto tap = std::make_shared<Tap>();
  tap->step = tables[0].mutable_data_ptr<int64_t>();
  tap->own = tables[1].mutable_data_ptr<int64_t>();
  tap->binding = tables[2].const_data_ptr<int32_t>();
  for (size_t i = 0; i < banks.size(); ++i)
    (i % 2 ? tap->dosed : tap->banks).push_back(*reinterpret_cast<const Bank*>(banks[i]));
  tap->stream = stream;
  tap->number = place[0], tap->from = place[1], tap->to = place[2];
  tap->after = static_cast<After>(place[3]);
  tap->kept = tables;
  const std::lock_guard<std::mutex> held(taps_lock);
  taps[std::move(name)] = std::move(tap);
}

void leave(std::string name) {
  const std::lock_guard<std::mutex> held(taps_lock);
  taps.erase(name);
}

// What begins the stream: the ids of a pass, from the start of the buffer where those of all passes lie, and their table.
struct Lookup { at::Tensor ids, table; };

int64_t lookup(const at::Tensor& ids, const at::Tensor& table) {
  TORCH_CHECK(ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong, "ids: ", ids.scalar_type());
  return reinterpret_cast<int64_t>(new Lookup{ids, table});
}

void forget(int64_t handle) { delete reinterpret_cast<Lookup*>(handle); }

// Begin the stream: r[i] := table[ids[i]] for the first n rows.
void embed(const at::Tensor& r, const Lookup& given, int64_t n) {
  const int64_t size = r.size(1) * r.element_size(), stride = r.stride(0) * r.element_size(), known = given.table.size(0);
  TORCH_CHECK(r.size(0) >= n, "embed: ", n, " rows in ", r.size(0));
  const char* from = static_cast<const char*>(given.table.const_data_ptr());
  char* to = static_cast<char*>(r.mutable_data_ptr());
  const auto run = [&](const auto* id) {
    for (int64_t i = 0; i < n; ++i) {
      TORCH_CHECK(0 <= id[i] && id[i] < known, "token id ", id[i], " of ", known);
      std::memcpy(to + i * stride, from + id[i] * size, size);
    }
  };
  const void* ids = given.ids.const_data_ptr();
  if (given.ids.scalar_type() == at::kInt) run(static_cast<const int32_t*>(ids));
  else run(static_cast<const int64_t*>(ids));
}

std::shared_ptr<const Tap> find(const std::string& name) {
  const std::lock_guard<std::mutex> held(taps_lock);
  const auto found = taps.find(name);
  return found == taps.end() ? nullptr : found->second;
}

// Run a tap on its tensor; `before` is that of the tap before, which joins it. Returns false where it needs Python: all
// of that one is done then, and the stream has begun.
bool run(const Tap& tap, const at::Tensor& x, const at::Tensor* before) {
  int64_t* step = tap.step;
  if (step[0] == 0 || tap.number > step[2]) return true;
  const int64_t n = step[1];
  const at::Tensor* stream = tap.stream ? &*tap.stream : nullptr;
  if (tap.number == (before ? 1 : 0) && step[4] && stream) embed(*stream, *reinterpret_cast<const Lookup*>(step[4]), n);
  if (tap.own[1] != 0 || x.dim() != 2 || x.size(0) < n) {
    if (before && stream)
      work({nullptr, 0, tap.binding, nullptr, nullptr, stream, ADD, 0, -1}, before->reshape({-1, before->size(-1)}), n);
    return false;
  }
  ++tap.own[0];
  const auto& banks = step[3] ? tap.dosed : tap.banks;
  const at::Tensor* added = stream ? before : nullptr;
  work({banks.data(), banks.size(), tap.binding, nullptr, added, stream, tap.after, tap.from, tap.to}, x, n);
  if (tap.number == step[2]) step[0] = 0;  // the pass is over
  return true;
}

void ask_python(const at::Tensor& x, std::string name, const at::Tensor* before) {
  static const auto python = c10::Dispatcher::singleton().findSchemaOrThrow("trimtab::live_", "");
  torch::jit::Stack stack{x, std::move(name), before ? c10::IValue(*before) : c10::IValue()};
  python.callBoxed(stack);
}

void site_(const at::Tensor& x, std::string name, const std::optional<at::Tensor>& given) {
  const at::Tensor* before = given ? &*given : nullptr;
  const auto tap = find(name);
  if (!tap) ask_python(x, std::move(name), before);
  else if (!run(*tap, x, before)) ask_python(x, std::move(name), nullptr);
}

}  // namespace

TORCH_LIBRARY(trimtab_cpu, m) {
  m.def("bind(Tensor[] buffers, Tensor? residual, Tensor? dose) -> int", &bind);
  m.def("release(int bank) -> ()", &release);
  m.def("apply_(Tensor(a!) x, int bank, int n) -> ()");
  m.def("enroll(str tap, int[] banks, Tensor[] tables, Tensor? stream, int[] place) -> ()", &enroll);
  m.def("leave(str tap) -> ()", &leave);
  m.def("lookup(Tensor ids, Tensor table) -> int", &lookup);
  m.def("forget(int lookup) -> ()", &forget);
  m.def("update_(Tensor(a!) r, Tensor x, Tensor binding, int n, bool add) -> ()");
}

TORCH_LIBRARY_IMPL(trimtab_cpu, CPU, m) {
  m.impl("apply_", &apply_);
  m.impl("update_", &update_);
}

TORCH_LIBRARY_IMPL(trimtab, CPU, m) { m.impl("site_", &site_); }

#ifdef TRIMTAB_PYTHON
namespace {

std::string text_of(PyObject* name) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(name, &size);
  if (!text) throw python_error();
  return std::string(text, size);
}

// Taps by the address of their name, a constant of a compiled graph: between passes all memory has left the cache, and
// this is one line of it where a search by text needs eight.
struct Known { PyObject* name; std::weak_ptr<const Tap> tap; };
std::array<Known, 256> known;  // guarded by Python's lock
constexpr size_t TRIED = 4;

std::shared_ptr<const Tap> find(PyObject* name) {
  const size_t first = (reinterpret_cast<uintptr_t>(name) >> 4) % known.size();
  Known* entry = &known[first];
  for (size_t k = 0; k < TRIED; ++k) {  // its own place, or one behind it: names that share one shall not take turns
    Known& one = known[(first + k) % known.size()];
    if (one.name && one.name != name) continue;
    if (auto tap = one.tap.lock()) return tap;
    entry = &one;
    break;
  }
  auto tap = find(text_of(name));
  Py_INCREF(name);
  Py_XDECREF(std::exchange(entry->name, name));
  entry->tap = tap;
  return tap;
}

// site_ as a plain Python function of a tensor, the name of a tap, and the tensor before: through torch.ops it takes six
// times as long to get here. Without torch's handler of warnings, whose code is in no cache when a tap's turn comes.
PyObject* called(PyObject*, PyObject* const* given, Py_ssize_t count) try {
  const bool joined = count == 3 && given[2] != Py_None;
  TORCH_CHECK((count == 2 || count == 3) && THPVariable_Check(given[0]) && PyUnicode_Check(given[1]) &&
                  (!joined || THPVariable_Check(given[2])),
              "site_: a tensor and a tap's name, and the tensor before if any, were expected");
  const at::Tensor& x = THPVariable_Unpack(given[0]);
  const at::Tensor* before = joined ? &THPVariable_Unpack(given[2]) : nullptr;
  const auto tap = find(given[1]);
  bool done = false;
  if (tap) {
    std::optional<pybind11::gil_scoped_release> others;
    if (x.numel() > WORK) others.emplace();
    done = run(*tap, x, before);
  }
  if (!done) ask_python(x, text_of(given[1]), tap ? nullptr : before);
  Py_RETURN_NONE;
} catch (...) {
  torch::translate_exception_to_python(std::current_exception());
  return nullptr;
}

}  // namespace

extern "C" PyObject* trimtab_site() {
  static PyMethodDef method{"site_", reinterpret_cast<PyCFunction>(&called), METH_FASTCALL, nullptr};
  return PyCFunction_New(&method, nullptr);
}
#endif

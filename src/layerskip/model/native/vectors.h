// Vectors of floats and integers: 16 lanes with AVX-512, 8 with AVX2, else 4.
#pragma once

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error fast-math is on, with which the same sums would not have the same bits everywhere
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr int LANES = 16, GROUP = 32;
#if defined(__x86_64__) && !defined(__FMA__)
#error this processor has no fused multiply-add
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error this processor puts the high bytes of a number first
#endif
#if defined(__AVX512F__) && defined(__AVX512VNNI__)  // without VNNI, bytes are multiplied in vectors of 8
#define VECTORS_OF_16
constexpr int WIDTH = 16;  // floats in a vector of this machine
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VECTORS_OF_8
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int PARTS = LANES / WIDTH;  // vectors of a panel
typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint64_t Pairs __attribute__((vector_size(4 * WIDTH)));  // of floats
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));

template <class V, class T>
inline V load(const T *p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void store(T *p, V v) {
  memcpy(p, &v, sizeof v);
}
inline Vec spread(float x) { return x - Vec{}; }
inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < WIDTH; i++) total += v[i];
  return total;
}
inline float maximum(Vec v) {
#ifdef VECTORS_OF_16
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int i = 1; i < WIDTH; i++) most = v[i] > most ? v[i] : most;
  return most;
#endif
}
inline int32_t maximum(Ints v) {
#ifdef VECTORS_OF_16
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t most = v[0];
  for (int i = 1; i < WIDTH; i++) most = v[i] > most ? v[i] : most;
  return most;
#endif
}
inline int32_t sum(Ints v) {
#ifdef VECTORS_OF_16
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t total = 0;
  for (int i = 0; i < WIDTH; i++) total += v[i];
  return total;
#endif
}
// a * b + c, rounded once (FMA). Explicit, since a compiler that fuses some expressions and not others
// would give the same sum different bits.
inline Vec fused(Vec a, Vec b, Vec c) {
#ifdef VECTORS_OF_16
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(VECTORS_OF_8)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)  // GCC before 12 does not vectorize the loop to it
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  Vec sums;
  for (int i = 0; i < WIDTH; i++) sums[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return sums;
#endif
}
// Damaged weights have to be noticed, so NaN propagates through everything below. If one argument is NaN,
// these return the second.
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
// As integers, magnitudes are in the same order, with NaN above all others.
inline Ints magnitude(Vec v) { return (Ints)v & 0x7fffffff; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

// e^x to about 2 ulp: 2^n from the exponent bits, 2^f on [-1/2, 1/2] from a polynomial.
inline Vec exponential(Vec x) {
  x = smaller(spread(88.0f), larger(spread(-87.0f), x));
  const Vec t = x * 1.44269504f;
  const Vec shifted = t + 12582912.0f;  // rounds to an integer, in the low bits
  const Words biased = (Words)shifted - (Words)spread(12582912.0f) + 127u;  // n as a biased exponent
  const Vec f = t - (shifted - 12582912.0f);
  Vec p = spread(1.535336188e-4f);
  p = fused(p, f, spread(1.339887440e-3f));
  p = fused(p, f, spread(9.618437357e-3f));
  p = fused(p, f, spread(5.550332548e-2f));
  p = fused(p, f, spread(2.402264791e-1f));
  p = fused(p, f, spread(6.931472028e-1f));
  p = fused(p, f, spread(1.0f));
  return p * (Vec)(biased << 23);
}

enum Activation : int32_t { SILU, GELU_TANH };
inline Vec activate(int32_t activation, Vec x) {
  if (activation == SILU) return x / (exponential(-x) + 1.0f);
  const Vec u = (x + x * x * x * 0.044715f) * 1.5957691216f;  // 2 sqrt(2 / pi)
  return x - x / (exponential(u) + 1.0f);                     // x (1 + tanh(u / 2)) / 2
}

inline Halves round_to_bfloat16(Vec v) {  // nearest, ties to even; NaN with low bits alone may become Inf
  const Words bits = (Words)v;
  return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
}
inline Halves to_bfloat16(Vec v) { return round_to_bfloat16(v == v ? v : spread(NAN)); }
inline Vec from_bfloat16(Halves v) { return (Vec)(__builtin_convertvector(v, Words) << 16); }
inline Vec from_float16(const void *p) {
#ifdef VECTORS_OF_16
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(VECTORS_OF_8)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p)));
#else  // shifts exponent and mantissa; older compilers have no _Float16
  const Ints bits = __builtin_convertvector(load<Halves>((const uint16_t *)p), Ints);
  const Ints size = (bits & 0x7fff) << 13;
  // Subnormals get a leading 1 for the time being, since a CPU may flush subnormal float32 to 0.
  const Ints small = (Ints)((Vec)(size + (113 << 23)) - 0x1p-14f);
  const Ints large = size + (112 << 23) + ((size >= 31 << 23) & 112 << 23);  // Inf or NaN
  return (Vec)((size < 1 << 23 ? small : large) | (Ints)((Words)bits >> 15 << 31));
#endif
}

inline Vec from_bytes(const int8_t *p) {
#ifdef VECTORS_OF_16
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(VECTORS_OF_8)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else  // on x86, GCC would convert byte by byte
  return __builtin_convertvector(__builtin_convertvector(load<Bytes>(p), Ints), Vec);
#endif
}

inline float from_float16(uint16_t half) {
  uint16_t halves[WIDTH] = {half};
  return from_float16(halves)[0];
}

// Zen is fastest with products of bfloat16 pairs, and AMX has no others; Intel's vector units are faster in float32.
#if defined(VECTORS_OF_16) && defined(__AVX512BF16__) && (defined(__znver4__) || defined(__znver5__) || defined(__AMX_BF16__))
#define PAIRS_OF_BFLOAT16
constexpr bool PAIRS = true;
inline Vec dot2(Vec sums, Words weights, uint32_t inputs) {
  return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(inputs));
}
#else
constexpr bool PAIRS = false;
#endif

}  // namespace
